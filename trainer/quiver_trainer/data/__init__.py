"""Data: JSONL rows, datasets and batches."""
