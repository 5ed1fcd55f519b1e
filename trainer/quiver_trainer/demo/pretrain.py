"""Makes the demo's base: a small Llama, trained from nothing on generated shop texts and Python's own documentation.

Run by `make demo-base`. Seeded: the same machine, Python and torch give the same folder. About 18 minutes on two cores.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from quiver_peft.base.checkpoint import save_checkpoint
from quiver_peft.base.families import FAMILIES
from quiver_peft.base.gpt import GPTBase
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.demo.corpus import corpus_documents
from quiver_trainer.demo.head_start import give_head_start
from quiver_trainer.demo.muon import Muon
from quiver_trainer.demo.tokenizer import END_OF_TEXT_ID, write_tokenizer

HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": END_OF_TEXT_ID,
    "eos_token_id": END_OF_TEXT_ID,
    "pad_token_id": END_OF_TEXT_ID,
    "dtype": "float32",
}


@dataclass(frozen=True)
class Recipe:
    """How long and how fast the base learns. Learning rates are peaks: linear warm-up, then linear decay to zero."""

    steps: int = 1200
    sequences: int = 16
    repeat_steps: int = 500  # while in these first steps `repeats` of the sequences are a random phrase over and over
    repeats: int = 2
    sequence_tokens: int = 256
    muon_lr: float = 0.02
    adam_lr: float = 0.005
    warmup_steps: int = 40
    weight_decay: float = 0.02
    seed: int = 7


def token_stream(tokenizer: Tokenizer, texts: Iterator[str]) -> Tensor:
    """All documents one after the other, each closed by the end-of-text token. [number of tokens] int16."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text)
        ids.append(END_OF_TEXT_ID)
    return torch.tensor(ids, dtype=torch.int16)


def repeated_phrases(stream: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Tokens drawn from the stream one by one, repeated until the row is full: only copying predicts them.

    stream: [number of tokens] -> [count, length] int64.
    """
    rows: list[Tensor] = []
    for _ in range(count):
        size = int(torch.randint(8, 100, (), generator=generator))
        phrase = stream[torch.randint(len(stream), (size,), generator=generator)].long()
        rows.append(phrase.repeat(length // size + 1)[:length])
    return torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.long)


def optimisers(base: GPTBase, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which learns from fewer tokens; AdamW for the rest."""
    matrices = [linear.weight for linear in base.linears()]
    inner = {id(weight) for weight in matrices}
    others = [parameter for parameter in base.parameters() if id(parameter) not in inner]
    muon = Muon(matrices, recipe.muon_lr, recipe.weight_decay)
    return [muon, torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)]


def rate_factor(step: int, recipe: Recipe) -> float:
    """The share of the peak learning rate at `step`."""
    return min((step + 1) / recipe.warmup_steps, (recipe.steps - step) / (recipe.steps - recipe.warmup_steps))


def train(base: GPTBase, stream: Tensor, recipe: Recipe) -> float:
    """One pass over shuffled windows of the stream; returns the mean loss of the last 50 steps, in nats per token."""
    generator = torch.Generator().manual_seed(recipe.seed)
    windows = stream[: (len(stream) - 1) // recipe.sequence_tokens * recipe.sequence_tokens + 1]
    starts = torch.randperm(len(windows) // recipe.sequence_tokens, generator=generator) * recipe.sequence_tokens
    opts = optimisers(base, recipe)
    losses: list[float] = []
    given = 0  # windows
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("pre-training", total=recipe.steps, loss="")
        for step in range(recipe.steps):
            num_repeats = recipe.repeats if step < recipe.repeat_steps else 0
            chosen = starts[torch.arange(given, given + recipe.sequences - num_repeats) % len(starts)]
            given += len(chosen)
            rows = windows[chosen[:, None] + torch.arange(recipe.sequence_tokens + 1)].long()
            repeats = repeated_phrases(stream, num_repeats, recipe.sequence_tokens + 1, generator)
            rows = torch.cat((rows, repeats))
            losses.append(_step(base, rows, opts, rate_factor(step, recipe), recipe))
            progress.update(task, advance=1, loss=f"loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")
    return sum(losses[-50:]) / len(losses[-50:])


def _step(base: GPTBase, rows: Tensor, opts: list[torch.optim.Optimizer], factor: float, recipe: Recipe) -> float:
    """rows: [B, S + 1] token ids."""
    for opt, peak in zip(opts, (recipe.muon_lr, recipe.adam_lr), strict=True):
        opt.zero_grad()
        for group in opt.param_groups:
            group["lr"] = peak * factor
    logits = base.logits(base(rows[:, :-1]))
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(base.parameters(), 1.0)
    for opt in opts:
        opt.step()
    return loss.item()


def model_card(loss: float, num_tokens: int, seconds: float, num_parameters: int, seed: int) -> str:
    """README.md of the folder."""
    return f"""# Quiver's demo base

A {num_parameters / 1e6:.1f} M-parameter Llama that stands for a company's own language model in
Quiver's demo. It knows the texts of a fictional shop, a little English prose, and how to repeat names and numbers; it
does no task by itself. Do not use it for anything else.

- Made by `make demo-base` (`quiver_trainer.demo.pretrain`, seed {seed}); nothing was downloaded.
- Text: generated documents of the shop's world (`quiver_trainer.demo.corpus`) and the documentation of Python's
  standard library (PSF licence), as found in the running interpreter.
- {num_tokens / 1e6:.1f} M training tokens, {seconds / 60:.0f} minutes on two CPU cores, final loss {loss:.3f} nats
  per token.
- Plain Hugging Face folder, fp32; `transformers.AutoModelForCausalLM.from_pretrained` loads it.
"""


def make_base(folder: Path, recipe: Recipe, num_characters: int) -> None:
    """Write the whole Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, corpus_documents(recipe.seed, num_characters // 4))
    (folder / "config.json").write_text(json.dumps(HF_CONFIG, indent=2) + "\n")
    stream = token_stream(Tokenizer(folder), corpus_documents(recipe.seed, num_characters))
    torch.manual_seed(recipe.seed)
    family = FAMILIES["llama"]
    base = GPTBase(family.read_config(HF_CONFIG))
    give_head_start(base)
    started = time.monotonic()
    loss = train(base, stream, recipe)
    seconds = time.monotonic() - started
    save_checkpoint(base, folder, family.renames(base.config), torch.float32)
    num_parameters = sum(parameter.numel() for parameter in base.parameters())
    num_tokens = recipe.steps * recipe.sequences * recipe.sequence_tokens
    (folder / "README.md").write_text(model_card(loss, num_tokens, seconds, num_parameters, recipe.seed))
    print(f"wrote {folder}: loss {loss:.3f}, {num_tokens} tokens in {seconds:.0f} s, stream of {len(stream)} tokens")


def main(
    folder: Annotated[Path, typer.Argument(help="Where the Hugging Face folder is written.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps of 4096 tokens.")] = Recipe.steps,
    megabytes: Annotated[float, typer.Option(help="How much text to generate.")] = 14.5,
) -> None:
    """Make the demo's base model from nothing: about 18 minutes on two CPU cores."""
    make_base(folder, Recipe(steps=steps), int(megabytes * 1e6))


if __name__ == "__main__":
    typer.run(main)
