"""`/v1/chat/completions`: the base's own template, and the answers that gRPC gives to what it renders."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion
from support.server_fixture import ServerFixture
from transformers import AutoTokenizer

from quiver import Client

MESSAGES: list[Any] = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": " Where is my parcel?\n"},
    {"role": "assistant", "content": "Lost."},
    {"role": "user", "content": [{"type": "text", "text": "And the "}, {"type": "text", "text": "box?"}]},
]
AS_TEXT = [*MESSAGES[:-1], {"role": "user", "content": "And the box?"}]


@pytest.fixture
def http(llama: ServerFixture) -> Iterator[OpenAI]:
    with llama.server.openai() as client:
        yield client


def rendered(llama: ServerFixture) -> list[int]:
    """What transformers makes of the messages."""
    tokenizer: Any = AutoTokenizer.from_pretrained(llama.base)  # type: ignore[no-untyped-call]
    return tokenizer.apply_chat_template(AS_TEXT, add_generation_prompt=True, return_dict=False)


def chat(http: OpenAI, model: str, **parameters: Any) -> ChatCompletion:
    asked: dict[str, Any] = {"temperature": 0.0, **parameters}
    return http.chat.completions.create(model=model, messages=MESSAGES, extra_body={"return_token_ids": True}, **asked)


def test_the_prompt_is_what_transformers_makes_of_the_messages(
    llama: ServerFixture, http: OpenAI, client: Client
) -> None:
    prompt = rendered(llama)
    for adapter in ("", "all-r2"):
        answer = chat(http, adapter or llama.base.name, max_completion_tokens=16, logprobs=True, top_logprobs=2)
        expected = client.generate(prompt, adapter=adapter, max_new_tokens=16, top_logprobs=2)
        assert answer.usage is not None and answer.usage.prompt_tokens == len(prompt)
        (choice,) = answer.choices
        assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
        assert tuple(getattr(choice, "token_ids")) == expected.token_ids  # noqa: B009
        assert choice.logprobs is not None and choice.logprobs.content is not None
        told = [(item.logprob, [top.logprob for top in item.top_logprobs]) for item in choice.logprobs.content]
        logprobs = expected.candidates[0].logprobs
        assert told == [(item.logprob, [top.logprob for top in item.top]) for item in logprobs]
        for item in choice.logprobs.content:
            assert item.bytes is None or bytes(item.bytes).decode() == item.token


def test_a_stream_says_whose_turn_it_is_and_adds_up_to_the_whole(http: OpenAI) -> None:
    parameters: dict[str, Any] = {"temperature": 1.0, "seed": 3, "n": 2, "max_tokens": 20}
    whole = chat(http, "mlp-r8", **parameters)
    stream = http.chat.completions.create(
        model="mlp-r8", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **parameters
    )
    *chunks, last = list(stream)
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    for expected in whole.choices:
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == expected.index]
        assert [choice.delta.role for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
        assert "".join(choice.delta.content or "" for choice in choices) == expected.message.content
        assert choices[-1].finish_reason == expected.finish_reason


def test_an_answer_can_be_sent_back_as_it_came(http: OpenAI) -> None:
    """As a client's model dumps it: with the keys of tools and audio, all null."""
    first = chat(http, "all-r2", max_tokens=4).choices[0].message
    messages: list[Any] = [*AS_TEXT, first, {"role": "user", "content": "Again."}]
    assert http.chat.completions.create(model="all-r2", messages=messages, max_tokens=4).choices


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        ([], "messages", "at least one message"),
        ("hello", "messages", "at least one message"),
        (["hello"], "messages[0]", "an object with role and content"),
        ([{"content": "x"}], "messages[0].role", "must be a text"),
        ([{"role": "user"}], "messages[0].content", "a text or a list of parts"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content", "a part without a text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content",
            "'image_url'; this server reads texts only",
        ),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
            "messages[0].tool_calls",
            "tool_calls is not supported",
        ),
        ([{"role": "tool", "content": "x"}], "messages", "template refuses these messages: no such role: tool"),
    ],
)
def test_messages_that_break_a_rule(http: OpenAI, messages: Any, param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        http.chat.completions.create(model="all-r2", messages=messages)
    assert caught.value.param == param
    assert words in str(caught.value)


def test_a_base_without_a_template_says_so(gpt2: ServerFixture) -> None:
    with gpt2.server.openai() as http:
        with pytest.raises(openai.BadRequestError, match=r"no chat template.*chat_template\.jinja") as caught:
            http.chat.completions.create(model="fused-r4", messages=MESSAGES)
        assert caught.value.code == "no_chat_template"
        assert http.completions.create(model="fused-r4", prompt="hello", max_tokens=2).choices
