"""Limits on virtual tokens, shared by prompts and prefixes."""

from quiver_peft.base.base import Base
from quiver_peft.errors import AdapterError


def require_virtual_tokens(method: str, number: int) -> None:
    """Raises AdapterError for a number that is none."""
    if number < 1:
        raise AdapterError(f"{method}: virtual_tokens must be at least 1, not {number}")


def require_room(base: Base, num_virtual_tokens: int) -> None:
    """Raises AdapterError when virtual tokens would fill the context."""
    limit = base.config.max_positions
    if limit is not None and num_virtual_tokens > limit - 2:
        raise AdapterError(
            f"virtual_tokens: {num_virtual_tokens} leave no room for a prompt and an answer in the {limit} positions "
            "of this base"
        )
