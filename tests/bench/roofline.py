"""What the machine could do at best: the time that bytes and multiplications of a request list must take.

A decode step takes the longer of its bytes at the machine's bandwidth (the base's weights once, each adapter that is
in the batch once, every row's keys and values) and its floating-point operations at the machine's GEMM rate. Prompts
are computed one after the other by the same rule. Decode steps and prompts are added, as the published ceilings of
this workload are; an engine that hides one behind the other could in principle pass 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.shapes import FLOAT_BYTES, Shape
from bench.workload import Request


@dataclass(frozen=True)
class Machine:
    """Measured limits: bytes read per second, floating-point operations per second of a large GEMM."""

    bytes_per_second: float
    flops: float


@dataclass(frozen=True)
class Ceiling:
    """The best possible run of a request list."""

    seconds: float
    output_tokens_per_second: float
    mean_adapter_bytes: float  # of the adapters read in a decode step


@dataclass
class _Running:
    request: Request
    context: int
    left: int


def prompt_seconds(shape: Shape, machine: Machine, num_tokens: int, adapter_bytes: int = 0) -> float:
    """One prompt until its first token is known."""
    adapter = adapter_bytes if shape.family != "t5" else adapter_bytes * (1 - shape.token_share)
    head = shape.vocab_size * shape.hidden_size
    params = shape.prompt_params()
    attention = sum(shape.attention_flops(i + 1) for i in range(num_tokens))
    flops = 2 * num_tokens * (params + adapter / FLOAT_BYTES) + 2 * head + attention
    num_bytes = FLOAT_BYTES * (params + head) + adapter + num_tokens * shape.kv_bytes_per_token
    return max(flops / machine.flops, num_bytes / machine.bytes_per_second)


def step_seconds(
    shape: Shape, machine: Machine, contexts: Sequence[int], row_adapter_bytes: Sequence[int], distinct_bytes: float
) -> float:
    """One decode step. contexts: cached tokens of each row; row_adapter_bytes: of each row's adapter, 0 of the base.

    distinct_bytes: of all adapters in the batch, each counted once. Both in full; a T5's decoder reads its share.
    """
    share = shape.token_share
    rows = len(contexts)
    flops = 2 * rows * shape.token_params() + 2 * share * sum(row_adapter_bytes) / FLOAT_BYTES
    flops += sum(shape.attention_flops(context) for context in contexts)
    num_bytes = FLOAT_BYTES * shape.token_params() + share * distinct_bytes
    num_bytes += shape.kv_bytes_per_token * sum(contexts)
    return max(flops / machine.flops, num_bytes / machine.bytes_per_second)


def ceiling(
    shape: Shape, machine: Machine, requests: Sequence[Request], concurrency: int, adapter_bytes: Mapping[str, int]
) -> Ceiling:
    """Plays a closed loop through: whoever finishes makes room for the next prompt at once.

    adapter_bytes: of each adapter id in the list.
    """
    size = {"": 0, **adapter_bytes}
    waiting = list(reversed(requests))
    running: list[_Running] = []
    seconds, steps, read = 0.0, 0, 0.0
    while waiting or running:
        while waiting and len(running) < concurrency:
            request = waiting.pop()
            seconds += prompt_seconds(shape, machine, len(request.prompt), size[request.adapter])
            if request.max_new_tokens > 1:
                running.append(_Running(request, len(request.prompt) + 1, request.max_new_tokens - 1))
        if not running:
            break
        distinct = sum(size[adapter] for adapter in {row.request.adapter for row in running})
        rows = [size[row.request.adapter] for row in running]
        seconds += step_seconds(shape, machine, [row.context for row in running], rows, distinct)
        steps, read = steps + 1, read + distinct * shape.token_share
        for row in running:
            row.context, row.left = row.context + 1, row.left - 1
        running = [row for row in running if row.left > 0]
    output = sum(request.max_new_tokens for request in requests)
    return Ceiling(seconds, output / seconds, read / max(steps, 1))


def excess_overhead(step: float, base_step: float, adapter_bytes: float, machine: Machine) -> float:
    """(step with adapters - base step - adapter bytes / bandwidth) / base step: what physics does not ask for."""
    return (step - base_step - adapter_bytes / machine.bytes_per_second) / base_step
