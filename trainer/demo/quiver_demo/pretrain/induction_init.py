"""Starts a new Llama with the beginnings of a copying circuit, so that a million tokens are enough to learn to copy.

From pure noise a model of this size has not learnt to repeat a name after four million tokens. Here two layers begin as
an induction circuit (Olsson et al. 2022, "In-context learning and induction heads"): a head of layer 0 looks one token
back and notes which token it saw; a head of layer 1 looks for the place whose note is the present token and proposes
the token that stands there. Training shapes these weights like any others. That structure in place of noise helps small
models to recall is from Trockman & Kolter 2023, "Mimetic initialization of self-attention layers".

The D features of the residual stream are shared out: feature 0 is the same for all tokens (heads without biases need a
constant to look at positions alone), then come the notes, then the token itself.
"""

import math

import torch
from torch import Tensor, nn

from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.layers import Attention

FIRST_TOKEN_FEATURE = 64
TOKEN_STD = 0.1
CONSTANT = 4 * TOKEN_STD
FINAL_NORM = 0.3  # keeps the first logits small, for the embedding is also the head
LOOK_BACK = 3.5  # query and key weights on the constant; a score of about 5 above the neighbours' after the norm
NUM_FAST_PAIRS = 3  # pairs of a head's features that turn fast enough to tell neighbours apart
SLOW_ANGLE = 1.6  # radians within `REACH` tokens; what turns less compares contents at any distance
REACH = 256
MATCH = 1.75  # query and key weights on notes and tokens
PROPOSAL = 3 * TOKEN_STD


@torch.no_grad()
def init_induction_heads(base: GPTBase) -> None:
    """Overwrites the embedding, all output projections and the first two attentions of a fresh base.

    Raises ValueError for a base without rotary positions or with fewer than two layers.
    """
    if base.rotary is None or len(base.layers) < 2:
        raise ValueError("a head start needs rotary positions and two layers")
    nn.init.normal_(base.embedding.weight, std=TOKEN_STD)
    base.embedding.weight[:, 0] = CONSTANT
    base.embedding.weight[:, 1:FIRST_TOKEN_FEATURE] = 0
    nn.init.constant_(base.norm.get_parameter("weight"), FINAL_NORM)
    attentions = [layer.get_submodule("attention") for layer in base.layers]
    for layer, attention in zip(base.layers, attentions, strict=True):
        assert isinstance(attention, Attention)
        for linear in (attention.out, layer.get_submodule("mlp").get_submodule("down")):
            nn.init.zeros_(linear.get_parameter("weight"))
    first, second = attentions[:2]
    assert isinstance(first, Attention) and isinstance(second, Attention)
    init_previous_token_head(first, base.rotary.frequencies)
    init_copy_head(second, base.rotary.frequencies)


def init_previous_token_head(attention: Attention, frequencies: Tensor) -> None:
    """One query head for each key head looks one token back, and writes a part of that token into the notes.

    The query is the key turned back by one position, so that their product is largest there.
    """
    half = attention.head_dim // 2
    for group, (query, key, value, out) in enumerate(_heads(attention)):
        for pair in range(NUM_FAST_PAIRS):
            angle = frequencies[pair].item()
            key[pair, 0] = LOOK_BACK
            query[pair, 0] = LOOK_BACK * math.cos(angle)
            query[pair + half, 0] = -LOOK_BACK * math.sin(angle)
        notes = _notes(attention, group)
        for feature, note in enumerate(notes):
            value[feature, FIRST_TOKEN_FEATURE - 1 + note] = 1
            out[note, feature] = TOKEN_STD


def init_copy_head(attention: Attention, frequencies: Tensor) -> None:
    """One query head for each key head compares the present token with the notes; the token found there is copied."""
    half = attention.head_dim // 2
    slow = [pair for pair in range(half) if frequencies[pair].item() * REACH < SLOW_ANGLE]
    for group, (query, key, value, out) in enumerate(_heads(attention)):
        for feature, note in zip(slow + [pair + half for pair in slow], _notes(attention, group), strict=False):
            query[feature, FIRST_TOKEN_FEATURE - 1 + note] = MATCH
            key[feature, note] = MATCH
        for feature in range(attention.head_dim):
            copied = FIRST_TOKEN_FEATURE + group * attention.head_dim + feature
            value[feature, copied] = 1
            out[copied, feature] = PROPOSAL


def _notes(attention: Attention, group: int) -> range:
    """The features of the residual stream that hold the notes of one key head."""
    start, end = attention.qkv.parts["k"]
    num_groups = (end - start) // attention.head_dim
    count = min(attention.head_dim, (FIRST_TOKEN_FEATURE - 1) // num_groups)
    return range(1 + group * count, 1 + (group + 1) * count)


def _heads(attention: Attention) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each key head, cleared and as views: its first query head, itself, its values, the columns of the output."""
    size = attention.head_dim
    queries, keys, values = (attention.qkv.weight[start:end] for start, end in attention.qkv.parts.values())
    num_groups = len(keys) // size
    heads_per_group = len(queries) // size // num_groups
    result: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for group in range(num_groups):
        head = group * heads_per_group
        own = slice(group * size, (group + 1) * size)
        asking = slice(head * size, (head + 1) * size)
        views = (queries[asking], keys[own], values[own], attention.out.weight[:, asking])
        for view in views[:3]:
            view.zero_()
        result.append(views)
    return result
