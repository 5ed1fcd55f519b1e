"""Starts a new T5 with the beginnings of a copying circuit: what `head_start.py` does for a Llama, and why.

In a T5 the circuit lies across the two stacks. Two heads of the encoder look one token back, by their relative bias
alone, and note in each place which token stands before it. Cross-attention of the decoder's second layer looks for the
place whose note is the token just written, and proposes the token that stands there.
"""

import torch
from torch import nn

from quiver_peft.base.layers import Attention
from quiver_peft.base.t5 import CrossAttention, T5Base

FIRST_TOKEN_FEATURE = 64  # of the residual stream: 0 is the same for all tokens, then come the notes, then the token
TOKEN_STD = 0.1
CONSTANT = 4 * TOKEN_STD
NOTING_HEADS = 2
LOOK_BACK = 6.0  # the bias for the token before; all others have none
MATCH = 0.6  # query and key weights on tokens and notes; the score of a match is about 14, of another token within 3
PROPOSAL = 3 * TOKEN_STD


@torch.no_grad()
def init_induction_heads(base: T5Base) -> None:
    """Overwrites the embedding, all output projections, the encoder's bias and two attentions of a fresh base.

    Raises ValueError for a base of other sizes than the circuit needs.
    """
    config = base.config
    copied = config.hidden_size - FIRST_TOKEN_FEATURE
    if copied != 4 * config.head_dim or config.num_heads < 4 or config.num_layers < 2:
        raise ValueError("a head start needs two layers and four heads that together hold a token's features")
    nn.init.normal_(base.embedding.weight, std=TOKEN_STD)
    base.embedding.weight[:, 0] = CONSTANT
    base.embedding.weight[:, 1:FIRST_TOKEN_FEATURE] = 0
    for linear in base.linears():
        if linear.site.kind in ("attention.out", "cross_attention.out", "mlp.down"):
            nn.init.zeros_(linear.weight)
    before = base.encoder.bias.bucket(torch.tensor(-1))
    base.encoder.bias.weight[before, :NOTING_HEADS] = LOOK_BACK
    first = base.encoder.layers[0].get_submodule("attention")
    second = base.decoder.layers[1].get_submodule("cross_attention")
    assert isinstance(first, Attention) and isinstance(second, CrossAttention)
    init_previous_token_head(first)
    init_copy_head(second)


def init_previous_token_head(attention: Attention) -> None:
    """The noting heads compare nothing, so that their bias alone decides, and write a part of the token before."""
    size = attention.head_dim
    queries, keys, values = (attention.qkv.weight[start:end] for start, end in attention.qkv.parts.values())
    for head in range(NOTING_HEADS):
        rows = slice(head * size, (head + 1) * size)
        for weights in (queries, keys, values):
            weights[rows] = 0
        for feature, note in enumerate(_notes(head, size)):
            values[rows][feature, FIRST_TOKEN_FEATURE - 1 + note] = 1
            attention.out.weight[note, head * size + feature] = TOKEN_STD


def init_copy_head(attention: CrossAttention) -> None:
    """Four heads find the place, each by one half of the notes, and each copies a quarter of the token there."""
    size = attention.head_dim
    keys, values = (attention.kv.weight[start:end] for start, end in attention.kv.parts.values())
    for head in range(4):
        rows = slice(head * size, (head + 1) * size)
        for weights in (attention.q.weight, keys, values):
            weights[rows] = 0
        for feature, note in enumerate(_notes(head % NOTING_HEADS, size)):
            attention.q.weight[rows][feature, FIRST_TOKEN_FEATURE - 1 + note] = MATCH
            keys[rows][feature, note] = MATCH
        for feature in range(size):
            copied = FIRST_TOKEN_FEATURE + head * size + feature
            values[rows][feature, copied] = 1
            attention.out.weight[copied, head * size + feature] = PROPOSAL


def _notes(head: int, size: int) -> range:
    """The features of the residual stream that hold the notes of one noting head."""
    return range(1 + head * size, min(1 + (head + 1) * size, FIRST_TOKEN_FEATURE))
