"""The step loop in its own thread: schedule, prepare, run, sample, postprocess."""

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import accumulate

import torch
from torch import Tensor

from quiver_server.engine.batch import StepBatch, prepare_batch
from quiver_server.engine.model_runner import ModelRunner
from quiver_server.engine.sampler import NOT_FINITE, logprobs_of, sample
from quiver_server.engine.scheduler import ScheduledChunk, Scheduler
from quiver_server.engine.sequence import FinishReason, Sequence, TokenEvent, TokenLogprob
from quiver_server.errors import EngineFaultError
from quiver_server.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

Delivery = list[tuple[Sequence, TokenEvent]]


class Engine:
    """Runs sequences until they end. `submit` and `cancel` may be called from any thread.

    deliver: takes a step's events, once a step; on_dead: told that no step will follow, because the loop itself failed.
    Both are called from the engine's thread.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        *,
        block_size: int,
        device: torch.device,
        metrics: Metrics,
        deliver: Callable[[Delivery], None],
        on_dead: Callable[[], None],
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._block_size = block_size
        self._device = device
        self._metrics = metrics
        self._deliver = deliver
        self._on_dead = on_dead
        self._wakeup = threading.Condition()
        self._submitted: list[Sequence] = []
        self._cancelled: list[Sequence] = []
        self._stopping = False
        self._dead = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Begin stepping."""
        self._thread.start()

    def stop(self) -> None:
        """End after the running step; sequences that are left get no more events."""
        with self._wakeup:
            self._stopping = True
            self._wakeup.notify()
        self._thread.join()

    def submit(self, sequence: Sequence) -> None:
        """A sequence enters the queue."""
        with self._wakeup:
            if self._dead:
                self._fail_all([sequence])
                return
            self._submitted.append(sequence)
            self._wakeup.notify()

    def cancel(self, sequence: Sequence) -> None:
        """The sequence's row is gone before the next step; a last event without token and error says so."""
        with self._wakeup:
            self._cancelled.append(sequence)
            self._wakeup.notify()

    def _loop(self) -> None:
        try:
            while self._apply_commands():
                self.step()
        except Exception as error:
            log.critical("the engine cannot go on", exc_info=error)
            with self._wakeup:
                self._dead = True
                self._fail_all([*self._scheduler.running, *self._scheduler.waiting, *self._submitted])
            self._on_dead()

    def _fail_all(self, sequences: Seq[Sequence]) -> None:
        """Nothing will be computed any more: whoever waits for it is told."""
        fault = EngineFaultError("the engine has failed and the server is stopping; another replica may answer")
        self._deliver([(sequence, TokenEvent(None, error=fault)) for sequence in sequences])

    def _apply_commands(self) -> bool:
        """Sleep until there is work, then let the new in and the cancelled out; False when the engine is to stop."""
        scheduler = self._scheduler
        with self._wakeup:
            while not (self._stopping or self._submitted or self._cancelled or scheduler.running or scheduler.waiting):
                self._wakeup.wait()
            for sequence in self._submitted:
                scheduler.add(sequence)
            cancelled = self._cancelled
            self._submitted, self._cancelled = [], []
        for sequence in cancelled:
            scheduler.remove(sequence)
        if cancelled:
            self._deliver([(sequence, TokenEvent(None)) for sequence in cancelled])
        return not self._stopping

    def step(self) -> None:
        """One pass of the engine."""
        marks = [time.perf_counter()]
        chunks = self._scheduler.schedule()
        if not chunks:
            return
        marks.append(time.perf_counter())
        try:
            batch = prepare_batch(chunks, self._block_size, self._device)
            marks.append(time.perf_counter())
            logits = self._runner.run(batch)
            marks.append(time.perf_counter())
            events = self._postprocess(chunks, batch, logits)
        except Exception as error:
            events = self._fail(chunks, error)
        self._metrics.observe_step([*marks, time.perf_counter()])
        self._deliver(events)

    def _postprocess(self, chunks: Seq[ScheduledChunk], batch: StepBatch, logits: Tensor) -> Delivery:
        """Draw tokens for the chunks that are complete, note what is cached, and let go of what ended."""
        ends = list(accumulate(batch.logit_counts))  # of each chunk's rows among the logits
        complete = [i for i, chunk in enumerate(chunks) if chunk.completes]
        # Mostly every row is one to draw from: they are not copied then.
        last = logits if len(complete) == len(logits) else logits[[ends[i] - 1 for i in complete]]
        drawn = sample(last, [chunks[i].sequence for i in complete]) if complete else []
        tokens = dict(zip(complete, drawn, strict=True))
        events: Delivery = []
        for i, chunk in enumerate(chunks):
            sequence = chunk.sequence
            if not sequence.started:
                sequence.started = True
                sequence.on_first_scheduled()
            if sequence.params.prompt_logprobs:
                _note_prompt_logprobs(chunk, logits[ends[i] - batch.logit_counts[i] : ends[i]])
            self._scheduler.note_computed(chunk)
            if i in tokens:
                events.append((sequence, self._append(sequence, tokens[i], logits, ends[i] - 1)))
        return events

    def _append(self, sequence: Sequence, token: int, logits: Tensor, row: int) -> TokenEvent:
        """logits: [R, V]; the token was drawn from `row`."""
        if token == NOT_FINITE:
            self._scheduler.remove(sequence)
            who = f"adapter {sequence.fairness_key!r}" if sequence.fairness_key else "the base"
            return TokenEvent(
                None, error=EngineFaultError(f"{who} computes logits that are not finite for this prompt")
            )
        num_top = sequence.params.num_top_logprobs
        logprob = None if num_top is None else logprobs_of(logits[row : row + 1], [token], num_top)[0]
        prompt_logprobs = () if sequence.generated else tuple(sequence.prompt_logprobs)
        sequence.generated.append(token)
        reason = _finish_reason(sequence, token)
        if reason is not None:
            self._scheduler.remove(sequence)
        return TokenEvent(token, logprob, prompt_logprobs, reason)

    def _fail(self, chunks: Seq[ScheduledChunk], error: Exception) -> Delivery:
        """A step failed: its sequences are told and dropped, everyone else goes on."""
        log.error("a step of %d sequences failed", len(chunks), exc_info=error)
        fault = EngineFaultError(f"the engine could not compute this request: {type(error).__name__}: {error}")
        for chunk in chunks:
            self._scheduler.remove(chunk.sequence)
        return [(chunk.sequence, TokenEvent(None, error=fault)) for chunk in chunks]


def _note_prompt_logprobs(chunk: ScheduledChunk, logits: Tensor) -> None:
    """logits: [rows of this chunk that were wanted, V]. Row i of the prompt tells how likely token i + 1 was."""
    sequence = chunk.sequence
    if sequence.generated:
        return
    end = sequence.num_cached_tokens + chunk.num_new_tokens - sequence.num_virtual_tokens
    first = end - len(logits) + 1
    following = sequence.prompt[first : end + 1]
    if not following:
        return
    # A sequence that stepped back is computed again: what is known already is not noted twice.
    known: list[TokenLogprob] = sequence.prompt_logprobs[: first - sequence.first_logprob]
    num_top = sequence.params.num_top_logprobs or 0
    sequence.prompt_logprobs = known + logprobs_of(logits[: len(following)], following, num_top)


def _finish_reason(sequence: Sequence, token: int) -> FinishReason | None:
    params = sequence.params
    if token in params.eos_ids:
        return FinishReason.EOS
    if token in params.stop_ids:
        return FinishReason.STOP_TOKEN
    return FinishReason.LENGTH if len(sequence.generated) >= params.max_new_tokens else None
