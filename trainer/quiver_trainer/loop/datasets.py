"""Reads a run's datasets as samples that fit the model."""

from collections.abc import Sequence

from quiver_peft import T5
from quiver_peft.chat_template import read_chat_template
from quiver_peft.model import AnyModel
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.data.dataset import Dataset
from quiver_trainer.data.jsonl import Encoder
from quiver_trainer.errors import ConfigError
from quiver_trainer.recipe.config import TrainConfig, WeightedFile
from quiver_trainer.reports.terminal import Reporter


def read_datasets(config: TrainConfig, model: AnyModel, tokenizer: Tokenizer, reporter: Reporter) -> dict[str, Dataset]:
    """The datasets "train" and, if configured, "validation"; reports how many rows were skipped.

    Raises ConfigError, DataError.
    """
    if not model.base.config.eos_token_ids:
        raise ConfigError(f"{config.base}: config.json names no eos_token_id, so no answer could learn to end")
    room = _max_length(config, model)
    encoder = Encoder(
        tokenizer,
        model.base.config.eos_token_ids[0],
        model.base.config.vocab_size,
        room,
        corrupt_spans=isinstance(model, T5),
        chat_template=read_chat_template(config.base),
    )
    datasets = {"train": _read(config.data.train_files, encoder, config, reporter)}
    if config.data.validation is not None:
        files = [WeightedFile(path=config.data.validation)]
        datasets["validation"] = _read(files, encoder, config, reporter)
    return datasets


def _read(files: Sequence[WeightedFile], encoder: Encoder, config: TrainConfig, reporter: Reporter) -> Dataset:
    skip = config.data.too_long == "skip"
    data = Dataset()
    for file in files:
        with reporter.reading(file.path) as on_row:
            data.add_file(file.path, file.weight, encoder, skip_too_long=skip, on_row=on_row)
        read = data.files[-1]
        if read.num_skipped:
            reporter.warn(
                f"{file.path}: left out {read.num_skipped} of {read.num_skipped + len(read.samples)} rows that are "
                f"longer than {encoder.max_length} tokens, the first in line {read.first_skipped}"
            )
    return data


def _max_length(config: TrainConfig, model: AnyModel) -> int | None:
    """Most tokens of a sample; None: no limit."""
    room = model.max_tokens
    max_length = config.data.max_length or room
    if max_length is not None and room is not None and max_length > room:
        num_virtual = model.num_virtual_in("")
        virtual = f" beside {num_virtual} virtual tokens" if num_virtual else ""
        raise ConfigError(f"data.max_length: {max_length} is more than the {room} tokens of the base{virtual}")
    return max_length
