"""On a GPU: every method in one running batch against each row alone; token by token in fp32, nearly so in bf16."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from parity.every_method import MethodBench, running
from parity.test_mixed_methods import Question, ask_all_at_once, shuffled_questions
from support.server_fixture import make_base
from support.tiny import random_tokens

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
# Of the largest logit: what bf16's eight bits leave after four layers (the oracle is fp32 on the CPU).
BF16_TOLERANCE = 2e-2


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / request.param, request.param)


def serve(base: Path, folder: Path, dtype: str) -> Iterator[MethodBench]:
    """With every adapter; steps are short where prompts may be cut."""
    step_tokens = "64" if base.name == "t5" else "24"
    with running(folder, base, "--device", DEVICE, "--dtype", dtype, "--max-step-tokens", step_tokens) as bench:
        log = bench.server.log.read_text()
        assert "disabled" not in log, log
        yield bench


@pytest.fixture(scope="module")
def fp32(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MethodBench]:
    yield from serve(base, tmp_path_factory.mktemp("fp32"), "float32")


@pytest.fixture(scope="module")
def bf16(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MethodBench]:
    yield from serve(base, tmp_path_factory.mktemp("bf16"), "bfloat16")


def test_a_mixed_batch_in_fp32(fp32: MethodBench) -> None:
    questions = shuffled_questions(list(fp32.oracles), seed=1)
    expected = [fp32.expected(*question) for question in questions]
    for _ in range(2):
        found = ask_all_at_once(fp32.server, questions)
        for question, answer, right in zip(questions, found, expected, strict=True):
            assert answer == right, question.adapter_id


def test_a_mixed_batch_in_bf16(bf16: MethodBench) -> None:
    """The first token of each answer: what the oracle likes best, or as good as that."""
    questions = [
        Question(name, random_tokens(10 + i % 7, seed=i).tolist(), 1) for i, name in enumerate(2 * list(bf16.oracles))
    ]
    num_equal = 0
    for question, answer in zip(questions, ask_all_at_once(bf16.server, questions), strict=True):
        empty = torch.empty(1, 0, dtype=torch.int64)
        logits = bf16.oracles[question.adapter_id](torch.tensor([question.prompt]), empty)[0, -1]
        best = int(logits.argmax())
        if not answer:  # an end of the sequence, which `ask_all_at_once` leaves out
            continue
        num_equal += answer[0] == best
        assert logits[best] - logits[answer[0]] <= BF16_TOLERANCE * logits.abs().max(), question.adapter_id
    assert num_equal >= 0.8 * len(questions)
