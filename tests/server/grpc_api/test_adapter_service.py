"""What the server says about itself: tokens, model, adapters, health, reflection, metrics."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from support.server_fixture import LLAMA_ADAPTERS, ServerFixture
from support.tiny import MAX_POSITIONS, VOCAB_SIZE

from quiver import Client
from quiver_peft import GPT, CanonicalAdaptersPEFTConfig, LoraPEFTConfig, PrefixPEFTConfig
from quiver_peft.adapters.methods.configs import METHOD_ORDER
from quiver_peft.tokenizer import Tokenizer

SERVICES = ["quiver.v1.GenerationService", "quiver.v1.AdapterService", "quiver.v1.ModelService"]


def buf_curl(target: str, *arguments: str) -> str:
    """What `buf curl` prints; it learns the messages from the server's reflection."""
    buf = Path(sys.executable).parent / "buf"
    command = [str(buf), "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments]
    command[-1] = f"http://{target}/{command[-1]}".rstrip("/")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tokenize(llama: ServerFixture, client: Client) -> None:
    text = "Where is my parcel? \N{SNOWMAN}"
    tokens = client.tokenize(text, pieces=True)
    ids = Tokenizer(llama.base).encode(text)
    assert list(tokens.token_ids) == ids
    assert len(tokens.pieces) == len(ids)
    assert "".join(tokens.pieces).startswith("Where is my parcel?")
    assert client.tokenize(text).pieces == ()
    by_text = client.generate(text, max_new_tokens=5)
    assert client.generate(ids, max_new_tokens=5).token_ids == by_text.token_ids


def test_get_model(llama: ServerFixture, client: Client) -> None:
    model = client.get_model()
    assert (model.name, model.architecture) == (llama.base.name, "llama")
    assert (model.vocab_size, model.context_length) == (VOCAB_SIZE, MAX_POSITIONS)
    assert (model.dtype, model.adapter_methods, model.default_max_new_tokens) == ("float32", METHOD_ORDER, 128)
    assert model.parameters == sum(parameter.numel() for parameter in llama.oracles[""].parameters())
    assert model.kv_capacity_tokens >= model.context_length
    assert len(model.fingerprint) >= 12
    assert model.server_version


def test_list_and_get_adapters(llama: ServerFixture, client: Client) -> None:
    loaded = client.load_adapter("pattern-r3")
    assert (loaded.state, loaded.rank, loaded.methods, loaded.running) == ("resident", 7, ("lora",), 0)
    assert loaded.device_bytes == 4 * loaded.parameters > 0
    assert loaded.host_bytes == 4 * loaded.parameters
    assert Path(loaded.source) == llama.adapters / "pattern-r3"
    listed = client.list_adapters()
    assert [adapter.id for adapter in listed] == sorted(adapter.id for adapter in listed)
    assert set(LLAMA_ADAPTERS) <= {adapter.id for adapter in listed}
    assert loaded in listed
    assert client.get_adapter("pattern-r3") == loaded


def test_adapter_names_its_base_and_describes_itself(llama: ServerFixture, client: Client) -> None:
    model = GPT.from_pretrained(llama.base)
    lora = LoraPEFTConfig(adapter_dim=3, target_modules=["attention_qkv", "mlp_fc2"])
    model.add_adapter([PrefixPEFTConfig(virtual_tokens=2), lora, CanonicalAdaptersPEFTConfig(adapter_dim=4)])
    model.save_adapter(llama.adapters / "described")
    assert client.get_adapter("described").description == "", "before its first load"
    loaded = client.load_adapter("described")
    assert loaded.base_fingerprint == client.get_model().fingerprint
    assert loaded.description == (
        "prefix of 2 tokens, lora rank 3 on attention.qkv, mlp.down, canonical width 4 after attention, mlp"
    )
    assert client.get_adapter("described") == loaded
    foreign = client.load_adapter("pattern-r3")
    assert (foreign.base_fingerprint, foreign.description) == (
        "",
        "lora rank 3 to 7 on attention.qkv, mlp.up",
    ), "Hugging Face's folders do not name a base"


def test_health(llama: ServerFixture, client: Client) -> None:
    assert client.is_healthy()
    with grpc.insecure_channel(llama.server.target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its methods have no types
        for service in ("", *SERVICES):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection(llama: ServerFixture, client: Client) -> None:
    request = {"text": "hello", "adapterId": "all-r2", "stopping": {"maxNewTokens": 3}}
    printed = buf_curl(llama.server.target, "-d", json.dumps(request), "quiver.v1.GenerationService/Generate")
    answer = json.loads(printed)
    expected = client.generate("hello", adapter="all-r2", max_new_tokens=3)
    assert answer["candidates"][0]["tokenIds"] == list(expected.token_ids)
    assert answer["adapter"]["id"] == "all-r2"
    services = buf_curl(llama.server.target, "--list-services", "").split()
    assert set(SERVICES) <= set(services)


def test_metrics(llama: ServerFixture, client: Client) -> None:
    client.generate("hello", adapter="all-r2", max_new_tokens=3, ignore_eos=True)
    before = llama.server.metric("quiver_generated_tokens_total", adapter="all-r2")
    answer = client.generate("hello", adapter="all-r2", max_new_tokens=3, ignore_eos=True)
    families = {family.name: family for family in text_string_to_metric_families(llama.server.metrics_page())}
    assert llama.server.metric("quiver_generated_tokens_total", adapter="all-r2") - before == len(answer.token_ids)
    assert families["quiver_step_seconds"].type == "histogram"
    assert families["quiver_requests"].type == "counter"
    assert llama.server.metric("quiver_requests_total", adapter="all-r2", code="OK") >= 2
    assert llama.server.metric("quiver_adapter_loads_total", result="ok") >= 1
    assert llama.server.metric("quiver_resident_adapters") >= 1
    assert llama.server.metric("quiver_adapter_free_bytes") > 0


def test_refused_names_do_not_become_labels(llama: ServerFixture, client: Client) -> None:
    """Else anybody could fill the server's memory with labels."""
    for name in ("made-up-name", "../made-up-name"):
        try:
            client.generate("hello", adapter=name)
        except Exception as error:
            assert "made-up-name" in str(error)
    assert "made-up-name" not in llama.server.metrics_page()
    assert llama.server.metric("quiver_requests_total", adapter="", code="NOT_FOUND") >= 1
