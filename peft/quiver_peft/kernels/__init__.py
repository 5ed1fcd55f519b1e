"""Kernels of base and adapters. Each has a plain torch form, which is its oracle in tests and its fallback."""
