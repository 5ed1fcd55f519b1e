"""The artefact on disk, read strictly: files, tensors and the record beside them; after a refusal nothing changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny import assert_close, edit_json, edit_tensors, hf_logits, hf_lora, hf_peft, random_tokens, tiny_llama
from torch import Tensor

from quiver_peft import GPT, AdapterError, BaseMismatchError, LoraPEFTConfig
from quiver_peft.adapters.formats.adapter_folder import read_adapter
from quiver_peft.adapters.training.trainable_adapter import TrainableAdapter

TOKENS = random_tokens(1, 20)
CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "quiver.json"
Q_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
Q_B = Q_A.replace("lora_A", "lora_B")


@pytest.fixture
def hf_folder(llama_folder: Path, tmp_path: Path) -> Path:
    """An adapter by Hugging Face PEFT, without quiver.json, that the test may break."""
    hf_lora(llama_folder, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """An adapter of ours, with quiver.json, that the test may break."""
    model = GPT.from_pretrained(llama_folder)
    model.add_adapter(LoraPEFTConfig(adapter_dim=4, target_modules=["q_proj", "v_proj"]))
    for parameter in model.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_adapter(tmp_path / "ours", tokenizer_digest="d1", training={"steps": 3})
    return tmp_path / "ours"


@pytest.fixture(scope="module")
def model(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> GPT:
    """A model that answers with another adapter already."""
    other = tmp_path_factory.mktemp("other")
    hf_lora(llama_folder, other, seed=3, targets=["k_proj"])
    model = GPT.from_pretrained(llama_folder)
    model.load_adapters(other)
    model.freeze()
    return model


def refused(model: GPT, folder: Path, *fragments: str, kind: type[AdapterError] = AdapterError) -> None:
    before, adapter = model(TOKENS), model.adapter
    with pytest.raises(AdapterError) as caught:
        model.load_adapters(folder)
    assert type(caught.value) is kind
    for fragment in (str(folder), *fragments):
        assert fragment in str(caught.value)
    assert torch.equal(model(TOKENS), before)
    assert model.adapter is adapter
    assert not any(p.requires_grad for p in model.parameters())


def _set(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


def _poke(number: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([1]), number)


def _rename(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update(
        {name.replace(old, new): tensors.pop(name) for name in list(tensors) if old in name}
    )


def _add(name: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


PREFIX = "base_model.model."
Q1 = "model.layers.1.self_attn.q_proj"
BOTH = f"lora_A and lora_B of {Q1!r} must both be there"
UNAPPLIED = "nothing may be left unapplied"
TENSOR_FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], tuple[str, ...]]] = {
    "A missing": (lambda t: t.pop(Q_A), (BOTH,)),
    "B missing": (lambda t: t.pop(Q_B), (BOTH,)),
    "A and B missing": (lambda t: [t.pop(Q_A), t.pop(Q_B)], (BOTH,)),
    "no tensors": (lambda t: t.clear(), ("lora_A and lora_B of 'model.layers.0.self_attn.q_proj' must both be there",)),
    "extra module, not a target": (
        _add(f"{PREFIX}model.layers.1.self_attn.k_proj.lora_A.weight", 4, 64),
        ("module 'model.layers.1.self_attn.k_proj' is not among target_modules", UNAPPLIED),
    ),
    "extra module, not in the base": (
        _add(f"{PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight", 4, 64),
        ("module 'model.layers.7.self_attn.q_proj' does not exist in this base", UNAPPLIED),
    ),
    "extra tensor of another kind": (
        _add(f"{PREFIX}{Q1}.lora_magnitude_vector", 64),
        (f"lora_magnitude_vector of {Q1!r} is there, but use_dora is not set", UNAPPLIED),
    ),
    "a whole weight of the base": (
        _add(f"{PREFIX}lm_head.weight", 320, 64),
        ("tensor 'base_model.model.lm_head.weight' is not a lora_A or lora_B", UNAPPLIED),
    ),
    "a bias of B": (_add(f"{PREFIX}{Q1}.lora_B.bias", 64), ("lora_B.bias' is not a lora_A or lora_B",)),
    "renamed: adapter name inside": (
        _rename("lora_A.weight", "lora_A.default.weight"),
        ("lora_A.default.weight' is not a lora_A or lora_B",),
    ),
    "renamed: prefix lacking": (_rename(PREFIX, ""), ("is not a lora_A or lora_B",)),
    "renamed: another module": (
        _rename("q_proj", "query"),
        (".self_attn.query' does not exist in this base", UNAPPLIED),
    ),
    "A's rank": (_set(Q_A, lambda t: t[:3].contiguous()), (f"{Q1}: lora_A [3, 64] and lora_B [64, 4]", "rank 4")),
    "B's rank": (_set(Q_B, lambda t: t[:, :2].contiguous()), (f"{Q1}: lora_A [4, 64] and lora_B [64, 2]", "rank 4")),
    "A is a vector": (_set(Q_A, lambda t: t[0].contiguous()), (f"{Q1}: lora_A [64]",)),
    "A is a number": (_set(Q_A, lambda t: t[0, 0].clone()), (f"{Q1}: lora_A []",)),
    "A is transposed": (_set(Q_A, lambda t: t.T.contiguous()), (f"{Q1}: lora_A [64, 4]",)),
    "NaN": (_set(Q_A, _poke(float("nan"))), (f"tensor {Q_A!r} holds a value that is not finite",)),
    "infinity": (_set(Q_B, _poke(float("inf"))), (f"tensor {Q_B!r} holds a value that is not finite",)),
    "infinity in fp16": (
        _set(Q_B, lambda t: _poke(float("-inf"))(t).to(torch.float16)),
        (f"tensor {Q_B!r} holds a value that is not finite",),
    ),
    "integers": (
        _set(Q_A, lambda t: t.to(torch.int32)),
        (f"tensor {Q_A!r} has type torch.int32; adapter weights are floating point",),
    ),
    "booleans": (_set(Q_A, lambda t: t > 0), (f"tensor {Q_A!r} has type torch.bool",)),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensors_must_be_exactly_those_of_the_configuration(fault: str, model: GPT, hf_folder: Path) -> None:
    edit, fragments = TENSOR_FAULTS[fault]
    edit_tensors(hf_folder / WEIGHTS, edit)
    refused(model, hf_folder, WEIGHTS, *fragments)


def test_a_shape_that_does_not_fit_this_base(model: GPT, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "base", hidden_size=32)
    hf_lora(tmp_path / "base", tmp_path / "adapter")
    refused(
        model,
        tmp_path / "adapter",
        "model.layers.0.self_attn.q_proj: the adapter is for a linear of 32 inputs and 32 outputs, "
        "this base has 64 and 64",
        kind=BaseMismatchError,
    )


def test_an_adapter_for_another_architecture(model: GPT, gpt2_folder: Path, tmp_path: Path) -> None:
    hf_lora(gpt2_folder, tmp_path, targets=["c_attn"])
    fragment = "target_modules ['c_attn'] match no linear of this base (llama: down_proj, gate_proj"
    refused(model, tmp_path, fragment, kind=BaseMismatchError)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.999])
def test_a_truncated_file(kept: float, model: GPT, hf_folder: Path) -> None:
    content = (hf_folder / WEIGHTS).read_bytes()
    (hf_folder / WEIGHTS).write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    refused(model, hf_folder, str(hf_folder / WEIGHTS), "not a whole safetensors file")


def test_a_file_with_something_after_its_end(model: GPT, hf_folder: Path) -> None:
    (hf_folder / WEIGHTS).write_bytes((hf_folder / WEIGHTS).read_bytes() + b"more")
    refused(model, hf_folder, str(hf_folder / WEIGHTS), "not a whole safetensors file")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "not valid JSON"),
        (b'{"r": 4,', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[]", "must hold a JSON object, not list"),
        (b"null", "must hold a JSON object, not NoneType"),
        (b'"LORA"', "must hold a JSON object, not str"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
@pytest.mark.parametrize("name", [CONFIG, RECORD])
def test_json_that_is_no_object(name: str, content: bytes, fragment: str, model: GPT, hf_folder: Path) -> None:
    (hf_folder / name).write_bytes(content)
    refused(model, hf_folder, str(hf_folder / name), fragment)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file(name: str, model: GPT, hf_folder: Path) -> None:
    (hf_folder / name).unlink()
    refused(model, hf_folder, str(hf_folder / name), f"no such file; an adapter folder holds {CONFIG} and {WEIGHTS}")


def test_a_folder_in_the_place_of_a_file(model: GPT, hf_folder: Path) -> None:
    (hf_folder / CONFIG).unlink()
    (hf_folder / CONFIG).mkdir()
    refused(model, hf_folder, str(hf_folder / CONFIG), "not readable")


def test_pickles_are_not_read(model: GPT, hf_folder: Path) -> None:
    torch.save({Q_A: torch.ones(4, 64)}, hf_folder / "adapter_model.bin")
    (hf_folder / WEIGHTS).unlink()
    refused(model, hf_folder, str(hf_folder), "only as the pickle adapter_model.bin, which is not read unless")


def test_another_bases_fingerprint(folder: Path, tmp_path: Path) -> None:
    """The same shapes, other weights: only the fingerprint can tell."""
    tiny_llama(tmp_path / "other", seed=9)
    other = GPT.from_pretrained(tmp_path / "other")
    before = other(TOKENS).detach()
    with pytest.raises(BaseMismatchError) as caught:
        other.load_adapters(folder)
    made_for = json.loads((folder / RECORD).read_text())["base_fingerprint"]
    assert str(caught.value) == (
        f"{folder / RECORD}: made for the base {made_for[:12]}, this base is {other.base.fingerprint[:12]}"
    )
    assert torch.equal(other(TOKENS), before)
    assert all(p.requires_grad for p in other.parameters()), "a refused adapter freezes nothing"


def test_another_tokenizers_digest(folder: Path, model: GPT) -> None:
    with pytest.raises(BaseMismatchError, match=r"quiver.json: made with another tokenizer than this base's"):
        read_adapter(folder, model.base, tokenizer_digest="d2")
    assert read_adapter(folder, model.base, tokenizer_digest="d1").training == {"steps": 3}
    assert read_adapter(folder, model.base).methods == ("lora",)


@pytest.mark.parametrize("version", [0, 2, "1", None, ...])
def test_another_schema_version(version: object, model: GPT, folder: Path) -> None:
    edit_json(folder / RECORD, schema_version=version)
    found = None if version is ... else version
    refused(model, folder, RECORD, f"schema_version {found!r} is not known; this is 1")


def test_a_record_that_says_nothing_is_no_record(model: GPT, folder: Path) -> None:
    (folder / RECORD).write_text("{}")
    refused(model, folder, RECORD, "schema_version None is not known; this is 1")


@pytest.mark.parametrize(
    ("field", "value", "fragment"),
    [
        ("methods", ..., "methods must be a list of objects, not None"),
        ("methods", ["lora"], "methods must be a list of objects, not ['lora']"),
        ("methods", [], "methods must be a list of objects, not []"),
        ("methods", [{"method": "lora", "dropout_position": "aside"}], "dropout_position must be one of pre, post"),
        ("training", [3], "training must be an object, not [3]"),
    ],
)
def test_a_malformed_record(field: str, value: object, fragment: str, model: GPT, folder: Path) -> None:
    edit_json(folder / RECORD, **{field: value})
    refused(model, folder, fragment)


def test_a_revision_that_is_not_these_files(model: GPT, folder: Path) -> None:
    before = json.loads((folder / RECORD).read_text())["revision"]
    edit_tensors(folder / WEIGHTS, _set(Q_A, lambda t: t + 1e-3))
    refused(
        model,
        folder,
        RECORD,
        f"the files beside it are not the ones it describes (revision {before[:12]}, found ",
        "save or copy the adapter again",
    )


def test_a_changed_configuration_is_another_revision(model: GPT, folder: Path) -> None:
    edit_json(folder / CONFIG, lora_alpha=16)
    refused(model, folder, RECORD, "the files beside it are not the ones it describes")


def test_the_revision_is_of_the_content_alone(folder: Path, model: GPT, tmp_path: Path) -> None:
    revision = read_adapter(folder, model.base).revision
    assert len(revision) == 64
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "learning_curve.png").write_bytes(b"picture")
    (copy / RECORD).unlink()
    assert read_adapter(copy, model.base).revision == revision
    edit_tensors(copy / WEIGHTS, _set(Q_A, lambda t: t + 1e-3))
    assert read_adapter(copy, model.base).revision != revision


def test_reading_changes_no_model(folder: Path, model: GPT, llama_folder: Path) -> None:
    before = model(TOKENS)
    weights = read_adapter(folder, model.base)
    assert torch.equal(model(TOKENS), before)
    assert {w.a.dtype for w in weights.lora} == {torch.float32}
    model_with_it = GPT(model.base)
    model_with_it.adapter = TrainableAdapter.from_weights(model.base, weights).eval()
    assert_close(model_with_it(TOKENS).detach(), hf_logits(hf_peft(llama_folder, folder), TOKENS))
