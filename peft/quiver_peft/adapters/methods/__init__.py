"""Adapter methods: each one's config, weights and trainable module."""
