"""What is refused, with which status and words; and after each refusal the server answers as before."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from server.bench import Bench, make_base
from tiny import edit_json, edit_tensors, hf_lora, tiny_llama
from torch import Tensor

from quiver import AdapterNotFound, BaseMismatch, Client, InvalidRequest, QuiverClientError
from quiver.v1 import generation_pb2, generation_pb2_grpc
from quiver_peft import GPT, LoraPEFTConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CONTEXT = 256


@pytest.fixture(autouse=True)
def still_serving(llama: Bench, client: Client) -> Iterator[None]:
    """Whatever was refused, base and adapter answer exactly afterwards, and nothing is left running."""
    yield
    llama.check(client)
    llama.check(client, "attention-r4")


def refusal(call: Callable[[], object], kind: type[QuiverClientError], fragment: str) -> QuiverClientError:
    """The error of a call that must be refused in these words."""
    with pytest.raises(kind) as caught:
        call()
    assert fragment in str(caught.value)
    return caught.value


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1.0}, "sampling.temperature is -1.0; it must be 0 or more"),
    ({"temperature": float("nan")}, "sampling.temperature is nan"),
    ({"temperature": float("inf")}, "sampling.temperature is inf"),
    ({"top_p": 0.0}, "sampling.top_p is 0.0; it must be above 0 and at most 1"),
    ({"top_p": 1.5}, "sampling.top_p is 1.5"),
    ({"top_p": float("nan")}, "sampling.top_p is nan"),
    ({"min_p": -0.5}, "sampling.min_p is -0.5; it must be from 0 to 1"),
    ({"min_p": 2.0}, "sampling.min_p is 2.0"),
    ({"repetition_penalty": 0.0}, "sampling.repetition_penalty is 0.0; it must be above 0"),
    ({"repetition_penalty": float("inf")}, "sampling.repetition_penalty is inf"),
    ({"presence_penalty": 2.5}, "sampling.presence_penalty is 2.5; it must be from -2 to 2"),
    ({"frequency_penalty": -3.0}, "sampling.frequency_penalty is -3.0; it must be from -2 to 2"),
    ({"frequency_penalty": float("nan")}, "sampling.frequency_penalty is nan"),
    ({"n": 0}, "sampling.n is 0; it must be from 1 to 16"),
    ({"n": 17, "temperature": 1.0}, "sampling.n is 17"),
    ({"n": 2}, "sampling.n is 2 with temperature 0: all candidates would be the same"),
    ({"max_new_tokens": 0}, "stopping.max_new_tokens is 0; it must be at least 1"),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, "stopping.min_new_tokens is 9; it must be at most 8"),
    ({"stop": ["x"] * 17}, "stopping.strings is 17; it must be at most 16 strings"),
    ({"stop": [""]}, "stopping.strings is an empty string"),
    ({"stop_token_ids": [320]}, "stopping.token_ids is 320; it must be below the vocabulary size 320"),
    ({"top_logprobs": 21}, "output.top_logprobs is 21; it must be at most 20"),
]


@pytest.mark.parametrize(("options", "fragment"), IMPOSSIBLE, ids=[str(options) for options, _ in IMPOSSIBLE])
def test_impossible_values(client: Client, options: dict[str, Any], fragment: str) -> None:
    error = refusal(lambda: client.generate("hello", **options), InvalidRequest, fragment)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason == "INVALID_REQUEST"
    assert isinstance(error, InvalidRequest)
    assert fragment.startswith(error.field_violations[0].field)


@pytest.mark.parametrize(
    ("prompt", "fragment"),
    [
        ("", "the prompt is empty; it must have at least one token"),
        ([], "the prompt is empty; it must have at least one token"),
        ([7, 320], "tokens.ids is 320; it must be below the vocabulary size 320"),
        ([7] * CONTEXT, f"the prompt has {CONTEXT} tokens; with at least one generated token it must fit"),
        ("parcel " * CONTEXT, f"must fit into the context of {CONTEXT}"),
    ],
    ids=["text", "tokens", "vocabulary", "context", "long text"],
)
def test_impossible_prompts(client: Client, prompt: str | list[int], fragment: str) -> None:
    refusal(lambda: client.generate(prompt), InvalidRequest, fragment)
    refusal(lambda: list(client.stream(prompt)), InvalidRequest, fragment)


def test_the_longest_prompt_gets_one_token(llama: Bench, client: Client) -> None:
    prompt = [7] * (CONTEXT - 1)
    answer = client.generate(prompt, max_new_tokens=50, ignore_eos=True)
    assert len(answer.token_ids) == 1
    assert answer.finish_reason == "length"


def test_a_request_without_prompt(llama: Bench) -> None:
    with grpc.insecure_channel(llama.server.target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(generation_pb2.GenerateRequest(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "the prompt is missing: set text or tokens" in (caught.value.details() or "")


def test_empty_text_to_tokenize(client: Client) -> None:
    refusal(lambda: client.tokenize(""), InvalidRequest, "text is empty; it must have at least one character")


@pytest.mark.parametrize("adapter_id", ["nobody", "attention-r5", "nobody@abcdef"])
def test_unknown_adapter(client: Client, adapter_id: str) -> None:
    fragment = f"no adapter has the id {adapter_id.partition('@')[0]!r}; ListAdapters names them all"
    error = refusal(lambda: client.generate("hello", adapter=adapter_id), AdapterNotFound, fragment)
    assert error.code is grpc.StatusCode.NOT_FOUND
    assert error.reason == "UNKNOWN_ADAPTER"
    refusal(lambda: list(client.stream("hello", adapter=adapter_id)), AdapterNotFound, fragment)


def test_unknown_adapter_to_manage(client: Client) -> None:
    for call in (client.load_adapter, client.unload_adapter, client.get_adapter):
        refusal(lambda call=call: call("nobody"), AdapterNotFound, "no adapter has the id 'nobody'")


def test_unknown_revision(client: Client) -> None:
    revision = client.load_adapter("attention-r4").revision
    assert client.generate("hello", adapter=f"attention-r4@{revision[:8]}", max_new_tokens=1).adapter is not None
    other = "0" * 12
    refusal(
        lambda: client.generate("hello", adapter=f"attention-r4@{other}"),
        AdapterNotFound,
        f"adapter 'attention-r4' has the revision {revision[:12]}, not {other}",
    )
    refusal(
        lambda: client.generate("hello", adapter="attention-r4@main"), InvalidRequest, "revision 'main' is malformed"
    )


@pytest.mark.parametrize("adapter_id", ["../x", "a/b", "..", ".hidden", "/etc", "a\\b", "a b", "ä", "x" * 129])
def test_paths_and_other_malformed_ids(client: Client, adapter_id: str) -> None:
    fragment = f"adapter_id {adapter_id!r} is malformed"
    refusal(lambda: client.generate("hello", adapter=adapter_id), InvalidRequest, fragment)
    for call in (client.load_adapter, client.unload_adapter, client.get_adapter):
        refusal(lambda call=call: call(adapter_id), InvalidRequest, fragment)
    refusal(lambda: client.load_adapter(adapter_id, source="attention-r4"), InvalidRequest, fragment)


def test_sources_outside_of_the_folder(llama: Bench, client: Client, tmp_path: Path) -> None:
    (llama.adapters / "way-out").symlink_to(tmp_path)
    for source in ("../llama", "/etc", str(tmp_path), "file:///etc", "s3://bucket/x", "way-out"):
        refusal(
            lambda source=source: client.load_adapter("outsider", source=source),
            InvalidRequest,
            f"source {source!r} is outside of the adapters folder",
        )
    refusal(
        lambda: client.load_adapter("outsider", source="not-there"),
        AdapterNotFound,
        f"source 'not-there' holds no {CONFIG}",
    )
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


def test_adapter_for_a_base_of_other_shapes(llama: Bench, client: Client, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "other", hidden_size=32)
    hf_lora(tmp_path / "other", llama.adapters / "other-shape")
    refused_adapter(client, "other-shape", "the adapter is for a linear of 32 inputs", BaseMismatch)
    with pytest.raises(BaseMismatch) as caught:
        client.generate("hello", adapter="other-shape")
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION


def test_adapter_for_another_family(llama: Bench, client: Client, gpt2_base: Path) -> None:
    hf_lora(gpt2_base, llama.adapters / "other-family", targets=["c_attn"])
    refused_adapter(client, "other-family", "target_modules ['c_attn'] match no linear of this base")


def test_adapter_whose_record_names_another_base(llama: Bench, client: Client, tmp_path: Path) -> None:
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
    edit_json(folder / CONFIG, peft_type="IA3")


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
        (_other_method, "peft_type 'IA3' is not supported; known: LORA"),
        (_dora, "use_dora = True is not supported (it would change the result)"),
    ],
)
def test_damaged_adapter(llama: Bench, client: Client, damage: Callable[[Path], None], fragment: str) -> None:
    adapter_id = f"damaged{damage.__name__}"
    hf_lora(llama.base, llama.adapters / adapter_id)
    damage(llama.adapters / adapter_id)
    refused_adapter(client, adapter_id, fragment)
