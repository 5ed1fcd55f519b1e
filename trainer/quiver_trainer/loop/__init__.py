"""Training runs: loop, optimizer, checkpoints, validation, prediction."""
