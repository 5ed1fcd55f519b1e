"""The engine: scheduler, KV block pool, batches, model runner, sampler. Knows slots, not adapters."""
