"""Training over several processes, as `torchrun` starts them: tensor, data and sequence parallelism."""
