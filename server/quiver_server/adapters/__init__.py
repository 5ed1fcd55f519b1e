"""Adapters on the server: stores, caches, memory, eviction, leases. Knows nothing of the engine."""
