"""Makes the demo's T5 base, of the same text and with the same tokenizer as the Llama.

Run by `make demo-base BASE=t5`. Three kinds of rows: a document's beginning as source and what follows as target (T5's
prefix language modelling), a passage with tokens left out or wrong as source and the whole passage as target
(denoising), and, at first, phrases of random tokens to be copied. In the second phase tickets below an instruction too.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from quiver_demo.pretrain.induction_init_t5 import init_induction_heads
from quiver_demo.pretrain.phases import Recipe, Windows, make_folder, model_card
from quiver_demo.tokenizer import END_OF_TEXT_ID
from quiver_peft.base.families import T5_FAMILIES
from quiver_peft.base.t5 import T5Base
from quiver_peft.model import T5

HF_CONFIG: dict[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "is_encoder_decoder": True,
    "vocab_size": 2048,
    "d_model": 192,
    "d_kv": 32,
    "d_ff": 384,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.0,
    "tie_word_embeddings": True,
    "eos_token_id": END_OF_TEXT_ID,
    "pad_token_id": END_OF_TEXT_ID,
    "decoder_start_token_id": END_OF_TEXT_ID,
    "dtype": "float32",
}
RECIPE = Recipe(sequences=16, sequence_tokens=256, copy_steps=400, copies=4)
DENOISED = 4  # sequences of a step
NOISE = 0.1  # share of a denoised source's tokens that are wrong


def noisy(rows: Tensor, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Some tokens replaced by random ones. rows: [B, S]."""
    wrong = torch.rand(rows.shape, generator=generator) < NOISE
    return torch.where(wrong, torch.randint(vocab_size, rows.shape, generator=generator), rows)


def sources_and_targets(
    windows: Windows, recipe: Recipe, step: int, stream: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The rows of a step: sources [B, S] and targets [B, N], S + N = recipe.sequence_tokens."""
    length = recipe.sequence_tokens
    split = int(torch.randint(3 * length // 8, 5 * length // 8 + 1, (), generator=generator))
    shorter = min(split, length - split)
    num_copies = recipe.copies if step < recipe.copy_steps else 0
    rows = windows.take(recipe.sequences - DENOISED - num_copies)[:, :length]
    passages = windows.take(DENOISED)[:, :shorter]
    phrases = stream[torch.randint(len(stream), (num_copies, shorter), generator=generator)].long()
    same = torch.cat((passages, phrases))
    sources = torch.cat((noisy(passages, int(stream.max()) + 1, generator), phrases))
    return (
        torch.cat((rows[:, :split], F.pad(sources, (0, split - shorter), value=END_OF_TEXT_ID))),
        torch.cat((rows[:, split:], F.pad(same, (0, length - split - shorter), value=END_OF_TEXT_ID))),
    )


def text_loss(model: T5, stream: Tensor, recipe: Recipe) -> Callable[[int], Tensor]:
    """Prediction of the targets."""
    generator = torch.Generator().manual_seed(recipe.seed)
    windows = Windows(stream, recipe.sequence_tokens, generator)

    def loss_at(step: int) -> Tensor:
        sources, targets = sources_and_targets(windows, recipe, step, stream, generator)
        starts = F.pad(targets[:, :-1], (1, 0), value=model.base.config.start_token_id)
        return F.cross_entropy(model(sources, starts).flatten(0, 1), targets.flatten())

    return loss_at


def fresh_model() -> T5:
    """Untrained, with the beginnings of a copying circuit."""
    base = T5Base(T5_FAMILIES["t5"].read_config(HF_CONFIG))
    init_induction_heads(base)
    return T5(base)


def make_base(folder: Path, recipe: Recipe, num_characters: int) -> None:
    """Write the whole Hugging Face folder."""
    card = partial(model_card, "T5", "quiver_demo.pretrain.t5", "make demo-base BASE=t5")
    make_folder(folder, HF_CONFIG, fresh_model, text_loss, recipe, num_characters, card)


def main(
    folder: Annotated[Path, typer.Argument(help="Where the Hugging Face folder is written.")],
    steps: Annotated[int, typer.Option(help="Steps of the first phase, of 4096 tokens.")] = RECIPE.steps,
    megabytes: Annotated[float, typer.Option(help="How much text to generate.")] = 14.5,
) -> None:
    """Make the demo's T5 base from nothing."""
    make_base(folder, replace(RECIPE, steps=steps), int(megabytes * 1e6))


if __name__ == "__main__":
    typer.run(main)
