"""What both demo bases share: how long and fast they learn, their text as tokens, and the loop of the steps.

Two phases: text alone, then text beside tickets with an instruction (`instructions.py`), at lower rates.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from quiver_demo.corpus import corpus_documents
from quiver_demo.instructions import instructed_tickets
from quiver_demo.pretrain.muon import Muon
from quiver_demo.tokenizer import END_OF_TEXT_ID, write_tokenizer
from quiver_peft.base.base import Base
from quiver_peft.base.checkpoint import save_checkpoint
from quiver_peft.model import AnyModel
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.data.batching import collate
from quiver_trainer.data.jsonl import Encoder, JsonlRow
from quiver_trainer.loop.metrics import completion_loss, exact_match

ModelT = TypeVar("ModelT", bound=AnyModel)


INSTRUCTED_ROWS = 16  # of a step of the second phase, beside half as many sequences of text as before


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a base learns. Learning rates are peaks: linear warm-up, then linear decay to zero."""

    steps: int = 1200
    instructed_steps: int = 500  # of the second phase
    instructed_characters: int = 1_500_000  # of its text, which the first phase had not
    num_set_aside: int = 200  # instructed tickets to measure on
    sequences: int = 16
    sequence_tokens: int = 256
    copy_steps: int = 500  # while in these first steps `copies` of the sequences can be learnt by copying alone
    copies: int = 2
    muon_lr: float = 0.02
    adam_lr: float = 0.005
    warmup_steps: int = 40
    weight_decay: float = 0.02
    seed: int = 7

    def instructed(self) -> "Recipe":
        """That of the second phase."""
        return replace(
            self,
            steps=self.instructed_steps,
            sequences=self.sequences // 2,
            copy_steps=0,
            muon_lr=0.5 * self.muon_lr,
            adam_lr=0.4 * self.adam_lr,
            warmup_steps=max(1, self.warmup_steps // 2),
            seed=self.seed + 1,
        )


@dataclass(frozen=True)
class Outcome:
    """What came out. text_loss: of the first phase's end. answered: share of the instructed tickets set aside."""

    text_loss: float
    answered: float
    seconds: float


def token_stream(tokenizer: Tokenizer, texts: Iterator[str]) -> Tensor:
    """All documents one after the other, each closed by the end-of-text token. [number of tokens] int16."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text)
        ids.append(END_OF_TEXT_ID)
    return torch.tensor(ids, dtype=torch.int16)


class Windows:
    """A stream cut into windows of the same length, given out in a seeded random order, again and again."""

    def __init__(self, stream: Tensor, length: int, generator: torch.Generator) -> None:
        """stream: [number of tokens]."""
        self._stream = stream
        self._length = length
        count = (len(stream) - 1) // length
        self._starts = torch.randperm(count, generator=generator) * length
        self._num_given = 0

    def take(self, count: int) -> Tensor:
        """The next windows, each with the token after it, [count, length + 1] int64."""
        chosen = self._starts[torch.arange(self._num_given, self._num_given + count) % len(self._starts)]
        self._num_given += count
        return self._stream[chosen[:, None] + torch.arange(self._length + 1)].long()


def make_optimizers(base: Base, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which learns from fewer tokens; AdamW for the rest."""
    matrices = [linear.weight for linear in base.linears()]
    inner = {id(weight) for weight in matrices}
    others = [parameter for parameter in base.parameters() if id(parameter) not in inner]
    muon = Muon(matrices, recipe.muon_lr, recipe.weight_decay)
    return [muon, torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)]


def rate_factor(step: int, recipe: Recipe) -> float:
    """The share of the peak learning rate at `step`."""
    return min((step + 1) / recipe.warmup_steps, (recipe.steps - step) / (recipe.steps - recipe.warmup_steps))


def train(base: Base, recipe: Recipe, loss_at: Callable[[int], Tensor]) -> float:
    """All steps; returns the mean loss of the last 50, in nats per token. loss_at: a step's loss, a scalar."""
    opts = make_optimizers(base, recipe)
    losses: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("pre-training", total=recipe.steps, loss="")
        for step in range(recipe.steps):
            for opt, peak in zip(opts, (recipe.muon_lr, recipe.adam_lr), strict=True):
                opt.zero_grad()
                for group in opt.param_groups:
                    group["lr"] = peak * rate_factor(step, recipe)
            loss = loss_at(step)
            loss.backward()
            nn.utils.clip_grad_norm_(base.parameters(), 1.0)
            for opt in opts:
                opt.step()
            losses.append(loss.item())
            progress.update(task, advance=1, loss=f"loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")
    return sum(losses[-50:]) / len(losses[-50:])


TextLoss = Callable[
    [ModelT, Tensor, Recipe], Callable[[int], Tensor]
]  # of a model on a stream: a step's loss, a scalar


def teach_instructions(model: ModelT, tokenizer: Tokenizer, recipe: Recipe, text_loss: TextLoss[ModelT]) -> float:
    """The second phase: the answers to instructed tickets, and further text beside them.

    Returns the share of the tickets set aside that the model then answers exactly.
    """
    encoder = Encoder(tokenizer, END_OF_TEXT_ID, model.base.config.vocab_size, None)
    rows = ({"prompt": prompt, "completion": answer} for prompt, answer in instructed_tickets(recipe.seed))
    samples = (encoder.encode(JsonlRow(row, Path("instructions"), 1))[0] for row in rows)
    set_aside = list(islice(samples, recipe.num_set_aside))
    text_loss_at = text_loss(
        model, token_stream(tokenizer, corpus_documents(recipe.seed, recipe.instructed_characters)), recipe
    )

    def loss_at(step: int) -> Tensor:
        return text_loss_at(step) + completion_loss(model, collate(list(islice(samples, INSTRUCTED_ROWS)), model))

    train(model.base, recipe, loss_at)
    return exact_match(model, tokenizer, set_aside, None)


def make_folder(
    folder: Path,
    hf_config: Mapping[str, Any],
    new_model: Callable[[], ModelT],
    text_loss: TextLoss[ModelT],
    recipe: Recipe,
    num_characters: int,
    card: Callable[[Outcome, Base, Recipe], str],
) -> None:
    """Write a whole Hugging Face folder. card: README.md from what came out, the base and the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, corpus_documents(recipe.seed, num_characters // 4))
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
    tokenizer = Tokenizer(folder)
    stream = token_stream(tokenizer, corpus_documents(recipe.seed, num_characters))
    torch.manual_seed(recipe.seed)
    model = new_model()
    started = time.monotonic()
    loss = train(model.base, recipe, text_loss(model, stream, recipe))
    answered = teach_instructions(model, tokenizer, recipe.instructed(), text_loss)
    outcome = Outcome(loss, answered, time.monotonic() - started)
    save_checkpoint(model.base, folder, model.base.tensor_mappings(), torch.float32)
    (folder / "README.md").write_text(card(outcome, model.base, recipe))
    print(f"wrote {folder}: {outcome}, stream of {len(stream)} tokens")


def model_card(what: str, module: str, command: str, outcome: Outcome, base: Base, recipe: Recipe) -> str:
    """README.md of the folder."""
    num_parameters = sum(parameter.numel() for parameter in base.parameters())
    num_tokens = sum(phase.steps * phase.sequences * phase.sequence_tokens for phase in (recipe, recipe.instructed()))
    num_instructed = recipe.instructed_steps * INSTRUCTED_ROWS
    return f"""# Quiver's demo base

A {num_parameters / 1e6:.1f} M-parameter {what} that stands for a company's own language model in
Quiver's demo. It knows the texts of a fictional shop, a little English prose, how to repeat names and numbers, and how
to follow an instruction of a few kinds before a ticket; it does no task of the demo by itself. Do not use it for
anything else.

- Made by `{command}` (`{module}`, seed {recipe.seed}); nothing was downloaded.
- Text: generated documents of the shop's world (`quiver_demo.corpus`) and the documentation of Python's
  standard library (PSF licence), as found in the running interpreter; then tickets below an instruction, with the
  answer it asks for (`quiver_demo.instructions`).
- {num_tokens / 1e6:.1f} M training tokens of text ({outcome.text_loss:.3f} nats per token at the end of the first
  phase) and {num_instructed:,} instructed tickets; {outcome.answered:.0%} of {recipe.num_set_aside} others are answered
  exactly. {outcome.seconds / 60:.0f} minutes on a CPU.
- Plain Hugging Face folder, fp32; `transformers` loads it.
"""
