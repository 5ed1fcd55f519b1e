"""One side of a training measurement, in a process of its own: tokens per second after a warm-up, and its peak memory.

    python -m bench.training_side SIDE KIND BASE STEPS [RUNS]      SIDE: quiver or hf; KIND: lora or full

Prints one line of JSON. Rows are random ids, the same for both sides; both sort them by length into batches.
RUNS of quiver: that many LoRAs at once on one base in memory.
"""

import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from quiver_trainer.data.dataset import Dataset, read_dataset
from quiver_trainer.data.jsonl import Encoder, Sample

VOCABULARY = 2000
LORA_RANK = 16
RATE = 1e-4
WARM_UP_STEPS = 2


def make_samples(count: int, seed: int = 0) -> list[Sample]:
    """Prompts of 32 to 128 tokens with completions of 8 to 24."""
    generator = random.Random(seed)

    def ids(shortest: int, longest: int) -> list[int]:
        return [generator.randrange(3, VOCABULARY) for _ in range(generator.randint(shortest, longest))]

    prompts = [ids(32, 128) for _ in range(count)]
    return [Sample([*prompt, *ids(8, 24)], len(prompt)) for prompt in prompts]


class Clock:
    """Counts tokens and seconds of the steps after the warm-up."""

    def __init__(self) -> None:
        self.steps = 0
        self.tokens = 0
        self._started = 0.0
        self._ended = 0.0

    def step(self, num_tokens: int, warm_up_steps: int) -> None:
        """After each step."""
        self.steps += 1
        self._ended = time.perf_counter()
        if self.steps == warm_up_steps:
            self._started = self._ended
        elif self.steps > warm_up_steps:
            self.tokens += num_tokens

    def result(self) -> dict[str, float]:
        """JSON-ready."""
        seconds = self._ended - self._started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"tokens_per_second": self.tokens / seconds, "seconds": seconds, "peak_bytes": peak}


def run_quiver(kind: str, base: Path, steps: int, num_runs: int, rows: int, rank: int) -> dict[str, float]:
    """`num_runs` runs of so many steps each, all at once."""
    from quiver_peft import GPT, LoraPEFTConfig
    from quiver_peft.tokenizer import Tokenizer
    from quiver_trainer import DataSection, OptimizerSection, TrainConfig
    from quiver_trainer.loop.loop import train
    from quiver_trainer.loop.run import Run
    from quiver_trainer.loop.run_directory import RunDirectory
    from quiver_trainer.reports.terminal import Reporter

    clock = Clock()

    class Counting(Reporter):
        def step(self, name: str, loss: float, num_tokens: int, seconds: float) -> None:
            clock.step(num_tokens, WARM_UP_STEPS * num_runs)

    reporter = Counting(quiet=True)
    shared, tokenizer = GPT.from_pretrained(base).base, Tokenizer(base)
    with tempfile.TemporaryDirectory() as folder:
        runs: list[Run] = []
        for i in range(num_runs):
            model = GPT(shared)
            if kind == "lora":
                model.add_adapter(LoraPEFTConfig(adapter_dim=rank, target_modules=["all"], variant="canonical"))
            config = TrainConfig(
                base=base,
                output=Path(folder) / f"run-{i}",
                data=DataSection(train=Path("none")),
                optimizer=OptimizerSection(learning_rate=RATE),
                batch_size=rows,
                epochs=1000,
                max_steps=steps + WARM_UP_STEPS,
                checkpoint_interval_steps=10**6,
            )
            RunDirectory(config.output).folder.mkdir()
            encoder = Encoder(tokenizer, 1, VOCABULARY, None)
            runs.append(
                Run(config, model, tokenizer, {"train": _dataset(Path(folder), encoder, rows * steps, i)}, {}, reporter)
            )
            runs[-1].save = lambda: None  # the other side writes nothing either
        train(runs, reporter, pass_tokens=10**9, should_stop=lambda: False, on_over=lambda run: None)
    return clock.result()


def _dataset(folder: Path, encoder: Encoder, count: int, seed: int) -> Dataset:
    """Through a file, as rows come to a run."""
    path = folder / f"{seed}.jsonl"
    rows = [
        {
            "prompt_tokens": sample.tokens[: sample.num_prompt_tokens],
            "completion_tokens": sample.tokens[sample.num_prompt_tokens :],
        }
        for sample in make_samples(count, seed)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_dataset(path, encoder)


def run_hf(kind: str, base: Path, steps: int, rows: int) -> dict[str, float]:
    """transformers' Trainer, with Hugging Face PEFT where a LoRA is trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    clock = Clock()
    sizes: list[int] = []

    def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(sample["input_ids"]) for sample in samples)
        ids = torch.zeros(len(samples), longest, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, sample in enumerate(samples):
            length = len(sample["input_ids"])
            ids[i, :length] = torch.tensor(sample["input_ids"])
            mask[i, :length] = 1
            labels[i, sample["prompt"] : length] = ids[i, sample["prompt"] : length]
        sizes.append(int(mask.sum()))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    class Counting(TrainerCallback):
        def on_step_end(self, *arguments: Any, **others: Any) -> None:
            clock.step(sizes[clock.steps], WARM_UP_STEPS)

    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    model.config.use_cache = False
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules="all-linear"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=rows,
            max_steps=steps + WARM_UP_STEPS,
            learning_rate=RATE,
            optim="adamw_torch_fused",
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        )
        data: Any = [
            {"input_ids": sample.tokens, "prompt": sample.num_prompt_tokens}
            for sample in make_samples(rows * (steps + WARM_UP_STEPS))
        ]
        Trainer(model, arguments, data_collator=collate, train_dataset=data, callbacks=[Counting()]).train()
    return clock.result()


def main(side: str, kind: str, base: str, steps: str, rows: str, runs: str = "1", rank: str = str(LORA_RANK)) -> None:
    """The command line."""
    if side == "hf":
        result = run_hf(kind, Path(base), int(steps), int(rows))
    else:
        result = run_quiver(kind, Path(base), int(steps), int(runs), int(rows), int(rank))
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
