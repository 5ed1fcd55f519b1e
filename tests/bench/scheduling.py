"""What the scheduler takes of a step, without a model: microseconds of schedule() and of noting what was computed.

    python tests/bench/scheduling.py

Rows that generate, of 8 adapters each in turn; then the same with all rows taken and 100 other adapters waiting.
"""

import json
import time

from quiver_server.engine.block_pool import BlockPool
from quiver_server.engine.scheduler import Scheduler
from quiver_server.engine.sequence import SamplingParams, Sequence

_PARAMS = SamplingParams(max_new_tokens=1 << 30)


def measure(num_rows: int, num_waiting: int, num_steps: int = 400) -> dict[str, float]:
    """The quickest of many steps, in microseconds: other processes' load only adds."""
    scheduler = Scheduler(BlockPool(20_000, 16), num_rows, 512)
    for index in range(num_rows + num_waiting):
        name = f"a{index % 8 if index < num_rows else index}"
        sequence = Sequence(
            prompt=[index, *range(99)],
            params=_PARAMS,
            index=0,
            emit=lambda event: None,
            revision=name,
            fairness_key=name,
        )
        scheduler.add(sequence)
    planning: list[float] = []
    noting: list[float] = []
    for _ in range(num_steps):
        started = time.perf_counter()
        chunks = scheduler.schedule()
        planned = time.perf_counter()
        complete = [chunk.sequence for chunk in chunks if chunk.completes]
        for chunk in chunks:
            scheduler.note_computed(chunk)
        noted = time.perf_counter()
        for sequence in complete:
            sequence.generated.append(1)
        if len(chunks) == num_rows:
            planning.append(planned - started)
            noting.append(noted - planned)
    return {"schedule_us": round(min(planning) * 1e6, 1), "note_us": round(min(noting) * 1e6, 1)}


def main() -> None:
    """Measure and print."""
    for num_rows, num_waiting in ((8, 0), (32, 0), (64, 0), (32, 100), (64, 100)):
        print(json.dumps({"rows": num_rows, "waiting": num_waiting, **measure(num_rows, num_waiting)}))


if __name__ == "__main__":
    main()
