"""NeMo 1.x's `.nemo` adapters give the logits of NeMo's formulas, whatever their shards; saved again, and served."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from parity.nemo.nemo_files import BOTTLENECK, LORA, PTUNING, RANK, make_full, shape_of, write_nemo
from parity.nemo.nemo_formulas import nemo_logits
from support.tiny import (
    assert_close,
    assert_matters,
    hf_logits,
    hf_model,
    our_logits,
    random_tokens,
    tiny_flan,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)
from torch import Tensor

from quiver_peft import GPT, T5, load_model
from quiver_peft.adapters.formats.adapter_folder import read_adapter
from quiver_peft.adapters.serving.banks import FIRST_SLOT, AdapterBanks
from quiver_peft.adapters.serving.torch_seam import RowGroup
from quiver_peft.base.attention import CausalAttention
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.t5 import T5Base

torch.set_num_threads(1)  # tiny products: threads cost more than they give

TOKENS = random_tokens(2, 12, seed=3)
ALL = {**LORA, "target_modules": ["all"], "alpha": 3}
SCHEMES: dict[str, dict[str, dict[str, Any]]] = {
    # As NeMo 1.23 writes it: query, key and value only, without an alpha.
    "lora": {"lora": LORA},
    "lora, all": {"lora": ALL},
    "lora, places": {"lora": {**LORA, "target_modules": ["mlp", "attention_dense"], "alpha": 2 * RANK}},
    "lora, canonical": {"lora": {**ALL, "variant": "canonical", "dropout_position": "pre"}},
    "lora, one layer": {"lora": {**ALL, "layer_selection": [2]}},
    "ia3": {"ia3": {}},
    "ia3, two layers": {"ia3": {"layer_selection": [1, 4]}},
    "adapter": {"adapter": BOTTLENECK},
    "adapter, post": {"adapter": {**BOTTLENECK, "norm_position": "post", "norm_type": "layernorm"}},
    "adapter, bare": {"adapter": {**BOTTLENECK, "norm_position": None, "layer_selection": [1, 3]}},
    "ptuning": {"ptuning": PTUNING},
    "ptuning, adapter": {"ptuning": PTUNING, "adapter": BOTTLENECK},
    "lora, ia3": {"lora": ALL, "ia3": {}},
    "lora canonical, ia3": {"lora": {**LORA, "variant": "canonical"}, "ia3": {}},
    "all four": {"lora": ALL, "ia3": {}, "adapter": BOTTLENECK, "ptuning": PTUNING},
}


class Layout(NamedTuple):
    family: str
    is_mcore: bool
    tensor_parallel: int
    pipeline: int
    prefix: str = "model."
    mode: str = "w:"


LAYOUTS = [
    Layout("llama", True, 1, 1),
    Layout("llama", True, 2, 1, mode="w:gz"),
    Layout("llama", True, 2, 2),
    Layout("gpt2", True, 1, 2),
    Layout("gpt2", False, 1, 1, mode="w:gz"),
    Layout("gpt2", False, 2, 1, prefix="model.module."),
    Layout("t5", False, 1, 1, prefix="enc_dec_model."),
    Layout("t5", False, 2, 4),
    Layout("flan", True, 2, 1),
]


def is_possible(layout: Layout, name: str) -> bool:
    """What NeMo itself could not do: older models with a LoRA of parts, or halve what has no gate; see the refusals."""
    schemes = SCHEMES[name]
    canonical = schemes.get("lora", {}).get("variant") == "canonical"
    halves = canonical and schemes["lora"].get("target_modules") == ["all"]
    if canonical and (not layout.is_mcore or (halves and layout.family == "gpt2")):
        return False
    return not (layout.is_mcore and layout.family == "flan" and "ptuning" in schemes)


# On every layout these, and each of the others on one of every family.
EVERYWHERE = ("lora, all", "ia3", "adapter", "lora canonical, ia3", "all four")
CASES = [
    (layout, name)
    for number, layout in enumerate(LAYOUTS)
    for turn, name in enumerate(SCHEMES)
    if is_possible(layout, name) and (name in EVERYWHERE or number >= 7 or (turn + number) % 3 == 0)
]


class Bases(NamedTuple):
    """One model of four layers, for pipelines: as transformers has it, its logits, and as we read it."""

    theirs: Any
    bare: Tensor
    ours: GPTBase | T5Base

    def with_adapter(self, path: Path) -> GPT | T5:
        model = T5(self.ours) if isinstance(self.ours, T5Base) else GPT(self.ours)
        model.load_adapters(path)
        model.freeze()
        return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bases]:
    found: dict[str, Bases] = {}
    for family, make, settings in (
        ("llama", tiny_llama, {"num_hidden_layers": 4}),
        ("gpt2", tiny_gpt2, {"n_layer": 4}),
        ("t5", tiny_t5, {"num_layers": 4, "num_decoder_layers": 4}),
        ("flan", tiny_flan, {"num_layers": 4, "num_decoder_layers": 4}),
    ):
        folder = tmp_path_factory.mktemp(family)
        make(folder, **settings)
        theirs = hf_model(folder)
        found[family] = Bases(theirs, hf_logits(theirs, TOKENS), load_model(folder).base)
    return found


class Case(NamedTuple):
    file: Path
    expected: Tensor


def make_case(base: Bases, layout: Layout, name: str, folder: Path) -> Case:
    """An archive on disk and what NeMo's formulas make of `TOKENS` with it."""
    shape = shape_of(base.theirs.config, is_mcore=layout.is_mcore)
    schemes = SCHEMES[name]
    full = make_full(shape, schemes, seed=len(name))
    file = write_nemo(
        folder / "a.nemo",
        shape,
        schemes,
        full,
        tensor_parallel=layout.tensor_parallel,
        pipeline=layout.pipeline,
        prefix=layout.prefix,
        mode=layout.mode,
    )
    expected = nemo_logits(base.theirs, shape, schemes, full, TOKENS)
    assert_matters(expected, base.bare)
    return Case(file, expected)


@pytest.mark.parametrize(("layout", "name"), CASES, ids=lambda part: str(part).replace("Layout", ""))
def test_logits_equal_nemos_formulas(layout: Layout, name: str, bases: dict[str, Bases], tmp_path: Path) -> None:
    base = bases[layout.family]
    case = make_case(base, layout, name, tmp_path)
    model = base.with_adapter(case.file)
    assert_close(our_logits(model, TOKENS), case.expected)
    model.save_adapter(tmp_path / "ours")
    assert_close(our_logits(base.with_adapter(tmp_path / "ours"), TOKENS), case.expected)


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[4]], ids=lambda part: part.family)
@pytest.mark.parametrize("name", ["adapter", "lora, ia3", "adapter, bare"])
@torch.inference_mode()
def test_the_banks_compute_the_same(layout: Layout, name: str, bases: dict[str, Bases], tmp_path: Path) -> None:
    case, base = make_case(bases[layout.family], layout, name, tmp_path), bases[layout.family].ours
    assert isinstance(base, GPTBase)
    banks = AdapterBanks.for_one(read_adapter(case.file, base), torch.float32, torch.device("cpu"))
    attend = CausalAttention()

    def packed(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(layer, q[None], k[None], v[None])[0]

    length = TOKENS.shape[1]
    seam = banks.seam([RowGroup(FIRST_SLOT, 0, length)])
    assert_close(base.logits(base(TOKENS[0], torch.arange(length), packed, seam)), case.expected[0])


def test_tied_bottlenecks(bases: dict[str, Bases], tmp_path: Path) -> None:
    """NeMo saves them in every layer; those of other stages it never tied."""
    base = bases["gpt2"]
    shape = shape_of(base.theirs.config, is_mcore=False)
    schemes = {"adapter": {**BOTTLENECK, "weight_tying": True, "position_embedding_strategy": None}}
    full = make_full(shape, schemes)
    num_numbers = sum(tensor.numel() for tensor in full.values())
    for layers_together, expected in ((4, num_numbers // 4), (2, num_numbers)):
        tied = {
            (place, name): full[(place[0], place[1] // layers_together * layers_together, place[2]), name]
            for place, name in full
        }
        file = write_nemo(tmp_path / "a.nemo", shape, schemes, tied, pipeline=4 // layers_together)
        model = base.with_adapter(file)
        assert model.adapter is not None
        assert sum(parameter.numel() for parameter in model.adapter.parameters()) == expected
        assert_close(our_logits(model, TOKENS), nemo_logits(base.theirs, shape, schemes, tied, TOKENS))


def test_what_is_read_says_how_it_was_trained(bases: dict[str, Bases], tmp_path: Path) -> None:
    case = make_case(bases["llama"], LAYOUTS[0], "lora, canonical", tmp_path)
    weights = read_adapter(case.file, bases["llama"].ours)
    (config,) = weights.configs
    settings = config.to_dict()
    assert (settings["adapter_dim"], settings["alpha"], settings["dropout_position"]) == (RANK, 3.0, "pre")
    assert weights.methods == ("lora",) and len(weights.revision) == 64
