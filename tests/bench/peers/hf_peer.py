"""Hugging Face `generate` with PEFT: static batches, each with its requests' adapters or one adapter after the other.

Settings: base, adapters (folders by id), mixed (False: a wave is answered adapter by adapter).
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from bench.peers.protocol import Answer, serve
from bench.records import Record
from bench.workload import Request
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, StoppingCriteria, StoppingCriteriaList

PAD = 2


class Clock(StoppingCriteria):
    """Never stops; notes when each token of the batch was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def load(settings: dict[str, Any]) -> Answer:
    """The model with all adapters loaded."""
    is_t5 = AutoConfig.from_pretrained(settings["base"]).is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM
    model: Any = auto.from_pretrained(settings["base"], dtype=torch.float32).eval()
    for i, (name, path) in enumerate(settings["adapters"].items()):
        if i:
            model.load_adapter(path, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, path, adapter_name=name).eval()

    def answer(requests: Sequence[Request], concurrency: int) -> list[Record]:
        records: list[Record] = []
        for start in range(0, len(requests), concurrency):
            wave = list(enumerate(requests))[start : start + concurrency]
            submitted = time.perf_counter()
            for group in groups(wave, settings["mixed"]):
                records += generate(model, group, submitted, is_t5, settings["mixed"])
        return sorted(records, key=lambda record: record.index)

    return answer


def groups(wave: list[tuple[int, Request]], mixed: bool) -> list[list[tuple[int, Request]]]:
    """What is generated in one call."""
    if mixed:
        return [wave]
    by_adapter: dict[str, list[tuple[int, Request]]] = {}
    for item in wave:
        by_adapter.setdefault(item[1].adapter, []).append(item)
    return list(by_adapter.values())


@torch.inference_mode()
def generate(model: Any, group: list[tuple[int, Request]], submitted: float, is_t5: bool, mixed: bool) -> list[Record]:
    """One static batch: padded, and as long as its longest. A decoder is padded on the left."""
    requests = [request for _, request in group]
    longest = max(len(request.prompt) for request in requests)
    tokens = torch.full((len(requests), longest), PAD)
    mask = torch.zeros_like(tokens)
    for row, request in enumerate(requests):
        length = len(request.prompt)
        place = slice(0, length) if is_t5 else slice(longest - length, longest)
        tokens[row, place], mask[row, place] = torch.tensor(request.prompt), 1
    options: dict[str, Any] = {}
    if requests[0].adapter and mixed:
        options["adapter_names"] = [request.adapter for request in requests]
    elif requests[0].adapter:
        model.set_adapter(requests[0].adapter)
    clock = Clock()
    count = requests[0].max_new_tokens
    out = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        pad_token_id=PAD,
        eos_token_id=None,
        stopping_criteria=StoppingCriteriaList([clock]),
        **options,
    )
    answers = out[:, -count:].tolist()
    return [
        Record(index, len(request.prompt), submitted, tuple(clock.times), tuple(answer))
        for (index, request), answer in zip(group, answers, strict=True)
    ]


if __name__ == "__main__":
    serve(load, ("torch", "transformers", "peft"))
