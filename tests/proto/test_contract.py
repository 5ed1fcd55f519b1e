"""The wire contract: its shape, its linter, and the committed stubs."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
from google.protobuf.message import Message

from quiver.v1 import adapters_pb2, generation_pb2, model_pb2

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "proto"
BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")

# Names and numbers that clients in the field rely on: never change one, only add.
FIELDS: dict[type[Message], str] = {
    generation_pb2.GenerateRequest: "adapter_id text tokens sampling stopping output request_id priority",
    generation_pb2.TokenIds: "ids",
    generation_pb2.Sampling: "temperature top_k top_p min_p repetition_penalty presence_penalty"
    " frequency_penalty seed n",
    generation_pb2.Stopping: "max_new_tokens min_new_tokens strings token_ids ignore_eos include_stop_string",
    generation_pb2.Output: "logprobs top_logprobs prompt_logprobs",
    generation_pb2.GenerateResponse: "candidates usage adapter request_id timing",
    generation_pb2.Candidate: "index text token_ids logprobs finish_reason prompt_logprobs",
    generation_pb2.TokenLogprob: "token_id logprob top",
    generation_pb2.Alternative: "token_id logprob",
    generation_pb2.Usage: "prompt_tokens generated_tokens cached_tokens virtual_tokens",
    generation_pb2.AdapterRef: "id revision methods",
    generation_pb2.Timing: "queue_seconds time_to_first_token_seconds total_seconds",
    generation_pb2.GenerateStreamResponse: "index text token_ids logprobs finish_reason usage adapter"
    " request_id timing prompt_logprobs",
    generation_pb2.ScoreRequest: "adapter_id text tokens continuations top_logprobs request_id",
    generation_pb2.Continuation: "text tokens",
    generation_pb2.ScoreResponse: "scores usage adapter request_id timing",
    generation_pb2.Score: "logprobs total_logprob is_greedy",
    generation_pb2.TokenizeRequest: "text pieces",
    generation_pb2.TokenizeResponse: "token_ids pieces",
    adapters_pb2.Adapter: "id revision methods source state device_bytes host_bytes pinned running waiting"
    " failure_reason base_fingerprint rank virtual_tokens parameters description disk_bytes aliases revisions",
    adapters_pb2.Alias: "name adapter_id revision",
    adapters_pb2.Revision: "revision state running device_bytes host_bytes disk_bytes pinned",
    adapters_pb2.LoadAdapterRequest: "adapter_id source pin tier",
    adapters_pb2.LoadAdapterResponse: "adapter",
    adapters_pb2.UnloadAdapterRequest: "adapter_id running",
    adapters_pb2.UnloadAdapterResponse: "freed_bytes",
    adapters_pb2.GetAdapterRequest: "adapter_id",
    adapters_pb2.GetAdapterResponse: "adapter",
    adapters_pb2.ListAdaptersResponse: "adapters",
    adapters_pb2.SetAliasRequest: "alias target",
    adapters_pb2.SetAliasResponse: "alias previous",
    adapters_pb2.DeleteAliasRequest: "alias",
    adapters_pb2.DeleteAliasResponse: "previous",
    adapters_pb2.WatchAdaptersResponse: "snapshot adapters removed_ids",
    model_pb2.GetModelResponse: "name architecture vocab_size context_length dtype device fingerprint"
    " parameters kv_capacity_tokens adapter_methods server_version default_max_new_tokens",
}


@pytest.mark.parametrize(("message", "names"), FIELDS.items())
def test_fields_are_numbered_from_1_in_this_order(message: type[Message], names: str) -> None:
    assert {field.name: field.number for field in message.DESCRIPTOR.fields} == {
        name: number for number, name in enumerate(names.split(), start=1)
    }


@pytest.mark.parametrize(
    ("module", "service", "methods"),
    [
        (generation_pb2, "GenerationService", {"Generate", "GenerateStream", "Score", "Tokenize"}),
        (
            adapters_pb2,
            "AdapterService",
            {
                *("LoadAdapter", "UnloadAdapter", "GetAdapter", "ListAdapters"),
                *("SetAlias", "DeleteAlias", "WatchAdapters"),
            },
        ),
        (model_pb2, "ModelService", {"GetModel"}),
    ],
)
def test_services_offer_these_methods(module: object, service: str, methods: set[str]) -> None:
    descriptor = module.DESCRIPTOR.services_by_name[service]  # pyright: ignore[reportAttributeAccessIssue]

    assert {method.name for method in descriptor.methods} == methods
    assert descriptor.full_name == f"quiver.v1.{service}"


@pytest.mark.parametrize("arguments", [("lint",), ("format", "-d", "--exit-code")])
def test_buf_is_content(arguments: tuple[str, ...]) -> None:
    assert BUF, "buf is missing: pip install 'quiver[dev]'"
    run = subprocess.run([BUF, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stdout + run.stderr


def test_every_message_field_and_value_is_explained() -> None:
    for path in (PROTO / "quiver" / "v1").glob("*.proto"):
        lines = path.read_text("utf-8").splitlines()
        for before, line in pairwise(lines):
            declares = re.match(r"\s*(message|enum|service|rpc|oneof) |.* = \d+;$", line)
            if declares:
                assert before.strip().startswith("//"), f"{path.name}: no comment above {line.strip()!r}"


def _generator_of_the_committed_stubs() -> str:
    text = (PROTO / "quiver" / "v1" / "generation_pb2_grpc.py").read_text("utf-8")
    found = re.search(r"GRPC_GENERATED_VERSION = '([^']+)'", text)
    assert found
    return found.group(1)


def test_the_committed_stubs_are_those_of_the_proto_files(tmp_path: Path) -> None:
    if version("grpcio-tools") != _generator_of_the_committed_stubs():
        pytest.skip("another version of grpcio-tools writes other stubs")
    sources = sorted((PROTO / "quiver" / "v1").glob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    plugins = [
        f"--plugin={name}={Path(sys.executable).parent / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    ]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", *plugins, *outputs, *map(str, sources)]
    subprocess.run(command, check=True, capture_output=True)

    fresh = {path.name: path.read_text("utf-8") for path in tmp_path.rglob("*_pb2*")}
    committed = {p.name: p.read_text("utf-8") for p in (PROTO / "quiver" / "v1").glob("*_pb2*")}

    assert fresh.keys() == committed.keys() and len(fresh) == 12
    changed = [name for name in fresh if fresh[name] != committed[name]]
    assert not changed, f"run `make proto`: {changed} are not what the .proto files say"
