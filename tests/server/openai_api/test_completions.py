"""`/v1/completions` with OpenAI's own client over a real socket: what gRPC answers, token for token."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import OpenAI
from openai.types import Completion
from support.http_completions import PROMPT, SAMPLED, assert_adds_up, complete, ids, stream
from support.server_fixture import LLAMA_ADAPTERS, ServerFixture

from quiver import Client, FinishReason, Generation


@pytest.fixture
def http(llama: ServerFixture) -> Iterator[OpenAI]:
    with llama.server.openai() as client:
        yield client


def same(answer: Completion, expected: Generation) -> None:
    """All that both say."""
    assert [ids(choice) for choice in answer.choices] == [item.token_ids for item in expected.candidates]
    assert [choice.text for choice in answer.choices] == [item.text for item in expected.candidates]
    reasons = ["length" if c.finish_reason is FinishReason.LENGTH else "stop" for c in expected.candidates]
    assert [choice.finish_reason for choice in answer.choices] == reasons
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.usage.completion_tokens == expected.usage.generated_tokens
    assert answer.usage.total_tokens == expected.usage.prompt_tokens + expected.usage.generated_tokens


@pytest.mark.parametrize("adapter", ["", *LLAMA_ADAPTERS])
def test_each_model_answers_as_hugging_face_does(llama: ServerFixture, http: OpenAI, adapter: str) -> None:
    answer = complete(http, adapter or llama.base.name, max_tokens=10, ignore_eos=True)
    expected = llama.expected(adapter, PROMPT, 10)
    assert list(ids(answer.choices[0]))[: len(expected)] == expected
    assert answer.model == (adapter or llama.base.name)
    with llama.server.client() as client:
        told = client.generate(PROMPT, adapter=adapter, max_new_tokens=10, ignore_eos=True)
        revision = client.get_model().fingerprint if told.adapter is None else told.adapter.revision
    same(answer, told)
    assert answer.system_fingerprint == revision


@pytest.mark.parametrize(
    ("over_http", "over_grpc"),
    [
        (SAMPLED, SAMPLED),
        ({**SAMPLED, "n": 3}, {**SAMPLED, "n": 3}),
        ({**SAMPLED, "top_k": 5, "min_p": 0.02}, {**SAMPLED, "top_k": 5, "min_p": 0.02}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        (
            {"presence_penalty": 1.5, "frequency_penalty": -0.5, "max_tokens": 30},
            {"presence_penalty": 1.5, "frequency_penalty": -0.5, "max_new_tokens": 30},
        ),
        ({"max_tokens": 40, "min_tokens": 30}, {"max_new_tokens": 40, "min_new_tokens": 30}),
        ({"max_tokens": 40, "ignore_eos": True}, {"max_new_tokens": 40, "ignore_eos": True}),
    ],
)
def test_parameters_mean_what_they_mean_over_grpc(
    http: OpenAI, client: Client, over_http: dict[str, Any], over_grpc: dict[str, Any]
) -> None:
    answer = complete(http, "all-r2", **over_http)
    options: dict[str, Any] = {"max_new_tokens": 12, **over_grpc}
    same(answer, client.generate(PROMPT, adapter="all-r2", **options))


def test_what_is_unset_is_drawn_as_openai_draws_it(http: OpenAI, client: Client) -> None:
    """At temperature 1, where gRPC is greedy."""
    answer = http.completions.create(
        model="all-r2", prompt=PROMPT, seed=11, extra_body={"return_token_ids": True}, max_tokens=12
    )
    same(answer, client.generate(PROMPT, adapter="all-r2", temperature=1.0, seed=11, max_new_tokens=12))


def test_stops(http: OpenAI, client: Client) -> None:
    whole = client.generate(PROMPT, adapter="all-r2", max_new_tokens=20, ignore_eos=True)
    word = whole.text[6:8]
    for kept in (False, True):
        answer = complete(
            http, "all-r2", max_tokens=20, stop=["never there", word], include_stop_str_in_output=kept, ignore_eos=True
        )
        options: dict[str, Any] = {"stop": [word], "include_stop_string": kept}
        same(answer, client.generate(PROMPT, adapter="all-r2", max_new_tokens=20, ignore_eos=True, **options))
        assert (answer.choices[0].finish_reason, word in answer.choices[0].text) == ("stop", kept)
    third = whole.token_ids[2]
    answer = complete(http, "all-r2", max_tokens=20, stop_token_ids=[third], ignore_eos=True)
    assert ids(answer.choices[0]) == whole.token_ids[: whole.token_ids.index(third) + 1]


@pytest.mark.parametrize("prompt", ["Where is my parcel? \N{SNOWMAN}", PROMPT, [PROMPT], ["one of one"]])
def test_a_prompt_is_a_text_or_token_ids_or_a_list_of_one(http: OpenAI, client: Client, prompt: Any) -> None:
    alone = prompt[0] if isinstance(prompt, list) and not isinstance(prompt[0], int) else prompt
    same(complete(http, "mlp-r8", prompt), client.generate(alone, adapter="mlp-r8", max_new_tokens=12))


def test_log_probabilities(http: OpenAI, client: Client) -> None:
    answer = complete(http, "all-r2", logprobs=3, max_tokens=8, ignore_eos=True)
    (expected,) = client.generate(
        PROMPT, adapter="all-r2", top_logprobs=3, max_new_tokens=8, ignore_eos=True
    ).candidates
    told = answer.choices[0].logprobs
    assert told is not None and told.tokens is not None and told.text_offset is not None
    assert told.token_logprobs == [item.logprob for item in expected.logprobs]
    assert told.top_logprobs is not None
    for ours, theirs in zip(told.top_logprobs, expected.logprobs, strict=True):
        assert max(ours.values()) == theirs.top[0].logprob
        assert set(ours.values()) <= {item.logprob for item in theirs.top}
    assert told.text_offset[0] == 0 and told.text_offset == sorted(told.text_offset)
    none = complete(http, "all-r2", logprobs=0, max_tokens=2).choices[0].logprobs
    assert none is not None and none.top_logprobs == [{}, {}]
    assert complete(http, "all-r2", max_tokens=2).choices[0].logprobs is None


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_adds_up_to_the_whole(http: OpenAI, usage: bool) -> None:
    parameters: dict[str, Any] = {**SAMPLED, "n": 2, "logprobs": 1, "max_tokens": 30}
    whole = complete(http, "keys-r16", **parameters)
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = stream(http, "keys-r16", **parameters, **options)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}
    if usage:
        last = chunks.pop()
        assert last.choices == []
        assert last.usage is not None and whole.usage is not None
        assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks)
    assert_adds_up(chunks, whole)


def test_both_faces_at_once_share_one_batch(llama: ServerFixture, http: OpenAI, client: Client) -> None:
    """24 requests, every model, half over HTTP and half over gRPC."""
    names = ["", *LLAMA_ADAPTERS]

    def ask(number: int) -> tuple[int, ...]:
        adapter = names[number % len(names)]
        prompt = [5 + (number * 31 + i * 17) % 300 for i in range(6 + number)]
        if number % 2:
            answer = complete(http, adapter or llama.base.name, prompt, ignore_eos=True)
            return ids(answer.choices[0])
        return client.generate(prompt, adapter=adapter, max_new_tokens=12, ignore_eos=True).token_ids

    with ThreadPoolExecutor(24) as threads:
        together = list(threads.map(ask, range(24)))
    assert together == [ask(number) for number in range(24)]
