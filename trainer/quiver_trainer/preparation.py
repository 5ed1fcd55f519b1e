"""What a run reads before it can begin: its rows, as samples that fit the model."""

from quiver_peft.model import AnyModel
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.config import TrainConfig
from quiver_trainer.data import Dataset, read_dataset
from quiver_trainer.errors import ConfigError
from quiver_trainer.report import Reporter


def read_datasets(config: TrainConfig, model: AnyModel, tokenizer: Tokenizer, reporter: Reporter) -> dict[str, Dataset]:
    """ "train" and, where there is one, "validation"; says how many rows were left out.

    Raises ConfigError, DataError.
    """
    if not model.base.config.eos_token_ids:
        raise ConfigError(f"{config.base}: config.json names no eos_token_id, so no answer could learn to end")
    max_length = _max_length(config, model)
    datasets: dict[str, Dataset] = {}
    for name, path in (("train", config.data.train), ("validation", config.data.validation)):
        if path is None:
            continue
        datasets[name] = data = read_dataset(
            path,
            tokenizer,
            eos=model.base.config.eos_token_ids[0],
            max_length=max_length,
            skip_too_long=config.data.too_long == "skip",
        )
        if data.num_skipped:
            reporter.warn(
                f"{path}: left out {data.num_skipped} of {data.num_skipped + len(data.samples)} rows that are "
                f"longer than {max_length} tokens, the first in line {data.first_skipped}"
            )
    return datasets


def _max_length(config: TrainConfig, model: AnyModel) -> int | None:
    """Most tokens of a row; None: no limit."""
    room = model.max_tokens
    max_length = config.data.max_length or room
    if max_length is not None and room is not None and max_length > room:
        num_virtual = model.num_virtual_in("")
        virtual = f" beside {num_virtual} virtual tokens" if num_virtual else ""
        raise ConfigError(f"data.max_length: {max_length} is more than the {room} tokens of the base{virtual}")
    return max_length
