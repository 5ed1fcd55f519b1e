"""Metrics, per-call context, traces and logs."""
