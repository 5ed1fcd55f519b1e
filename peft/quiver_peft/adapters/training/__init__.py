"""Adapters in training: trainable modules joined to a base through its seam."""
