"""Adapters that are refused, with which status and words; and after each refusal the server answers as before."""

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import torch
from support.error_assertions import refusal
from support.server_fixture import ServerFixture, make_base
from support.tiny import edit_json, edit_tensors, hf_lora, tiny_llama
from torch import Tensor

from quiver import AdapterNotFound, BaseMismatch, Client, InvalidRequest, QuiverClientError
from quiver_peft import GPT, LoraPEFTConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

pytestmark = pytest.mark.usefixtures("still_serving")


def test_sources_outside_of_the_folder(llama: ServerFixture, client: Client, tmp_path: Path) -> None:
    (llama.adapters / "way-out").symlink_to(tmp_path)
    for source in ("../llama", "/etc", str(tmp_path), "file:///etc", "s3://bucket/x", "way-out"):
        refusal(
            lambda source=source: client.load_adapter("outsider", source=source),
            InvalidRequest,
            f"source {source!r} is outside of what this server loads from",
        )
    refusal(
        lambda: client.load_adapter("outsider", source="not-there"),
        AdapterNotFound,
        f"source 'not-there' holds no {CONFIG}",
    )
    for source, fragment in (("x\0y", "is outside of"), ("x" * 5000, "is no path"), ("x/" * 3000, "is no path")):
        refusal(lambda source=source: client.load_adapter("outsider", source=source), InvalidRequest, fragment)
    assert "outsider" not in [adapter.id for adapter in client.list_adapters()]


def refused_adapter(
    client: Client, adapter_id: str, fragment: str, kind: type[QuiverClientError] = InvalidRequest
) -> None:
    """A broken adapter is refused to requests and to LoadAdapter alike, and its state says why."""
    reason = "OTHER_BASE" if kind is BaseMismatch else "MALFORMED_ADAPTER"
    assert refusal(lambda: client.generate("hello", adapter=adapter_id), kind, fragment).reason == reason
    refusal(lambda: list(client.stream("hello", adapter=adapter_id)), kind, fragment)
    refusal(lambda: client.load_adapter(adapter_id), kind, fragment)
    adapter = client.get_adapter(adapter_id)
    assert adapter.state == "failed"
    assert fragment in adapter.failure_reason
    assert adapter.device_bytes == 0


def test_adapter_for_a_base_of_other_shapes(llama: ServerFixture, client: Client, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "other", hidden_size=32)
    hf_lora(tmp_path / "other", llama.adapters / "other-shape")
    refused_adapter(client, "other-shape", "the adapter is for a linear of 32 inputs", BaseMismatch)
    with pytest.raises(BaseMismatch) as caught:
        client.generate("hello", adapter="other-shape")
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION


def test_adapter_for_another_family(llama: ServerFixture, client: Client, gpt2_base: Path) -> None:
    hf_lora(gpt2_base, llama.adapters / "other-family", targets=["c_attn"])
    fragment = "target_modules ['c_attn'] match no linear of this base"
    refused_adapter(client, "other-family", fragment, BaseMismatch)


def test_adapter_whose_record_names_another_base(llama: ServerFixture, client: Client, tmp_path: Path) -> None:
    """Same shapes, other weights: only the fingerprint tells."""
    other = GPT.from_pretrained(make_base(tmp_path / "other", seed=7))
    other.add_adapter(LoraPEFTConfig(adapter_dim=2))
    other.save_adapter(llama.adapters / "other-weights")
    fragment = f"made for the base {other.base.fingerprint[:12]}, this base is"
    refused_adapter(client, "other-weights", fragment, BaseMismatch)


def _truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def _cut_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x10")


def _rename_file(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "weights.safetensors")


def _rename_tensor(folder: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        name = min(tensors)
        tensors[name.replace("lora_A", "lora_C")] = tensors.pop(name)

    edit_tensors(folder / WEIGHTS, rename)


def _rename_module(folder: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "layers.0.self_attn.q_proj" in name]:
            tensors[name.replace("layers.0", "layers.9")] = tensors.pop(name)

    edit_tensors(folder / WEIGHTS, rename)


def _drop_tensor(folder: Path) -> None:
    edit_tensors(folder / WEIGHTS, lambda tensors: tensors.pop(min(tensors)))


def _spoil_value(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[min(tensors)][0, 0] = torch.nan

    edit_tensors(folder / WEIGHTS, spoil)


def _break_json(folder: Path) -> None:
    (folder / CONFIG).write_text('{"r": 4,')


def _other_rank(folder: Path) -> None:
    edit_json(folder / CONFIG, r=5)


def _other_method(folder: Path) -> None:
    edit_json(folder / CONFIG, peft_type="LOHA")


def _dora(folder: Path) -> None:
    edit_json(folder / CONFIG, use_dora=True)


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (_truncate, f"{WEIGHTS}: not a whole safetensors file"),
        (_cut_header, f"{WEIGHTS}: not a whole safetensors file"),
        (_rename_file, f"{WEIGHTS}: no such file; an adapter folder holds {CONFIG} and {WEIGHTS}"),
        (_rename_tensor, "is not a lora_A or lora_B; nothing may be left unapplied"),
        (_rename_module, "layers.9.self_attn.q_proj"),
        (_drop_tensor, "must both be there"),
        (_spoil_value, "holds a value that is not finite"),
        (_break_json, f"{CONFIG}: not valid JSON"),
        (_other_rank, "do not fit rank 5"),
        (_other_method, "peft_type 'LOHA' is not supported; known: LORA"),
        (_dora, "is missing; use_dora is set"),
    ],
)
def test_damaged_adapter(llama: ServerFixture, client: Client, damage: Callable[[Path], None], fragment: str) -> None:
    adapter_id = f"damaged{damage.__name__}"
    hf_lora(llama.base, llama.adapters / adapter_id)
    damage(llama.adapters / adapter_id)
    refused_adapter(client, adapter_id, fragment)
