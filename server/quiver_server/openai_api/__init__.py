"""The OpenAI-compatible HTTP API. Shares the engine, limits, tokens and certificates with the gRPC API."""
