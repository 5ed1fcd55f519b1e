"""Requests on their way to the engine: validation, admission, sessions, detokenization. No wire format."""
