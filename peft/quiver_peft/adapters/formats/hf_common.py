"""What the forms of Hugging Face PEFT share: the prefix of tensor names, the task, names of target modules."""

from collections.abc import Mapping, Sequence
from typing import Any

from quiver_peft.adapters.methods.targets import matches_module
from quiver_peft.base.base import Base
from quiver_peft.errors import AdapterError, BaseMismatchError

PREFIX = "base_model.model."
_TASKS = {"CAUSAL_LM": "a decoder-only base", "SEQ_2_SEQ_LM": "an encoder-decoder"}


def check_task_type(base: Base, config: Mapping[str, Any]) -> None:
    """Raises AdapterError for a task that is not generation; BaseMismatchError for one of another kind of base."""
    task = config.get("task_type")
    if task is None or task == base.hf_task_type:
        return
    if isinstance(task, str) and task in _TASKS:
        raise BaseMismatchError(
            f"adapter_config.json: task_type = {task!r} is made for {_TASKS[task]}; this base is "
            f"{_TASKS[base.hf_task_type]}"
        )
    raise AdapterError(f"adapter_config.json: task_type = {task!r} is not supported; use {base.hf_task_type}")


def shortest_names(chosen: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Module endings where they mean exactly the chosen modules, else their full names."""
    for depth in (1, 2):
        endings = sorted({".".join(module.split(".")[-depth:]) for module in chosen})
        if [m for m in modules if matches_module(endings, m)] == [m for m in modules if m in set(chosen)]:
            return endings
    return sorted(chosen)
