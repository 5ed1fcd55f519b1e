"""A base and its adapter over several devices: what Megatron-Core is imported for, and only here and in the trainer."""

import warnings

# Transformer Engine and Apex are not needed; saying so five times is not either.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.core  # noqa: F401 # pyright: ignore[reportUnusedImport]
