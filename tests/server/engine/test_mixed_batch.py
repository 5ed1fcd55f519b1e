"""The point of it all: rows of the base and of many adapters in one batch, each as if it were alone."""

import random
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from support.live_server import LiveServer, answer_tokens
from support.server_fixture import GPT2_ADAPTERS, LLAMA_ADAPTERS, ServerFixture, running_server
from support.tiny import hf_lora, random_tokens

from quiver import Client

NUM_REQUESTS = 24


class Question(NamedTuple):
    adapter_id: str
    prompt: list[int]
    num_tokens: int


def mixed_questions(adapter_ids: Sequence[str], seed: int) -> list[Question]:
    """Every adapter and the base in turn, shuffled; prompts of 1 to 120 tokens, answers of 1 to 40."""
    draw = random.Random(seed)
    names = ["", *adapter_ids]
    questions = [
        Question(
            names[i % len(names)],
            random_tokens(draw.choice([1, 2, 15, 16, 17, 33, 60, 120]), seed=seed + i).tolist(),
            draw.choice([1, 7, 20, 40]),
        )
        for i in range(NUM_REQUESTS)
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


@contextmanager
def repeating(work: Callable[[Client], None], server: LiveServer) -> Generator[list[int]]:
    """Do `work` again and again in another thread; yields a list that grows by one with each time."""
    done = threading.Event()
    times: list[int] = []
    with server.client() as client, ThreadPoolExecutor(1) as thread:

        def repeat() -> None:
            while not done.is_set():
                work(client)
                times.append(len(times))

        future = thread.submit(repeat)
        try:
            yield times
        finally:
            done.set()
        future.result(30)


@pytest.fixture
def churn(llama: ServerFixture) -> Callable[[Client], None]:
    """Loads and unloads two adapters that nobody asks for, and one that is asked for."""
    for name, rank in (("churn-a", 5), ("churn-b", 9)):
        hf_lora(llama.base, llama.adapters / name, rank=rank, targets="all-linear", seed=rank)

    def work(client: Client) -> None:
        for name in ("churn-a", "churn-b", "mlp-r8"):
            client.load_adapter(name)
        for name in ("churn-a", "mlp-r8", "churn-b"):
            client.unload_adapter(name)

    return work


def test_mixed_batch_equals_one_at_a_time(llama: ServerFixture, churn: Callable[[Client], None]) -> None:
    questions = mixed_questions(list(LLAMA_ADAPTERS), seed=1)
    expected = [llama.expected(*question) for question in questions]
    steps_before = llama.server.metric("quiver_step_seconds_count")
    with repeating(churn, llama.server) as times:
        for _ in range(3):
            assert ask_all_at_once(llama.server, questions) == expected
    assert len(times) >= 2, "adapters came and went meanwhile"
    steps = llama.server.metric("quiver_step_seconds_count") - steps_before
    num_tokens = 3 * sum(map(len, expected))
    assert steps < num_tokens / 2, "the requests did not share their steps"


def test_every_adapter_changes_the_answer(llama: ServerFixture) -> None:
    """Without this the test above could pass with adapters that do nothing."""
    prompt = random_tokens(20, seed=3).tolist()
    answers = [tuple(llama.expected(name, prompt, 20)) for name in ("", *LLAMA_ADAPTERS)]
    assert len(set(answers)) == len(answers)


def test_mixed_batch_on_gpt2(gpt2: ServerFixture) -> None:
    questions = mixed_questions(list(GPT2_ADAPTERS), seed=2)
    expected = [gpt2.expected(*question) for question in questions]
    assert ask_all_at_once(gpt2.server, questions) == expected
    assert len({tuple(gpt2.expected(name, [9, 8, 7], 12)) for name in ("", *GPT2_ADAPTERS)}) == 3


@pytest.mark.slow
def test_mixed_batch_without_the_compiled_kernels(
    llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no compiler, torch's operators give the same answers."""
    monkeypatch.setenv("QUIVER_KERNELS", "torch")
    adapters = {name: LLAMA_ADAPTERS[name] for name in ("attention-r4", "all-r2", "pattern-r3")}
    with running_server(tmp_path, llama_base, adapters, "--max-step-tokens", "48") as bench:
        assert "QUIVER_KERNELS=torch" in bench.server.log.read_text()
        questions = mixed_questions(list(adapters), seed=4)
        expected = [bench.expected(*question) for question in questions]
        assert ask_all_at_once(bench.server, questions) == expected


def test_bursts_over_the_running_limit_wait_their_turn(llama: ServerFixture) -> None:
    """96 requests where 64 may run: the rest waits in the queue and is answered exactly."""
    prompt = random_tokens(10, seed=5).tolist()
    names = ["", *LLAMA_ADAPTERS] * 14
    questions = [Question(name, prompt, 6) for name in names[:96]]
    expected = {name: llama.expected(name, prompt, 6) for name in set(names)}
    assert ask_all_at_once(llama.server, questions) == [expected[question.adapter_id] for question in questions]
