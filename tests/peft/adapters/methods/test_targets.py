"""Which linears a list of names means, on Llama and on GPT-2; and names that mean nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

from quiver_peft import GPT, AdapterError, LoraPEFTConfig
from quiver_peft.adapters.methods.targets import matches_module, module_targets, resolve_targets
from quiver_peft.base.gpt import GPTBase


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> GPTBase:
    return GPTBase.from_pretrained(llama_folder)


@pytest.fixture(scope="module")
def gpt2(gpt2_folder: Path) -> GPTBase:
    return GPTBase.from_pretrained(gpt2_folder)


def _first_layer(base: GPTBase, names: list[str] | str, *, fused: bool) -> list[str]:
    return [t.name for t in resolve_targets(base, names, fused=fused) if ".0." in t.name]


def test_a_fused_place_is_one_target(llama: GPTBase) -> None:
    assert _first_layer(llama, ["attention_qkv"], fused=True) == ["layers.0.attention.qkv"]
    [target, *_] = resolve_targets(llama, ["attention_qkv"], fused=True)
    assert (target.part, target.rows, target.in_features, target.num_rows) == ("", (0, 128), 64, 128)


def test_a_canonical_place_is_a_target_for_each_module(llama: GPTBase) -> None:
    prefix = "model.layers.0.self_attn."
    assert _first_layer(llama, ["attention_qkv"], fused=False) == [f"{prefix}{p}_proj" for p in "qkv"]
    rows = [t.rows for t in resolve_targets(llama, ["attention_qkv"], fused=False)][:3]
    assert rows == [(0, 64), (64, 96), (96, 128)]


def test_a_place_of_one_module_keeps_the_modules_name(llama: GPTBase, gpt2: GPTBase) -> None:
    assert _first_layer(llama, ["attention_dense"], fused=True) == ["model.layers.0.self_attn.o_proj"]
    assert _first_layer(gpt2, ["attention_qkv"], fused=True) == ["transformer.h.0.attn.c_attn"]


@pytest.mark.parametrize(
    ("shorthand", "places"),
    [
        ("attention", ["attention_qkv", "attention_dense"]),
        ("mlp", ["mlp_fc1", "mlp_fc2"]),
        ("all", ["attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"]),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_shorthands(shorthand: str, places: list[str], fused: bool, llama: GPTBase) -> None:
    expected = {t.name for t in resolve_targets(llama, places, fused=fused)}
    assert {t.name for t in resolve_targets(llama, [shorthand], fused=fused)} == expected
    assert {t.name for t in resolve_targets(llama, shorthand, fused=fused)} == expected


def test_names_that_overlap_mean_each_target_once(llama: GPTBase) -> None:
    names = [t.name for t in resolve_targets(llama, ["q_proj", "self_attn.q_proj", "k_proj"], fused=True)]
    assert len(names) == len(set(names)) == 6


def test_a_string_is_a_regular_expression_on_whole_names(llama: GPTBase) -> None:
    assert [t.name for t in resolve_targets(llama, r".*\.1\.mlp\.(up|down)_proj", fused=True)] == [
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]


@pytest.mark.parametrize(
    ("names", "module", "expected"),
    [
        (["q_proj"], "model.layers.0.self_attn.q_proj", True),
        (["proj"], "model.layers.0.self_attn.q_proj", False),
        (["self_attn.q_proj"], "model.layers.0.self_attn.q_proj", True),
        (["model.layers.0.self_attn.q_proj"], "model.layers.0.self_attn.q_proj", True),
        (["layers.1.q_proj"], "model.layers.11.q_proj", False),
        ("q_proj", "model.layers.0.self_attn.q_proj", False),
        (".*q_proj", "model.layers.0.self_attn.q_proj", True),
        ("all-linear", "model.layers.0.self_attn.q_proj", True),
    ],
)
def test_names_match_as_in_hugging_face_peft(names: list[str] | str, module: str, expected: bool) -> None:
    assert matches_module(names, module) is expected


def test_every_module_of_the_checkpoint_is_a_target(llama: GPTBase, gpt2: GPTBase) -> None:
    assert len(module_targets(llama)) == 3 * 7
    assert len(module_targets(gpt2)) == 3 * 4


@pytest.mark.parametrize("names", [["w_pack"], ["q_proj", "w_pack"], "w_pack", r".*\.w_pack", ["lm_head"]])
def test_a_name_that_matches_nothing_is_refused(names: list[str] | str, llama: GPTBase) -> None:
    wrong = names if isinstance(names, str) else names[-1]
    with pytest.raises(AdapterError) as caught:
        resolve_targets(llama, names, fused=True)
    message = str(caught.value)
    assert f"target_modules: {wrong!r} matches no linear of this base" in message
    assert "use one of attention_qkv, attention_dense, mlp_fc1, mlp_fc2, attention, mlp, all" in message
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in message


def test_a_whole_place_and_its_part_do_not_go_together(llama: GPTBase) -> None:
    message = "layers.0.attention.qkv is named as a whole and by its parts"
    with pytest.raises(AdapterError, match=message):
        resolve_targets(llama, ["attention_qkv", "q_proj"], fused=True)
    assert len(resolve_targets(llama, ["attention_qkv", "q_proj"], fused=False)) == 9


def test_no_names_at_all_are_refused(llama: GPTBase) -> None:
    with pytest.raises(AdapterError, match="target_modules is empty"):
        resolve_targets(llama, [], fused=True)


def test_a_malformed_expression_is_refused(llama_folder: Path) -> None:
    model = GPT.from_pretrained(llama_folder)
    with pytest.raises(AdapterError, match=r"target_modules: '\(' is not a regular expression"):
        model.add_adapter(LoraPEFTConfig(target_modules="("))
    with pytest.raises(AdapterError, match=r"rank_pattern: '\(' is not a regular expression"):
        model.add_adapter(LoraPEFTConfig(rank_pattern={"(": 2}))
    assert model.adapter is None


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_target_is_refused(pattern: str, llama_folder: Path) -> None:
    """With the fused variant there is no `q_proj`: its own rank would silently not be."""
    model = GPT.from_pretrained(llama_folder)
    with pytest.raises(AdapterError, match=f"{pattern}: 'q_proj' matches no target"):
        model.add_adapter(replace(LoraPEFTConfig(target_modules=["attention_qkv"]), **{pattern: {"q_proj": 2}}))
