"""Batched adapter mathematics: each operation has a plain torch form, which is its oracle and its fallback."""
