"""One running batch of the base and of every method, alone and combined: each row as if it were the only one."""

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from parity.every_method import MethodBench, running
from support.error_assertions import refusal
from support.live_server import LiveServer, answer_tokens
from support.server_fixture import make_base
from support.tiny import MAX_POSITIONS, random_tokens

from quiver import FinishReason, InvalidRequest

torch.set_num_threads(1)

NUM_VIRTUAL = {"prompt-9": 9, "prefix-17": 17, "ptuning-canonical": 4, "prefix-prompt": 9, "all-four": 8, "lora-r4": 0}


class Question(NamedTuple):
    adapter_id: str
    prompt: list[int]
    num_tokens: int


# A prefix that PEFT puts into transformers' cache is not among what its sliding window counts.
PREFIXES = ("prefix-3", "prefix-17")


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral", "t5", "flan"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MethodBench]:
    """A server with every adapter; short steps, so that prompts and virtual tokens are cut into chunks.

    A T5's steps are longer, for its sources are not cut; two long ones do not fit into one.
    """
    folder = tmp_path_factory.mktemp(request.param)
    base = make_base(folder / "base", request.param)
    step_tokens = "64" if request.param in ("t5", "flan") else "24"
    without = PREFIXES if request.param == "mistral" else ()
    with running(folder, base, "--max-step-tokens", step_tokens, without=without) as bench:
        yield bench


def shuffled_questions(names: Sequence[str], seed: int) -> list[Question]:
    """One for each name; prompts of 1 to 40 tokens, answers of 1 to 12."""
    draw = random.Random(seed)
    questions = [
        Question(name, random_tokens(draw.choice([1, 2, 15, 16, 17, 40]), seed=seed + i).tolist(), draw.randint(1, 12))
        for i, name in enumerate(names)
    ]
    draw.shuffle(questions)
    return questions


def ask_all_at_once(server: LiveServer, questions: Sequence[Question]) -> list[list[int]]:
    """One thread for each question, all let go at the same moment."""
    barrier = threading.Barrier(len(questions))
    with server.client() as client, ThreadPoolExecutor(len(questions)) as threads:

        def ask(question: Question) -> list[int]:
            barrier.wait(30)
            adapter_id, prompt, num_tokens = question
            return answer_tokens(client.generate(prompt, adapter=adapter_id, max_new_tokens=num_tokens))

        return list(threads.map(ask, questions))


def test_every_method_in_one_batch_equals_one_at_a_time(bench: MethodBench) -> None:
    """Rows join and leave: the answers have different lengths, and there are more rounds than one."""
    questions = shuffled_questions(list(bench.oracles), seed=1)
    assert len(questions) >= 16
    expected = [bench.expected(*question) for question in questions]
    steps_before = bench.server.metric("quiver_step_seconds_count")
    for seed in range(3):
        order = random.Random(seed).sample(range(len(questions)), len(questions))
        found = ask_all_at_once(bench.server, [questions[i] for i in order])
        for i, answer in zip(order, found, strict=True):
            assert answer == expected[i], questions[i].adapter_id
    steps = bench.server.metric("quiver_step_seconds_count") - steps_before
    assert steps < 3 * sum(map(len, expected)) / 2, "the requests did not share their steps"


def test_every_adapter_changes_the_answer(bench: MethodBench) -> None:
    prompts = [random_tokens(20, seed=seed).tolist() for seed in range(3, 8)]
    answers = {name: tuple(tuple(bench.expected(name, prompt, 8)) for prompt in prompts) for name in bench.oracles}
    assert len(set(answers.values())) == len(answers)


@pytest.mark.parametrize("name", NUM_VIRTUAL)
def test_virtual_tokens_are_counted_apart(bench: MethodBench, name: str) -> None:
    if name not in bench.oracles:
        pytest.skip("Hugging Face cannot compute it on this base")
    prompt = random_tokens(12, seed=4).tolist()
    is_t5 = "cross-lora" in bench.oracles
    with bench.server.client() as client:
        answer = client.generate(prompt, adapter=name, max_new_tokens=3, prompt_logprobs=not is_t5)
        described = client.get_adapter(name)
    assert answer.usage.prompt_tokens == 12
    assert answer.usage.virtual_tokens == described.virtual_tokens == NUM_VIRTUAL[name]
    logprobs = answer.candidates[0].prompt_logprobs
    if is_t5:
        assert not logprobs, "an encoder-decoder does not foretell its prompt"
        return
    assert [item.token_id for item in logprobs] == prompt[1:]
    logits = bench.oracles[name](torch.tensor([prompt]), torch.empty(1, 0, dtype=torch.int64))
    expected = logits.log_softmax(-1)[0, range(11), prompt[1:]]
    assert torch.allclose(torch.tensor([item.logprob for item in logprobs]), expected, atol=1e-4)


@pytest.mark.parametrize("name", NUM_VIRTUAL)
def test_virtual_tokens_take_up_the_context(bench: MethodBench, name: str) -> None:
    """A prompt that leaves room for one token gets one; one token more, and it is refused."""
    if name not in bench.oracles or "cross-lora" in bench.oracles:
        pytest.skip("Hugging Face cannot compute it on this base, or its length is not the prompt's")
    prompt = random_tokens(MAX_POSITIONS - NUM_VIRTUAL[name], seed=5).tolist()
    with bench.server.client() as client:
        answer = client.generate(prompt[:-1], adapter=name, max_new_tokens=9, ignore_eos=True)
        assert (len(answer.token_ids), answer.finish_reason) == (1, FinishReason.LENGTH)
        refusal(lambda: client.generate(prompt, adapter=name), InvalidRequest, f"context of {MAX_POSITIONS}")
