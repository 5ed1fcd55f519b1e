"""The trainer: JSONL in, adapter folder out."""
