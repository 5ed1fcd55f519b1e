"""Requests between the APIs and the engine: validation, admission, sessions, detokenization. No message formats."""
