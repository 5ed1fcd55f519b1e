"""The OpenAI-compatible HTTP front: another face of the same engine, limits, tokens and certificates."""
