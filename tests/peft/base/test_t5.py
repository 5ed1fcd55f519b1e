"""T5's logits against transformers on the same tiny random weights: whole, packed, chunked, beyond its distances."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import (
    TOLERANCE,
    assert_close,
    assert_matters,
    edit_json,
    edit_tensors,
    hf_greedy,
    hf_model,
    random_prompts,
    random_tokens,
    tiny_flan,
    tiny_llama,
    tiny_mt5,
    tiny_t5,
)
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from quiver_peft import GPT, T5, CheckpointError, load_model
from quiver_peft.base.checkpoint import save_checkpoint
from quiver_peft.base.load import load_base
from quiver_peft.base.paged import PagedAttention, PagedKV, PagedLayout
from quiver_peft.base.paged_t5 import PackedAttention, PagedSources, SourceLayout
from quiver_peft.base.t5 import T5Base
from quiver_peft.base.t5_attention import RelativeBias
from quiver_peft.decode import greedy_decode

MAKERS: dict[str, Callable[..., Any]] = {"t5": tiny_t5, "flan": tiny_flan, "mt5": tiny_mt5}
SOURCE, TARGET = random_tokens(3, 47, seed=1), random_tokens(3, 38, seed=2)
LENGTHS = torch.tensor([47, 12, 30])
SETTINGS: dict[str, dict[str, Any]] = {
    "deeper decoder": {"num_decoder_layers": 4, "num_layers": 2},
    "deeper encoder": {"num_decoder_layers": 2, "num_layers": 4},
    "wide heads": {"d_kv": 40},
    "gated SiLU": {"feed_forward_proj": "gated-silu"},
    "exact GELU": {"feed_forward_proj": "gelu"},
    "other buckets": {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    "another norm eps": {"layer_norm_epsilon": 10.0},
}


@torch.inference_mode()
def their_logits(folder: Path) -> Tensor:
    model = hf_model(folder)
    mask = (torch.arange(SOURCE.shape[1]) < LENGTHS[:, None]).long()
    return model(input_ids=SOURCE, attention_mask=mask, decoder_input_ids=TARGET).logits


def our_logits(folder: Path) -> Tensor:
    return T5.from_pretrained(folder)(SOURCE, TARGET, LENGTHS).detach()


@pytest.mark.parametrize("family", MAKERS)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    MAKERS[family](tmp_path)
    assert_close(our_logits(tmp_path), their_logits(tmp_path))


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_equal_transformers(setting: str, tmp_path: Path) -> None:
    tiny_t5(tmp_path / "it", **SETTINGS[setting])
    tiny_t5(tmp_path / "plain")
    expected = their_logits(tmp_path / "it")
    assert_matters(expected, their_logits(tmp_path / "plain"))
    assert_close(our_logits(tmp_path / "it"), expected)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (16, 100)])
def test_every_distance_falls_into_their_bucket(bidirectional: bool, num_buckets: int, max_distance: int) -> None:
    distances = torch.arange(-300, 301)
    theirs = T5Attention._relative_position_bucket(  # pyright: ignore[reportPrivateUsage]
        distances, bidirectional, num_buckets, max_distance
    )
    bias = RelativeBias(1, num_buckets, max_distance, bidirectional=bidirectional)
    bias.weight.data.copy_(torch.arange(num_buckets)[:, None])
    assert torch.equal(bias(distances)[0].long(), theirs)


def step(base: T5Base, kv: PagedKV, rows: list[tuple[Tensor, Tensor, int, int]]) -> list[Tensor]:
    """One step of a server. rows: (source, target, from, to) of each, their blocks at fixed places."""
    per_row = kv.num_blocks // len(rows)
    tables = [list(range(i * per_row, (i + 1) * per_row)) for i in range(len(rows))]
    half = per_row // 2
    news = [first == 0 for _, _, first, _ in rows]
    counts = [last - first for _, _, first, last in rows]
    device = torch.device("cpu")
    lengths = [len(source) for source, *_ in rows]
    sources = PagedSources(
        kv, SourceLayout(counts, lengths, [table[:half] for table in tables], news, kv.block_size, device)
    )
    if fresh := [source for (source, *_), new in zip(rows, news, strict=True) if new]:
        attend = PackedAttention([len(source) for source in fresh], base.encoder.bias.bias_for_offsets(), device)
        base.precompute_cross_kv(base.encode(torch.cat(fresh), attend), sources)
    layout = PagedLayout(counts, [last for *_, last in rows], [t[half:] for t in tables], kv.block_size, device)
    tokens = torch.cat([target[first:last] for _, target, first, last in rows])
    hidden = base(tokens, PagedAttention(kv, layout, base.decoder.bias.bias_for_offsets()), sources)
    return list(base.logits(hidden).split(counts))


@pytest.mark.parametrize("family", MAKERS)
@torch.inference_mode()
def test_a_packed_ragged_batch_equals_whole_sequences(family: str, tmp_path: Path) -> None:
    """Rows bring one token or several, as new rows, recomputed ones and prefixes do, and stand at different places."""
    MAKERS[family](tmp_path)
    base = T5Base.from_pretrained(tmp_path)
    expected = their_logits(tmp_path)
    kv = PagedKV(base.config, 3 * 16, 8, torch.float32, torch.device("cpu"))
    rows = [(SOURCE[i, :length], TARGET[i]) for i, length in enumerate(LENGTHS.tolist())]
    cuts = [[0, 1, 2, 9, 10, 38], [0, 5, 6, 7, 37, 38], [0, 38, 38, 38, 38, 38]]
    for turn in range(5):
        spans = [(*rows[i], cuts[i][turn], cuts[i][turn + 1]) for i in range(3) if cuts[i][turn] < cuts[i][turn + 1]]
        if len(spans) < 3:  # the third is done: its blocks stay where they are
            spans.append((*rows[2], 37, 38))
        for i, logits in enumerate(step(base, kv, spans)):
            assert_close(logits, expected[i, spans[i][2] : spans[i][3]])


@torch.inference_mode()
def test_a_source_may_be_shorter_than_the_rows_that_come_at_once(tmp_path: Path) -> None:
    MAKERS["t5"](tmp_path)
    base = T5Base.from_pretrained(tmp_path)
    kv = PagedKV(base.config, 16, 8, torch.float32, torch.device("cpu"))
    [at_once] = step(base, kv, [(SOURCE[0, :3], TARGET[0], 0, 19)])
    one_by_one = [step(base, kv, [(SOURCE[0, :3], TARGET[0], i, i + 1)])[0] for i in range(19)]
    assert_close(at_once, torch.cat(one_by_one))


@pytest.mark.parametrize("family", MAKERS)
def test_greedy_answers_equal_generate(family: str, tmp_path: Path) -> None:
    MAKERS[family](tmp_path)
    base, theirs = T5Base.from_pretrained(tmp_path), hf_model(tmp_path)
    prompts = random_prompts([1, 5, 40, 17, 16, 33])
    answers = greedy_decode(base, prompts, max_new_tokens=12, stop_ids=base.config.eos_token_ids, max_rows=2)
    assert answers == [hf_greedy(theirs, prompt, 12) for prompt in prompts]
    assert len({tuple(answer) for answer in answers}) > 3


def test_the_scale_before_the_head_is_the_first_t5s(tmp_path: Path) -> None:
    tiny_t5(tmp_path / "a")
    tiny_flan(tmp_path / "b")
    first, flan = T5Base.from_pretrained(tmp_path / "a"), T5Base.from_pretrained(tmp_path / "b")
    assert (first.config.scaled_head, first.config.tied_embeddings, first.head) == (True, True, None)
    assert (flan.config.scaled_head, flan.config.tied_embeddings) == (False, False)
    # As transformers 4 wrote it, which is what the published checkpoints of T5 1.1 and Flan hold.
    edit_json(tmp_path / "b" / "config.json", tie_word_embeddings=False, scale_decoder_outputs=...)
    assert T5Base.from_pretrained(tmp_path / "b").config == flan.config


def test_tensors_that_old_checkpoints_hold_besides_are_passed_over(tmp_path: Path) -> None:
    tiny_t5(tmp_path)
    expected = our_logits(tmp_path)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
        tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(8, 4)

    edit_tensors(tmp_path / "model.safetensors", add)
    assert torch.equal(our_logits(tmp_path), expected)


@pytest.mark.parametrize("family", ["t5", "flan"])
def test_a_saved_base_is_the_same_checkpoint(family: str, tmp_path: Path) -> None:
    MAKERS[family](tmp_path)
    base = T5Base.from_pretrained(tmp_path)
    (tmp_path / "again").mkdir()
    save_checkpoint(base, tmp_path / "again", base.tensor_mappings(), torch.float32)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", tmp_path))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_folder_says_which_model_it_holds(tmp_path: Path) -> None:
    tiny_t5(tmp_path / "t5")
    tiny_llama(tmp_path / "llama")
    assert isinstance(load_model(tmp_path / "t5"), T5)
    assert isinstance(load_model(tmp_path / "llama"), GPT)
    with pytest.raises(CheckpointError, match="model_type 't5' is not read by GPTBase, which reads llama, mistral"):
        GPT.from_pretrained(tmp_path / "t5")
    with pytest.raises(CheckpointError, match="model_type 'llama' is not read by T5Base, which reads t5, mt5"):
        T5.from_pretrained(tmp_path / "llama")


def test_float16_is_refused_where_it_overflows(tmp_path: Path) -> None:
    tiny_t5(tmp_path)
    with pytest.raises(CheckpointError, match="overflows in float16; use bfloat16 or float32"):
        load_base(tmp_path, dtype=torch.float16)


def test_an_unknown_activation_is_named(tmp_path: Path) -> None:
    tiny_t5(tmp_path)
    edit_json(tmp_path / "config.json", feed_forward_proj="gated-softplus")
    with pytest.raises(CheckpointError, match="feed_forward_proj 'softplus' is not supported; known: silu"):
        T5Base.from_pretrained(tmp_path)


def test_training_all_of_it_reaches_every_weight(tmp_path: Path) -> None:
    tiny_flan(tmp_path)
    model = T5.from_pretrained(tmp_path)
    model(SOURCE, TARGET, LENGTHS).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().max() > TOLERANCE * 1e-3), name
