"""`echo`: the prompt before its answer, and how likely transformers holds each of its tokens."""

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from openai.types import CompletionChoice
from support.http_completions import PROMPT, SAMPLED, assert_adds_up, complete, ids, stream
from support.logprobs import hf_logprobs
from support.server_fixture import ServerFixture
from support.tiny import assert_close, random_prompts, random_tokens
from torch import Tensor
from transformers import AutoTokenizer

from quiver import Client

LENGTHS = (3, 110, 2, 30)  # the second one takes several steps
SENTENCE = "The box \N{SNOWMAN} was broken."


@pytest.fixture
def http(llama: ServerFixture) -> Iterator[OpenAI]:
    with llama.server.openai() as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(llama: ServerFixture) -> Any:
    return AutoTokenizer.from_pretrained(llama.base)  # type: ignore[no-untyped-call]


def assert_told(choice: CompletionChoice, prompt: list[int], rows: Tensor, num_top: int, tokenizer: Any) -> None:
    """Of prompt and answer the choice tells what transformers does. rows: [number of their tokens, V]"""
    tokens = [*prompt, *ids(choice)]
    told = choice.logprobs
    assert told is not None and told.token_logprobs and told.top_logprobs and told.tokens and told.text_offset
    assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
    assert told.tokens == [tokenizer.decode([token]) for token in tokens]
    chosen = rows[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert_close(torch.tensor(told.token_logprobs[1:]), chosen)
    best = torch.tensor([max(top.values()) for top in told.top_logprobs[1:]])
    assert_close(best, rows[:-1].max(-1).values)
    assert all(len(top) <= num_top for top in told.top_logprobs[1:])
    for i, offset in enumerate(told.text_offset):
        before = tokenizer.decode(tokens[:i][: len(prompt)], skip_special_tokens=True)
        before += tokenizer.decode(tokens[len(prompt) : i], skip_special_tokens=True)
        assert offset == len(before) or (before.endswith("\N{REPLACEMENT CHARACTER}") and offset < len(before))


@pytest.mark.parametrize("adapter", ["", "pattern-r3"])
@pytest.mark.parametrize("max_tokens", [0, 1, 8])
def test_prompts_are_scored_as_transformers_does(
    llama: ServerFixture, http: OpenAI, tokenizer: Any, adapter: str, max_tokens: int
) -> None:
    """Several of different lengths at once."""
    prompts = random_prompts(LENGTHS, seed=21)
    name = adapter or llama.base.name
    answer = complete(http, name, prompts, echo=True, logprobs=3, max_tokens=max_tokens, ignore_eos=True)
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        assert (len(ids(choice)), choice.finish_reason) == (max_tokens, "length")
        rows = hf_logprobs(llama, adapter, [*prompt, *ids(choice)])
        assert_told(choice, prompt, rows, 3, tokenizer)
        assert list(ids(choice)) == rows[len(prompt) - 1 : -1].argmax(-1).tolist()
        if not max_tokens:
            assert choice.text == tokenizer.decode(prompt)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (sum(LENGTHS), max_tokens * len(LENGTHS))


def test_what_an_evaluation_harness_reads(llama: ServerFixture, http: OpenAI) -> None:
    """As lm-eval's local-completions asks, and as it reads: the sum over a continuation, and whether it is greedy."""
    contexts = random_prompts((5, 20, 9), seed=50)
    greedy = [llama.expected("all-r2", context, 6) for context in contexts]
    other = random_prompts((4, 6, 1), seed=60)
    for continuations, is_greedy in ((greedy, True), (other, False)):
        prompts = [context + continuation for context, continuation in zip(contexts, continuations, strict=True)]
        answer = complete(http, "all-r2", prompts, max_tokens=1, logprobs=1, seed=1234, echo=True)
        for choice, context, prompt in zip(answer.choices, contexts, prompts, strict=True):
            told = choice.logprobs
            assert told is not None and told.token_logprobs is not None and told.top_logprobs is not None
            values = told.token_logprobs[len(context) : -1]
            tops = told.top_logprobs[len(context) : -1]
            rows = hf_logprobs(llama, "all-r2", prompt)
            expected = sum(float(rows[i - 1, prompt[i]]) for i in range(len(context), len(prompt)))
            assert math.isclose(sum(values), expected, abs_tol=1e-3)
            assert all(value == max(top.values()) for value, top in zip(values, tops, strict=True)) == is_greedy


@pytest.mark.parametrize("max_tokens", [0, 12])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_a_stream_adds_up_to_the_whole(http: OpenAI, max_tokens: int, logprobs: int | None) -> None:
    parameters: dict[str, Any] = {**SAMPLED, "n": 2, "echo": True, "logprobs": logprobs, "max_tokens": max_tokens}
    whole = complete(http, "mlp-r8", [SENTENCE, PROMPT], **parameters)
    assert_adds_up(stream(http, "mlp-r8", [SENTENCE, PROMPT], **parameters), whole)
    assert [choice.text.startswith(SENTENCE) for choice in whole.choices] == [True, True, False, False]
    assert [len(ids(choice)) <= max_tokens for choice in whole.choices] == [True] * 4


def test_the_answer_is_what_it_is_without(http: OpenAI, client: Client, tokenizer: Any) -> None:
    parameters: dict[str, Any] = {**SAMPLED, "max_tokens": 20, "stop": ["e"], "logprobs": 2}
    for prompt in (SENTENCE, PROMPT):
        with_prompt = complete(http, "all-r2", prompt, echo=True, **parameters).choices[0]
        alone = complete(http, "all-r2", prompt, **parameters).choices[0]
        text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        assert (with_prompt.text, ids(with_prompt)) == (text + alone.text, ids(alone))
        assert with_prompt.logprobs and alone.logprobs and with_prompt.logprobs.tokens and alone.logprobs.tokens
        num_prompt = len(with_prompt.logprobs.tokens) - len(alone.logprobs.tokens)
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            assert getattr(with_prompt.logprobs, name)[num_prompt:] == getattr(alone.logprobs, name)
        offsets = with_prompt.logprobs.text_offset
        assert offsets and offsets[num_prompt:] == [len(text) + at for at in alone.logprobs.text_offset or ()]
        expected = client.generate(prompt, adapter="all-r2", prompt_logprobs=True, max_new_tokens=1)
        told = [item.logprob for item in expected.candidates[0].prompt_logprobs]
        assert with_prompt.logprobs.token_logprobs and with_prompt.logprobs.token_logprobs[1:num_prompt] == told


def test_one_token_has_nothing_before_it(http: OpenAI) -> None:
    (choice,) = complete(http, "all-r2", [9], echo=True, logprobs=1, max_tokens=0).choices
    assert choice.logprobs is not None
    assert (choice.logprobs.token_logprobs, choice.logprobs.text_offset) == ([None], [0])


def test_without_log_probabilities_it_is_the_text(http: OpenAI) -> None:
    (choice,) = complete(http, "all-r2", SENTENCE, echo=True, max_tokens=0).choices
    assert (choice.text, choice.logprobs, choice.finish_reason, ids(choice)) == (SENTENCE, None, "length", ())


def test_scoring_counts_no_generated_token(llama: ServerFixture, http: OpenAI) -> None:
    complete(http, "one-r1", PROMPT, max_tokens=1)
    before = [llama.server.metric(f"quiver_{kind}_tokens_total", adapter="one-r1") for kind in ("prompt", "generated")]
    prompts = [random_tokens(12, seed=1).tolist(), PROMPT]
    complete(http, "one-r1", prompts, echo=True, logprobs=1, max_tokens=0)
    after = [llama.server.metric(f"quiver_{kind}_tokens_total", adapter="one-r1") for kind in ("prompt", "generated")]
    assert [after[0] - before[0], after[1] - before[1]] == [18, 0]


@pytest.mark.usefixtures("still_serving")
def test_what_is_refused(http: OpenAI) -> None:
    for changes, param, words in (
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be at least 1"),
        ({"max_tokens": 0, "echo": True, "temperature": -1}, "temperature", "it must be 0 or more"),
        ({"max_tokens": False, "echo": True}, "max_tokens", "a whole number"),
        ({"echo": True, "logprobs": 21}, "logprobs", "it must be at most 20"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(http, "all-r2", "hello", **changes)
        assert (caught.value.param, words in str(caught.value)) == (param, True)
    with pytest.raises(openai.BadRequestError, match="echo is not supported"):
        messages: Any = [{"role": "user", "content": "x"}]
        http.chat.completions.create(model="all-r2", messages=messages, extra_body={"echo": True})
    with pytest.raises(openai.NotFoundError):
        complete(http, "nobody", "hello", echo=True, max_tokens=0)
