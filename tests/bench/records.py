"""What was seen of each request, and what follows from it. Plain Python: rivals' environments import this too."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """One answered request. Times in seconds on one monotonic clock; token_times: when each new token arrived."""

    index: int  # in the request list
    num_prompt_tokens: int
    submitted: float
    token_times: tuple[float, ...]
    token_ids: tuple[int, ...]

    @property
    def time_to_first_token(self) -> float:
        """From submission to the first token, seconds."""
        return self.token_times[0] - self.submitted

    @property
    def time_per_output_token(self) -> float:
        """Mean time between tokens after the first, seconds."""
        return (self.token_times[-1] - self.token_times[0]) / max(len(self.token_times) - 1, 1)

    @property
    def gaps(self) -> list[float]:
        """Time between each token and the one before, seconds."""
        return [later - earlier for earlier, later in zip(self.token_times, self.token_times[1:], strict=False)]


def record_from_json(row: dict[str, Any]) -> Record:
    """Of what `record_to_json` made."""
    times, ids = tuple(row["token_times"]), tuple(row["token_ids"])
    return Record(row["index"], row["num_prompt_tokens"], row["submitted"], times, ids)


def record_to_json(record: Record) -> dict[str, Any]:
    """Its fields."""
    return asdict(record)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between closest ranks, as numpy's default; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True)
class Percentiles:
    """Seconds."""

    p50: float
    p95: float
    p99: float


def percentiles(values: Sequence[float]) -> Percentiles:
    """The three that are reported."""
    return Percentiles(percentile(values, 50), percentile(values, 95), percentile(values, 99))


@dataclass(frozen=True)
class Throughput:
    """Tokens per second from the first submission to the last token."""

    seconds: float
    output_tokens_per_second: float
    total_tokens_per_second: float


def throughput(records: Sequence[Record]) -> Throughput:
    """Of one closed-loop run."""
    seconds = max(r.token_times[-1] for r in records) - min(r.submitted for r in records)
    output = sum(len(r.token_ids) for r in records)
    prompts = sum(r.num_prompt_tokens for r in records)
    return Throughput(seconds, output / seconds, (output + prompts) / seconds)


def same_answers(left: Sequence[Record], right: Sequence[Record]) -> float:
    """The share of requests that both answered with the same tokens."""
    other = {record.index: record.token_ids for record in right}
    return sum(record.token_ids == other[record.index] for record in left) / len(left)
