"""Adapters in service: one memory arena, slots, banks and the seams that apply them to mixed batches."""
