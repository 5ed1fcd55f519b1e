"""`Trainer`: `fit` trains a model by a configuration and writes the result, `predict` answers prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quiver_peft.model import AnyModel
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.config import TrainConfig
from quiver_trainer.curve import draw_learning_curve
from quiver_trainer.data import Dataset, read_dataset
from quiver_trainer.errors import ConfigError
from quiver_trainer.loop import TrainingLoop, trainable
from quiver_trainer.predict import predict_texts
from quiver_trainer.progress import to_jsonl
from quiver_trainer.report import Reporter
from quiver_trainer.result import training_record, write_base
from quiver_trainer.settings import run_settings
from quiver_trainer.workplace import METRICS_FILE, Workplace

CURVE_FILE = "learning_curve.png"


@dataclass(frozen=True)
class TrainingResult:
    """revision: of the adapter, "" after full fine-tuning. record: what the artefact says of its training.

    was_finished: nothing was trained, the result was there already.
    """

    revision: str
    record: Mapping[str, Any]
    was_finished: bool = False


class Trainer:
    """Trains what of a model is trainable: its adapter, or all of it.

    config: its `adapter`, `device` and `dtype` are for whoever makes the model; here the model's own adapter counts.
    restart: forget an unfinished or finished run in the output folder. should_stop: asked before each step.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        restart: bool = False,
        reporter: Reporter | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config = config
        self._restart = restart
        self._reporter = reporter or Reporter()
        self._should_stop = should_stop

    def fit(self, model: AnyModel) -> TrainingResult:
        """Train, or go on with an interrupted training of the same settings, and write the output folder in one step.

        With an adapter only its weights are saved; without, a Hugging Face folder of the fine-tuned base.
        Seeds torch's global random generator. Raises ConfigError, DataError, TrainingError, TrainingInterrupted.
        """
        workplace = Workplace(self._config.output)
        methods = () if model.adapter is None else model.adapter.configs
        settings = run_settings(self._config, model.base.fingerprint, [method.to_dict() for method in methods])
        with workplace.occupied():
            start = workplace.decide_start(settings, restart=self._restart)
            if start.kind == "finished":
                return TrainingResult(start.revision, start.record, was_finished=True)
            tokenizer = Tokenizer(self._config.base)
            datasets = self._read_data(model, tokenizer)
            torch.manual_seed(self._config.seed)
            loop = TrainingLoop(
                self._config, model, tokenizer, datasets["train"], datasets.get("validation"), workplace, self._reporter
            )
            if start.kind == "resume":
                loop.resume()
                self._reporter.note(f"going on after step {loop.progress.step} of {loop.num_steps}")
            else:
                workplace.clear()
            loop.run(settings, self._should_stop)
            record = training_record(
                loop.progress, settings, datasets, sum(p.numel() for p in trainable(model).values())
            )
            revision = self._write(model, tokenizer, loop, record)
            workplace.remove()
        return TrainingResult(revision, record)

    def predict(self, model: AnyModel, prompts: Sequence[str], *, max_new_tokens: int = 64) -> list[str]:
        """The model's greedy answer to each prompt, without the prompt. Raises DataError for a prompt too long."""
        return predict_texts(model, Tokenizer(self._config.base), prompts, max_new_tokens=max_new_tokens)

    def _read_data(self, model: AnyModel, tokenizer: Tokenizer) -> dict[str, Dataset]:
        """ "train" and, where there is one, "validation"; says how many rows were left out."""
        config, base = self._config.data, model.base.config
        if not base.eos_token_ids:
            raise ConfigError(
                f"{self._config.base}: config.json names no eos_token_id, so no answer could learn to end"
            )
        room = model.max_tokens
        max_length = config.max_length or room
        if max_length is not None and room is not None and max_length > room:
            num_virtual = model.num_virtual_in("")
            virtual = f" beside {num_virtual} virtual tokens" if num_virtual else ""
            raise ConfigError(f"data.max_length: {max_length} is more than the {room} tokens of the base{virtual}")
        datasets: dict[str, Dataset] = {}
        for name, path in (("train", config.train), ("validation", config.validation)):
            if path is None:
                continue
            datasets[name] = data = read_dataset(
                path,
                tokenizer,
                eos=base.eos_token_ids[0],
                max_length=max_length,
                skip_too_long=config.too_long == "skip",
            )
            if data.num_skipped:
                self._reporter.warn(
                    f"{path}: left out {data.num_skipped} of {data.num_skipped + len(data.samples)} rows that are "
                    f"longer than {max_length} tokens, the first in line {data.first_skipped}"
                )
        return datasets

    def _write(self, model: AnyModel, tokenizer: Tokenizer, loop: TrainingLoop, record: Mapping[str, Any]) -> str:
        """Replace the output folder; returns the adapter's revision."""
        config, progress = self._config, loop.progress
        what = "whole base" if model.adapter is None else "adapter"
        matched = len(loop.measuring.match_samples) if loop.measuring else 0
        title = f"{config.output.name}: {what} trained on {config.base.name}"
        files = {
            CURVE_FILE: draw_learning_curve(progress, title, matched),
            METRICS_FILE: to_jsonl([*progress.train_records, *progress.validation_records]).encode(),
        }
        if model.adapter is None:
            write_base(model, config.base, config.output, record, files)
            return ""
        return model.save_adapter(
            config.output,
            base_name=config.base.name,
            tokenizer_digest=tokenizer.digest,
            training=record,
            extra_files=files,
        )
