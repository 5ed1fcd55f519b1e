"""Makes the demo's base: a small Llama, trained from nothing on generated shop texts and Python's own documentation,
then on tickets below an instruction.

Run by `make demo-base`. Seeded: the same machine, Python and torch give the same folder. About half an hour.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from quiver_demo.pretrain.induction_init import init_induction_heads
from quiver_demo.pretrain.phases import Recipe, Windows, make_folder, model_card
from quiver_demo.tokenizer import END_OF_TEXT_ID
from quiver_peft.base.families import GPT_FAMILIES
from quiver_peft.base.gpt import GPTBase
from quiver_peft.model import GPT

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


def text_loss(model: GPT, stream: Tensor, recipe: Recipe) -> Callable[[int], Tensor]:
    """Next-token prediction on shuffled windows of the stream."""
    generator = torch.Generator().manual_seed(recipe.seed)
    windows = Windows(stream, recipe.sequence_tokens, generator)

    def loss_at(step: int) -> Tensor:
        num_repeats = recipe.copies if step < recipe.copy_steps else 0
        rows = windows.take(recipe.sequences - num_repeats)
        repeats = repeated_phrases(stream, num_repeats, recipe.sequence_tokens + 1, generator)
        rows = torch.cat((rows, repeats))
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    return loss_at


def fresh_model() -> GPT:
    """Untrained, with the beginnings of a copying circuit."""
    base = GPTBase(GPT_FAMILIES["llama"].read_config(HF_CONFIG))
    init_induction_heads(base)
    return GPT(base)


def make_base(folder: Path, recipe: Recipe, num_characters: int) -> None:
    """Write the whole Hugging Face folder."""
    card = partial(model_card, "Llama", "quiver_demo.pretrain.gpt", "make demo-base")
    make_folder(folder, HF_CONFIG, fresh_model, text_loss, recipe, num_characters, card)


def main(
    folder: Annotated[Path, typer.Argument(help="Where the Hugging Face folder is written.")],
    steps: Annotated[int, typer.Option(help="Steps of the first phase, of 4096 tokens.")] = Recipe.steps,
    megabytes: Annotated[float, typer.Option(help="How much text to generate.")] = 14.5,
) -> None:
    """Make the demo's base model from nothing: about half an hour."""
    make_base(folder, Recipe(steps=steps), int(megabytes * 1e6))


if __name__ == "__main__":
    typer.run(main)
