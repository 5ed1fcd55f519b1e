"""What follows from the times that were seen."""

import math

import numpy as np
import pytest
from bench.records import (
    Record,
    percentile,
    percentiles,
    record_from_json,
    record_to_json,
    same_answers,
    throughput,
)


def record(index: int = 0, submitted: float = 10.0, times: tuple[float, ...] = (10.5, 10.7, 11.1)) -> Record:
    return Record(index, 100, submitted, times, tuple(range(len(times))))


@pytest.mark.parametrize("count", [1, 2, 3, 16, 97])
@pytest.mark.parametrize("percent", [0, 12.5, 50, 95, 99, 100])
def test_percentiles_are_numpys(count: int, percent: float) -> None:
    values = np.random.default_rng(count).exponential(size=count)
    assert percentile(values.tolist(), percent) == pytest.approx(np.percentile(values, percent))


def test_the_three_that_are_reported() -> None:
    values = [float(value) for value in range(101)]
    assert percentiles(values[::-1]).p50 == 50
    assert percentiles(values).p95 == 95
    assert percentiles(values).p99 == 99
    assert math.isnan(percentiles([]).p50)


def test_latencies_of_one_request() -> None:
    one = record()
    assert one.time_to_first_token == pytest.approx(0.5)
    assert one.gaps == pytest.approx([0.2, 0.4])
    assert one.time_per_output_token == pytest.approx(0.3), "the first token is not part of it"
    assert record(times=(10.5,)).time_per_output_token == 0


def test_throughput_counts_from_the_first_submission_to_the_last_token() -> None:
    found = throughput([record(submitted=11.0, times=(11.5, 14.0)), record(submitted=10.0, times=(10.5, 12.0, 12.5))])
    assert found.seconds == pytest.approx(4.0)
    assert found.output_tokens_per_second == pytest.approx(5 / 4)
    assert found.total_tokens_per_second == pytest.approx(205 / 4)


def test_records_survive_json() -> None:
    assert record_from_json(record_to_json(record(7))) == record(7)


def test_same_answers_matches_by_request() -> None:
    def answer(index: int, *token_ids: int) -> Record:
        return Record(index, 100, 0.0, (1.0, 2.0), token_ids)

    left = [answer(0, 5, 6), answer(1, 7, 8), answer(2, 9, 9), answer(3, 4, 4)]
    right = [answer(3, 4, 4), answer(2, 9, 1), answer(0, 5, 6), answer(1, 7, 8)]
    assert same_answers(left, right) == 0.75
