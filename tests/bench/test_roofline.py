"""The arithmetic of the roofline, against published figures of this workload and a count by hand."""

import pytest
from bench.adapter_sets import loras
from bench.roofline import Machine, ceiling, excess_overhead, prompt_seconds, step_seconds
from bench.shapes import SHAPES
from bench.workload import Request, make_requests

LLAMA = SHAPES["llama60"]
MACHINE = Machine(bytes_per_second=30e9, flops=160e9)


def test_sizes() -> None:
    """Of the models that rivals were measured with: 59.8 M and 386.6 M parameters, adapters of 2.22 M and 8.8 M."""
    assert LLAMA.token_params() == pytest.approx(59.8e6, rel=1e-3)
    assert LLAMA.adapter_bytes == pytest.approx(4 * 2.22e6, rel=3e-3)
    assert LLAMA.kv_bytes_per_token == 30_720
    qwen = SHAPES["qwen05"]
    assert qwen.token_params() == pytest.approx(386.6e6, rel=1e-3)
    assert qwen.adapter_bytes == pytest.approx(35.2e6, rel=1e-2)


@pytest.mark.parametrize(("rows", "adapters", "milliseconds"), [(1, 1, 8.3), (8, 8, 10.4), (32, 32, 25.0)])
def test_a_decode_step_takes_the_published_time(rows: int, adapters: int, milliseconds: float) -> None:
    size = LLAMA.adapter_bytes
    seconds = step_seconds(LLAMA, MACHINE, [0] * rows, [size] * rows, adapters * size)
    assert seconds * 1e3 == pytest.approx(milliseconds, rel=0.03)


def test_keys_and_values_are_read_as_well() -> None:
    empty = step_seconds(LLAMA, MACHINE, [0] * 4, [0] * 4, 0)
    full = step_seconds(LLAMA, MACHINE, [1000] * 4, [0] * 4, 0)
    assert full - empty == pytest.approx(4 * 1000 * 30_720 / 30e9)


def test_an_adapter_is_read_once_however_many_rows_use_it_and_multiplied_for_each() -> None:
    size = LLAMA.adapter_bytes
    few = step_seconds(LLAMA, MACHINE, [0] * 4, [size] * 4, size)
    assert few - step_seconds(LLAMA, MACHINE, [0] * 4, [0] * 4, 0) == pytest.approx(size / 30e9)
    slow = Machine(1e15, 160e9)
    more = step_seconds(LLAMA, slow, [0] * 4, [size] * 4, size) - step_seconds(LLAMA, slow, [0] * 4, [0] * 4, 0)
    assert more == pytest.approx(4 * 2 * size / 4 / 160e9)


@pytest.mark.parametrize(
    ("concurrency", "count", "num_adapters", "published"),
    [(1, 3, 1, 105), (8, 16, 0, 400), (8, 16, 8, 355), (32, 32, 0, 465), (32, 32, 32, 460)],
)
def test_ceilings_are_near_the_published_ones(
    concurrency: int, count: int, num_adapters: int, published: float
) -> None:
    """They were computed for a mean prompt and without keys and values: ours are a little lower."""
    names = loras("llama60")[:num_adapters]
    sizes = dict.fromkeys(names, LLAMA.adapter_bytes)
    lists = [make_requests(f"{i}", count, names, 8192, 64) for i in range(20)]
    found = [ceiling(LLAMA, MACHINE, requests, concurrency, sizes).output_tokens_per_second for requests in lists]
    assert 0.85 * published < sum(found) / len(found) < 1.02 * published


def test_a_closed_loop_by_hand() -> None:
    """Two requests of two tokens, one at a time: two prompts and one step each."""
    requests = [Request((5,) * 32, "a", 2), Request((5,) * 64, "", 2)]
    best = ceiling(LLAMA, MACHINE, requests, 1, {"a": 1000})
    prompts = prompt_seconds(LLAMA, MACHINE, 32, 1000) + prompt_seconds(LLAMA, MACHINE, 64)
    steps = step_seconds(LLAMA, MACHINE, [33], [1000], 1000) + step_seconds(LLAMA, MACHINE, [65], [0], 0)
    assert best.seconds == pytest.approx(prompts + steps)
    assert best.output_tokens_per_second == pytest.approx(4 / best.seconds)
    assert best.mean_adapter_bytes == 500


def test_two_rows_of_one_adapter_read_it_once() -> None:
    requests = [Request((5,) * 32, "a", 2), Request((5,) * 64, "a", 2)]
    assert ceiling(LLAMA, MACHINE, requests, 2, {"a": 1000}).mean_adapter_bytes == 1000


def test_a_request_of_one_token_needs_no_step() -> None:
    requests = [Request((5,) * 32, "", 1)] * 3
    assert ceiling(LLAMA, MACHINE, requests, 2, {}).seconds == pytest.approx(3 * prompt_seconds(LLAMA, MACHINE, 32))


def test_a_t5_generates_with_its_decoder_alone() -> None:
    t5 = SHAPES["t5-60"]
    inner, hidden, ffn, layers = 640, 640, 1728, 6
    assert t5.token_params() == layers * (6 * hidden * inner + 2 * hidden * ffn) + 8192 * hidden
    assert t5.prompt_params() == layers * (4 * hidden * inner + 2 * hidden * ffn + 2 * hidden * inner)
    decoder = layers * 16 * (6 * (hidden + inner) + 2 * (hidden + ffn))
    encoder = layers * 16 * (6 * (hidden + inner) + 2 * (hidden + ffn))
    assert t5.adapter_bytes == 4 * (decoder + encoder)
    assert t5.token_share == decoder / (decoder + encoder)


def test_excess_overhead_leaves_out_what_the_bytes_must_take() -> None:
    assert excess_overhead(0.013, 0.010, 60e6, MACHINE) == pytest.approx(0.1)
    assert excess_overhead(0.012, 0.010, 60e6, MACHINE) == pytest.approx(0.0)
