"""How a rival's process is asked: one JSON object a line on stdin, one answer a line on stdout. Plain Python.

The first line holds the settings, and is answered with versions once the model is ready. Each further line names a
file of requests and a concurrency, and is answered with the records. What libraries print goes to stderr.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.records import Record, record_to_json
from bench.workload import Request, read_requests

# Answers requests, `concurrency` at a time, and says when each token came.
Answer = Callable[[Sequence[Request], int], list[Record]]


def serve(load: Callable[[dict[str, Any]], Answer], packages: Sequence[str]) -> None:
    """Load once, then answer until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    answer = load(json.loads(sys.stdin.readline()))
    print(json.dumps({"versions": {name: version(name) for name in packages}}), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        records = answer(read_requests(Path(job["requests"])), job["concurrency"])
        print(json.dumps([record_to_json(record) for record in records]), file=answers)
