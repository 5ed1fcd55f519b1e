"""OpenVINO GenAI's continuous batching: the base, or one adapter that the whole batch shares.

Settings: base (the exported folder), adapters (at most one folder by id), alpha (lora_alpha / r: it does not read it),
kv_precision ("f32", or "u8", its own default, with which some answers differ from float32's).

The adapter is a constant of the graph (MODE_STATIC): set dynamically, 2026.4.1 answered as the base without a word.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from bench.peers.protocol import Answer, serve
from bench.records import Record
from bench.workload import Request

CACHE_GIB = 1


def load(settings: dict[str, Any]) -> Answer:
    """The pipeline. Several adapters in a batch would all be answered by the first one's: refused."""
    if len(settings["adapters"]) > 1:
        raise ValueError("OpenVINO GenAI answers a batch of several adapters with the first one's weights")
    scheduling = genai.SchedulerConfig()
    scheduling.cache_size = CACHE_GIB
    properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    properties["KV_CACHE_PRECISION"] = settings["kv_precision"]
    chosen = genai.AdapterConfig()
    for path in settings["adapters"].values():
        weights = genai.Adapter(str(Path(path) / "adapter_model.safetensors"))
        chosen = genai.AdapterConfig(weights, settings["alpha"], mode=genai.AdapterConfig.Mode.MODE_STATIC)
        properties["adapters"] = chosen
    pipeline = genai.ContinuousBatchingPipeline(settings["base"], scheduling, "CPU", properties)

    def answer(requests: Sequence[Request], concurrency: int) -> list[Record]:
        return closed_loop(pipeline, requests, concurrency, chosen)

    return answer


def closed_loop(
    pipeline: genai.ContinuousBatchingPipeline, requests: Sequence[Request], concurrency: int, adapter: Any
) -> list[Record]:
    """Whoever finishes makes room for the next."""
    submitted: dict[int, float] = {}
    times: dict[int, list[float]] = {}
    ids: dict[int, list[int]] = {}
    handles: dict[int, Any] = {}
    pending = list(reversed(list(enumerate(requests))))
    while pending or handles:
        while pending and len(handles) < concurrency:
            index, request = pending.pop()
            submitted[index], times[index], ids[index] = time.perf_counter(), [], []
            handles[index] = _add(pipeline, index, request, adapter)
        pipeline.step()
        now = time.perf_counter()
        for index, handle in list(handles.items()):
            if handle.can_read():
                for output in handle.read().values():
                    times[index] += [now] * len(output.generated_ids)
                    ids[index] += output.generated_ids
            if len(ids[index]) >= requests[index].max_new_tokens:
                del handles[index]
    return [
        Record(i, len(request.prompt), submitted[i], tuple(times[i]), tuple(ids[i]))
        for i, request in enumerate(requests)
    ]


def _add(pipeline: genai.ContinuousBatchingPipeline, index: int, request: Request, adapter: Any) -> Any:
    config = genai.GenerationConfig()
    config.max_new_tokens = request.max_new_tokens
    config.ignore_eos = True
    config.do_sample = False
    if request.adapter:
        config.adapters = adapter
    prompt = ov.Tensor(np.array([request.prompt], dtype=np.int64))
    return pipeline.add_request(index, prompt, config)


if __name__ == "__main__":
    serve(load, ("openvino-genai", "openvino", "optimum-intel"))
