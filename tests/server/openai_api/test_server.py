"""The HTTP API: errors in OpenAI's form, authentication, limits, model names, disconnects."""

import dataclasses
import json
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from support.live_server import eventually
from support.server_fixture import LLAMA_ADAPTERS, ServerFixture, running_server
from support.tiny import tiny_tokenizer
from transformers import AutoTokenizer

from quiver import Client
from quiver_server.openai_api.parameters import CHAT_PARAMETERS, COMPLETION_PARAMETERS
from quiver_server.requests.prompt_request import GenerationRequest

ADMIN, SUPPORT, SLOW = (f"{name}-token-{'x' * 16}" for name in ("admin", "support", "slow"))
TOKENS = f"""
[[token]]
name = "operations"
token = "{ADMIN}"
role = "admin"

[[token]]
name = "support"
token = "{SUPPORT}"
adapters = ["attention-*"]
base = false
max_concurrent = 2

[[token]]
name = "slow"
token = "{SLOW}"
requests_per_second = 0.5
"""


@pytest.fixture
def http(llama: ServerFixture) -> Iterator[OpenAI]:
    with llama.server.openai() as client:
        yield client


@pytest.fixture(scope="module")
def guarded(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    folder = tmp_path_factory.mktemp("guarded")
    base = folder / "base"
    shutil.copytree(llama_base, base)
    tiny_tokenizer(base, add_bos=True)  # which a chat template writes itself
    tokens = folder / "tokens.toml"
    tokens.write_text(TOKENS)
    settings = {name: LLAMA_ADAPTERS[name] for name in ("attention-r4", "all-r2")}
    with running_server(folder, base, settings, "--http-port", "0", "--token-file", str(tokens)) as bench:
        yield bench
        assert not [token for token in (ADMIN, SUPPORT, SLOW) if token in bench.server.log.read_text()]


def post(
    bench: ServerFixture, body: bytes | dict[str, Any], path: str = "completions", **headers: str
) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
    return httpx2.post(f"{bench.server.http_url}/v1/{path}", content=content, headers=headers, timeout=60)


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    """The error, which has OpenAI's four keys."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"temperature": -1}, "temperature", "temperature is -1.0; it must be 0 or more"),
        ({"temperature": "hot"}, "temperature", "temperature must be a number"),
        ({"temperature": True}, "temperature", "temperature must be a number"),
        ({"temperature": 10**400}, "temperature", "a finite number"),
        ({"temperature": float("nan")}, "temperature", "it must be 0 or more"),
        ({"top_p": 0}, "top_p", "top_p is 0.0; it must be above 0"),
        ({"n": 0}, "n", "n is 0; it must be from 1"),
        ({"n": 1.5}, "n", "a whole number from 0"),
        ({"n": 2, "temperature": 0}, "n", "n is 2 with temperature 0"),
        ({"seed": -1}, "seed", "a whole number from 0"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be at least 1"),
        ({"max_tokens": 2**40}, "max_tokens", "a whole number from 0 to 4294967295"),
        ({"stop": ["a", ""]}, "stop", "without empty strings"),
        ({"stop": [1]}, "stop", "a text or a list of texts"),
        ({"presence_penalty": 3}, "presence_penalty", "it must be from -2 to 2"),
        ({"logprobs": 21}, "logprobs", "logprobs is 21; it must be at most 20"),
        ({"logprobs": True}, "logprobs", "a whole number"),
        ({"ignore_eos": 1}, "ignore_eos", "true or false"),
        ({"stop_token_ids": 3}, "stop_token_ids", "a list of token ids"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "is for streams"),
        ({"stream": True, "stream_options": []}, "stream_options", "must be an object"),
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": None}, "prompt", "a text or a list of token ids"),
        ({"prompt": []}, "prompt", "the prompt is empty"),
        ({"prompt": [1, True]}, "prompt", "a text or a list of token ids"),
        ({"prompt": [1, "a"]}, "prompt[0]", "prompt[0] must be a text or a list of token ids"),
        ({"prompt": ["a", ["b"]]}, "prompt[1]", "prompt[1] must be a text or a list of token ids"),
        ({"prompt": ["a", ""]}, "prompt[1]", "prompt[1]: the prompt is empty"),
        ({"prompt": ["a", "b", [99999]]}, "prompt[2]", "prompt[2] is 99999; it must be below the vocabulary size"),
        ({"prompt": ["x" * 300, "b"]}, "prompt[0]", "prompt[0]: the prompt has 300 tokens; with at least one"),
        ({"prompt": ["a", "b"], "temperature": -1}, "temperature", "temperature is -1.0; it must be 0 or more"),
        ({"prompt": ["a"] * 289}, None, "asks for 289 sequences at once; this server holds 288 of one adapter"),
        ({"prompt": ["a"] * 19, "n": 16}, None, "asks for 304 sequences at once; this server holds 288"),
        ({"echo": 1}, "echo", "echo must be true or false"),
        ({"prompt": [99999]}, "prompt", "prompt is 99999; it must be below the vocabulary size"),
        ({"prompt": [5] * 300}, "prompt", "it must fit into the context of 256"),
        ({"prompt": "x" * 300}, "prompt", "it must fit into the context of 256"),
        ({"model": None}, "model", "model is missing"),
        ({"model": 3}, "model", "model is missing"),
        ({"model": "all-r2@zz"}, "model", "revision 'zz' is malformed"),
    ],
)
def test_impossible_values_name_their_parameter(
    llama: ServerFixture, still_serving: None, changes: dict[str, Any], param: str, words: str
) -> None:
    answer = post(llama, {"model": "all-r2", "prompt": "hello", **changes})
    error = error_of(answer)
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert words in error["message"]


@pytest.mark.parametrize(
    "name", ["best_of", "suffix", "logit_bias", "tools", "response_format", "priority", "made_up", "messages"]
)
def test_unsupported_parameters_are_refused_by_name(llama: ServerFixture, name: str) -> None:
    """Values without effect, and null, are accepted."""
    body = {"model": "all-r2", "prompt": "hello", "max_tokens": 1}
    answer = post(llama, {**body, name: [{"x": 1}]})
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter")
    assert f"{name} is not supported by this server" in error["message"]
    nothing = {"best_of": 1, "logit_bias": {}, "response_format": {"type": "text"}}
    assert post(llama, {**body, name: nothing.get(name)}).status_code == 200


def test_every_parameter_sets_a_field_of_the_request() -> None:
    fields = {field.name for field in dataclasses.fields(GenerationRequest)}
    assert {parameter.field for parameter in {**COMPLETION_PARAMETERS, **CHAT_PARAMETERS}.values()} <= fields


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"prompt": "\\ud800", "model": "all-r2"}', "not valid JSON"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "must hold a JSON object, not list"),
    ],
)
def test_invalid_json_bodies_are_rejected(llama: ServerFixture, still_serving: None, body: bytes, words: str) -> None:
    answer = post(llama, body)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_request")
    assert words in error_of(answer)["message"]


def test_http_errors_have_openai_form(llama: ServerFixture) -> None:
    url = llama.server.http_url
    for status, code, answer in (
        (404, "unknown_url", httpx2.get(f"{url}/v2/models")),
        (405, "method_not_allowed", httpx2.get(f"{url}/v1/completions")),
        (413, "request_too_large", post(llama, b'"' + b"x" * (17 * 2**20) + b'"')),
        (415, "unsupported_media_type", post(llama, {"model": "all-r2"}, content_type="text/plain")),
    ):
        assert (answer.status_code, error_of(answer)["code"]) == (status, code)


@pytest.mark.parametrize("model", ["nobody", "meta-llama/Llama-3", "all-r2@000000", "../all-r2", "ALL-R2"])
def test_unknown_model_is_not_found(llama: ServerFixture, http: OpenAI, model: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as caught:
            http.completions.create(model=model, prompt="hello", stream=stream)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        http.chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}])


def test_models(llama: ServerFixture, http: OpenAI, client: Client) -> None:
    loaded = client.load_adapter("pattern-r3")
    listed = {model.id: model for model in http.models.list()}
    assert {llama.base.name, *LLAMA_ADAPTERS} <= set(listed)
    assert listed[llama.base.name].revision == client.get_model().fingerprint  # type: ignore[attr-defined]
    model = http.models.retrieve("pattern-r3")
    assert model == listed["pattern-r3"]
    assert (model.revision, model.parent, model.state) == (loaded.revision, llama.base.name, "resident")  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        http.models.retrieve("nobody")
    at = f"pattern-r3@{loaded.revision[:12]}"
    answer = http.completions.create(model=at, prompt="hello", max_tokens=1)
    assert (answer.model, answer.system_fingerprint) == ("pattern-r3", loaded.revision)


def test_an_alias_is_a_model(llama: ServerFixture, http: OpenAI, client: Client) -> None:
    exact = client.load_adapter("one-r1")
    client.set_alias("live-over-http", "one-r1")
    listed = {model.id: model for model in http.models.list()}
    alias = listed["live-over-http"]
    assert (alias.root, alias.revision) == (f"one-r1@{exact.revision}", exact.revision)  # type: ignore[attr-defined]
    assert alias.parent == llama.base.name  # type: ignore[attr-defined]
    assert http.models.retrieve("live-over-http") == alias
    answer = http.completions.create(model=alias.id, prompt="hello", max_tokens=4, temperature=0)
    assert (answer.model, answer.system_fingerprint) == ("one-r1", exact.revision)
    client.delete_alias("live-over-http")
    assert "live-over-http" not in {model.id for model in http.models.list()}
    with pytest.raises(openai.NotFoundError):
        http.models.retrieve("live-over-http")


def test_ambiguous_model_name_is_refused(llama: ServerFixture) -> None:
    llama.add(llama.base.name, rank=2, targets=["q_proj"], seed=40)
    answer = post(llama, {"model": llama.base.name, "prompt": "hello", "max_tokens": 1})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "model")
    assert "is the base and an adapter" in error_of(answer)["message"]
    (llama.adapters / llama.base.name).rename(llama.adapters / "called-otherwise")
    assert post(llama, {"model": llama.base.name, "prompt": "hello", "max_tokens": 1}).status_code == 200


def test_a_broken_adapter_is_its_own_requests_failure(llama: ServerFixture, still_serving: None) -> None:
    llama.add("broken-over-http", rank=2, targets=["q_proj"], seed=41)
    (llama.adapters / "broken-over-http" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    answer = post(llama, {"model": "broken-over-http", "prompt": "hello", "stream": True})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "malformed_adapter")


def test_request_ids(llama: ServerFixture) -> None:
    body = {"model": "all-r2", "prompt": "hello", "max_tokens": 1}
    for changes in ({}, {"stream": True}, {"n": 0}):
        answer = post(llama, {**body, **changes}, x_request_id="mine-7")
        assert answer.headers["x-request-id"] == "mine-7"
    made = [post(llama, body) for _ in range(2)]
    assert made[0].headers["x-request-id"] != made[1].headers["x-request-id"]
    assert made[0].json()["id"] == f"cmpl-{made[0].headers['x-request-id']}"
    refused = post(llama, body, x_request_id="x" * 129)
    assert (refused.status_code, error_of(refused)["param"]) == (400, "x-request-id")
    assert refused.headers["x-request-id"] != "x" * 129


def test_the_end_of_a_stream_on_the_wire(llama: ServerFixture) -> None:
    answer = post(llama, {"model": "all-r2", "prompt": "hello", "max_tokens": 3, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


@pytest.mark.parametrize("token", ["", "nobody's", SUPPORT[:-1]])
def test_requests_without_token_are_unauthenticated(guarded: ServerFixture, token: str) -> None:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    answer = post(guarded, {"model": "all-r2", "prompt": "x"}, **headers)
    error = error_of(answer)
    assert (answer.status_code, error["type"], error["code"]) == (401, "authentication_error", "unauthenticated")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert not token or token not in answer.text
    with guarded.server.openai(token or "none") as http, pytest.raises(openai.AuthenticationError):
        http.models.list()
    for path in ("health", "health/ready", "health/live"):
        probed = httpx2.get(f"{guarded.server.http_url}/{path}")
        assert (probed.status_code, "x-request-id" in probed.headers) == (200, False), "what probes it has no token"


def test_a_token_reaches_its_models_only(guarded: ServerFixture) -> None:
    with guarded.server.openai(SUPPORT) as http:
        with guarded.server.client(ADMIN) as client:
            for alias in ("attention-live", "all-live"):
                client.set_alias(alias, "attention-r4")
        assert [model.id for model in http.models.list()] == ["attention-r4", "attention-live"]
        assert http.completions.create(model="attention-r4", prompt="x", max_tokens=1).choices
        for model in ("all-r2", "all-live", "nobody", guarded.base.name):
            with pytest.raises(openai.PermissionDeniedError, match="does not allow"):
                http.completions.create(model=model, prompt="x")
            with pytest.raises(openai.PermissionDeniedError, match="does not allow"):
                http.models.retrieve(model)


def test_the_metrics_page_names_all_adapters_and_is_for_admins(guarded: ServerFixture) -> None:
    for token, status in ((ADMIN, 200), (SUPPORT, 403), ("nobody's", 401)):
        page = httpx2.get(f"{guarded.server.http_url}/metrics", headers={"authorization": f"Bearer {token}"})
        assert page.status_code == status


def test_a_chats_prompt_has_its_special_tokens_once(guarded: ServerFixture) -> None:
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    tokenizer: Any = AutoTokenizer.from_pretrained(guarded.base)  # type: ignore[no-untyped-call]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    with guarded.server.openai(ADMIN) as http:
        answer = http.chat.completions.create(model="all-r2", messages=messages, max_tokens=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected)


def test_limits_are_429_with_a_hint(guarded: ServerFixture) -> None:
    with guarded.server.openai(SLOW) as http:
        http.completions.create(model="all-r2", prompt="x", max_tokens=1)
        with pytest.raises(openai.RateLimitError, match=r"limit is 0\.5 requests per second") as caught:
            http.completions.create(model="all-r2", prompt="x", max_tokens=1)
        headers = caught.value.response.headers
        assert 1 <= int(headers["Retry-After"]) <= 2
        assert 0 < int(headers["retry-after-ms"]) <= 2000
    for prompt, n in (("x", 3), (["x", "y", "z"], 1), (["x", "y"], 2)):
        with guarded.server.openai(SUPPORT) as http, pytest.raises(openai.RateLimitError, match="its limit is 2"):
            http.completions.create(model="attention-r4", prompt=prompt, n=n)


def test_a_client_that_is_gone_frees_its_place(guarded: ServerFixture) -> None:
    """Streaming or not, one prompt or several; the token's own limit shows it."""
    body: dict[str, Any] = {"model": "attention-r4", "max_tokens": 200, "ignore_eos": True}
    two: list[dict[str, Any]] = [{"prompt": "x", "n": 2}, {"prompt": ["x", "y"]}]
    for stream, prompts in product((True, False), two):
        content = json.dumps({**body, **prompts, "stream": stream}).encode()
        host, port = guarded.server.http_url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SUPPORT}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            raw.sendall(head.encode() + content)
            eventually(lambda: guarded.server.metric("quiver_running_sequences") == 2)
        eventually(lambda: guarded.server.metric("quiver_running_sequences") == 0, 5)
    assert guarded.server.metric("quiver_requests_total", adapter="attention-r4", code="CANCELLED") == 4
    with guarded.server.openai(SUPPORT) as http:
        assert http.completions.create(model="attention-r4", prompt="x", n=2, max_tokens=1).choices


def test_bytes_that_are_no_http_are_not_logged(guarded: ServerFixture) -> None:
    """What a client sends by mistake may hold its token."""
    host, port = guarded.server.http_url.removeprefix("http://").split(":")
    for nonsense in (f"Authorization: Bearer {ADMIN}\r\n\r\n", f"GET / HTTP/1.1\r\nAuthorization {ADMIN}\x00\r\n\r\n"):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(nonsense.encode())
            raw.settimeout(10)
            assert raw.recv(4096).startswith(b"HTTP/1.")
    with guarded.server.openai(ADMIN) as http:
        assert http.models.list().data
    assert ADMIN not in guarded.server.log.read_text()


def test_many_connections_that_say_nothing_hold_nobody_up(guarded: ServerFixture) -> None:
    host, port = guarded.server.http_url.removeprefix("http://").split(":")
    with ExitStack() as idle, guarded.server.openai(ADMIN) as http:
        for _ in range(300):
            idle.enter_context(socket.create_connection((host, int(port))))
        assert http.completions.create(model="all-r2", prompt="x", max_tokens=2).choices
