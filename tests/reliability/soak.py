"""Everything at once, for minutes or hours, against an oracle: `make soak MINUTES=30`.

All methods, streams and whole answers, draws with seeds, scores, cancelled and hurried calls, bad requests, adapters
loaded, unloaded and replaced, several clients. Figures go to OUT/soak.json, memory and latency over time to
OUT/soak.png.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from parity.every_method import MethodBench, running
from reliability.process_memory import resident_bytes
from reliability.prompts import Question, answer_of, make_questions
from rich.console import Console
from support.live_server import answer_tokens
from support.server_fixture import make_base
from support.tiny import hf_greedy, hf_lora, random_tokens

from quiver import Client, DeadlineExceeded, InvalidRequest, QuiverClientError, ServerBusy
from quiver_peft.files.atomic_folder import replace_folder

NUM_CLIENTS = 8
NUM_QUESTIONS = 120
WARM_UP_SECONDS = 10.0
SERVER = ("--max-step-tokens", "48", "--adapter-memory-mib", "1", "--kv-memory-mib", "4", "--max-running", "16")


class Sample(NamedTuple):
    """One look at the server. p50, p99: of the latencies since the one before, seconds."""

    seconds: float
    memory_mib: float
    p50: float
    p99: float


@dataclass
class Record:
    """What has happened so far; clients add to it under its lock."""

    outcomes: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])
    samples: list[Sample] = field(default_factory=list[Sample])
    latencies: list[float] = field(default_factory=list[float])
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, outcome: str, seconds: float) -> None:
        with self.lock:
            self.outcomes[outcome] += 1
            self.latencies.append(seconds)

    def take_latencies(self) -> list[float]:
        with self.lock:
            latencies, self.latencies = sorted(self.latencies), []
        return latencies


class WrongAnswerError(AssertionError):
    """The one thing that may never happen."""


class Replaced:
    """An adapter whose folder is replaced all the time by the other of two contents."""

    PROMPT = tuple(random_tokens(12, seed=77).tolist())

    def __init__(self, bench: MethodBench, folder: Path) -> None:
        self._folder = bench.adapters / "replaced"
        self._contents: list[dict[str, bytes]] = []
        self._expected: list[tuple[int, ...]] = []
        self._answers: dict[str, tuple[int, ...]] = {}
        for rank in (24, 40):  # large among the others: the memory holds all of them or these
            oracle = hf_lora(bench.base, folder / str(rank), rank=rank, targets="all-linear", seed=rank)
            self._contents.append({path.name: path.read_bytes() for path in (folder / str(rank)).iterdir()})
            self._expected.append(tuple(hf_greedy(oracle, self.PROMPT, 10)))
        self._lock = threading.Lock()
        self._turn = 0
        with bench.server.client() as client:
            self.replace(client)

    def replace(self, client: Client) -> None:
        """One at a time, so that it is known which content a revision has."""
        with self._lock:
            self._turn += 1
            replace_folder(self._folder, self._contents[self._turn % 2])
            revision = client.load_adapter("replaced").revision
            self._answers[revision] = self._expected[self._turn % 2]

    def ask_replaced(self, client: Client) -> None:
        answer = client.generate(self.PROMPT, adapter="replaced", max_new_tokens=10)
        assert answer.adapter is not None
        with self._lock:
            expected = self._answers.get(answer.adapter.revision)
        if tuple(answer_tokens(answer)) != expected:
            raise WrongAnswerError(f"revision {answer.adapter.revision[:12]}: {answer.token_ids}, not {expected}")


class Visitor:
    """One client, which does something else each time."""

    def __init__(
        self,
        bench: MethodBench,
        questions: Sequence[Question],
        scores: Sequence[tuple[Question, float]],
        replaced: Replaced,
        seed: int,
    ) -> None:
        self._bench, self._questions, self._scores = bench, questions, scores
        self._draw = random.Random(seed)
        self._drawn: dict[tuple[str, int], tuple[int, ...]] = {}
        self._deeds: list[tuple[Callable[[Client], None], int]] = [
            (self._ask, 30), (self._stream, 15), (self._draw_with_seed, 8), (self._score, 6), (self._leave, 8),
            (self._hurry, 5), (self._ask_badly, 5), (self._load_or_unload, 5), (replaced.ask_replaced, 10),
            (replaced.replace, 2), (self._from_a_new_connection, 4),
        ]  # fmt: skip

    def visit(self, client: Client, record: Record) -> None:
        """One deed; whatever it brings is in the record."""
        (deed,) = self._draw.choices([deed for deed, _ in self._deeds], [weight for _, weight in self._deeds])
        name, started = deed.__name__.strip("_"), time.monotonic()
        try:
            deed(client)
        except ServerBusy as busy:
            name = "refused with a hint" if busy.retry_after_seconds else "refused without a hint"
        except WrongAnswerError as error:
            name = "WRONG"
            record.wrong.append(f"{deed.__name__}: {error}")
        except QuiverClientError as error:
            name = f"FAILED {error.code.name}"
            record.wrong.append(f"{deed.__name__}: {error}")
        record.note(name, time.monotonic() - started)

    def _question(self) -> Question:
        return self._draw.choice(self._questions)

    def _ask(self, client: Client) -> None:
        question = self._question()
        _same(answer_of(client, question), question.answer, question)

    def _stream(self, client: Client) -> None:
        question = self._question()
        pieces = client.stream(question.prompt, adapter=question.adapter_id, max_new_tokens=question.num_tokens)
        tokens = tuple(token for piece in pieces for token in piece.token_ids)
        _same(tokens[: len(question.answer)], question.answer, question)

    def _leave(self, client: Client) -> None:
        question = self._question()
        pieces = client.stream(question.prompt, adapter=question.adapter_id, max_new_tokens=200, ignore_eos=True)
        tokens: list[int] = []
        for piece, _ in zip(pieces, range(self._draw.randint(1, 8)), strict=False):
            tokens += piece.token_ids
        pieces.close()
        both = min(len(tokens), len(question.answer))
        _same(tuple(tokens[:both]), question.answer[:both], question)

    def _draw_with_seed(self, client: Client) -> None:
        question, seed = self._draw.choice(self._questions[:20]), self._draw.randint(0, 3)
        answer = client.generate(
            question.prompt, adapter=question.adapter_id, temperature=0.9, top_p=0.95, seed=seed, n=2, max_new_tokens=12
        )
        tokens = tuple(token for candidate in answer.candidates for token in candidate.token_ids)
        _same(tokens, self._drawn.setdefault((repr(question), seed), tokens), question)

    def _score(self, client: Client) -> None:
        question, expected = self._draw.choice(self._scores)
        score = client.score(question.prompt, [question.answer], adapter=question.adapter_id).scores[0]
        if not score.is_greedy or abs(score.total_logprob - expected) > 1e-3:
            raise WrongAnswerError(f"the score of {question} is {expected}, not {score.total_logprob}")

    def _hurry(self, client: Client) -> None:
        question = self._question()
        with Client(self._bench.server.target, timeout_seconds=self._draw.choice([0.002, 0.01, 0.05])) as hurried:
            try:
                _same(answer_of(hurried, question), question.answer, question)
            except DeadlineExceeded:
                return

    def _from_a_new_connection(self, client: Client) -> None:
        with self._bench.server.client() as other:
            self._ask(other)

    def _ask_badly(self, client: Client) -> None:
        options: dict[str, Any] = self._draw.choice(
            [{"adapter": "nobody"}, {"adapter": "../x"}, {"temperature": -1.0}, {"max_new_tokens": 0}, {"n": 99}]
        )
        try:
            client.generate([5, 6], **options)
        except InvalidRequest:
            return
        except QuiverClientError as error:
            if error.code.name == "NOT_FOUND":
                return
            raise
        raise WrongAnswerError(f"{options} was answered")

    def _load_or_unload(self, client: Client) -> None:
        name = self._draw.choice([question.adapter_id for question in self._questions if question.adapter_id])
        if self._draw.random() < 0.5:
            client.load_adapter(name)
        else:
            client.unload_adapter(name)


def _same(found: Sequence[int], expected: Sequence[int], question: Question) -> None:
    if tuple(found) != tuple(expected):
        raise WrongAnswerError(f"{question}: {tuple(found)}")


def log_likelihood(bench: MethodBench, question: Question) -> float:
    """Of the answer after the prompt, from the oracle's logits of both."""
    prompt, answer = (torch.tensor([list(tokens)]) for tokens in (question.prompt, question.answer))
    logits = bench.oracles[question.adapter_id](prompt, answer)
    foretold = logits[0, -answer.shape[1] - 1 : -1].log_softmax(-1)
    return float(foretold.gather(1, answer.T).sum())


def soak(bench: MethodBench, folder: Path, minutes: float, tell: Callable[[str], None]) -> Record:
    """Visit for so long; `tell` hears once in a while how it goes."""
    names = sorted(bench.oracles)
    questions = make_questions(bench, names, NUM_QUESTIONS)
    scores = [(question, log_likelihood(bench, question)) for question in questions[:40] if question.answer]
    replaced = Replaced(bench, folder)
    record, done = Record(), threading.Event()

    def work(seed: int) -> None:
        visitor = Visitor(bench, questions, scores, replaced, seed)
        with bench.server.client() as client:
            while not done.is_set():
                visitor.visit(client, record)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < 60 * minutes and bench.server.process.poll() is None:
        time.sleep(1.0)
        latencies = record.take_latencies()
        memory = resident_bytes(bench.server.process.pid) / 2**20
        p50, p99 = (latencies[int(len(latencies) * share)] if latencies else 0.0 for share in (0.5, 0.99))
        record.samples.append(Sample(elapsed, memory, p50, p99))
        tell(f"{elapsed:5.0f} s  {record.outcomes.total():7d} deeds  {len(record.wrong)} wrong  {memory:6.1f} MiB")
    done.set()
    for thread in threads:
        thread.join(90)
    return record


def figures(record: Record, bench: MethodBench) -> dict[str, Any]:
    """What the run gave. Growth: of the last tenth of the samples over the first tenth after the warm-up."""
    settled = [s for s in record.samples if s.seconds > WARM_UP_SECONDS] or record.samples
    tenth = max(len(settled) // 10, 1)
    first, last = (sum(s.memory_mib for s in part) / tenth for part in (settled[:tenth], settled[-tenth:]))
    return {
        "minutes": round(record.samples[-1].seconds / 60, 2),
        "adapters": len(bench.oracles),
        "deeds": record.outcomes.total(),
        "outcomes": dict(record.outcomes.most_common()),
        "wrong": record.wrong[:20],
        "num_wrong": len(record.wrong),
        "memory_mib": {"first": round(first, 1), "last": round(last, 1), "growth": round(last / first - 1, 4)},
        "worst_p99_seconds": round(max(s.p99 for s in settled), 3),
        "median_p50_seconds": round(sorted(s.p50 for s in settled)[len(settled) // 2], 3),
        "adapter_evictions": bench.server.metric("quiver_adapter_evictions_total"),
        "adapter_loads": bench.server.metric("quiver_adapter_loads_total", result="ok"),
        "samples": [list(sample) for sample in record.samples],
    }


def draw_picture(path: Path, found: dict[str, Any]) -> None:
    """Memory and latency over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    seconds, memory, p50, p99 = zip(*found["samples"], strict=True)
    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 5), layout="constrained")
    upper.plot(seconds, memory, label="server, anonymous memory")
    upper.set(ylabel="MiB", ylim=(0, None), title=f"{found['deeds']} deeds, {found['num_wrong']} wrong")
    lower.plot(seconds, p50, label="median")
    lower.plot(seconds, p99, label="99th percentile")
    lower.set(xlabel="seconds", ylabel="latency, s", yscale="log")
    for axes in (upper, lower):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def run(out: Path, minutes: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """Make everything, soak, write OUT/soak.json and OUT/soak.png; returns the figures."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tell("making adapters of every method, and their answers")
        try:
            with running(folder / "bench", make_base(folder / "base"), *SERVER) as bench:
                found = figures(soak(bench, folder / "contents", minutes, tell), bench)
        finally:
            shutil.copy(folder / "bench" / "server.log", out / "soak.log")
    (out / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    draw_picture(out / "soak.png", found)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    asked = parser.parse_args()
    with Console(stderr=True).status("starting") as status:
        found = run(asked.out, asked.minutes, status.update)
    shown = {key: value for key, value in found.items() if key != "samples"}
    print(json.dumps(shown, indent=1))
    print(f"written: {asked.out / 'soak.json'}, {asked.out / 'soak.png'}")
    return 1 if found["num_wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
