"""Stores of adapters: folders and URLs, manifests and revisions."""
