"""Greedy decoding of many ragged prompts at once, token by token equal to transformers' `generate` on each alone."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from support.tiny import hf_greedy, hf_lora, hf_model, random_prompts
from transformers.modeling_utils import PreTrainedModel

from quiver_peft import GPT, QuiverError
from quiver_peft.decode import greedy_decode

LENGTHS = [1, 5, 17, 2, 33, 16, 9, 40, 15, 1, 24, 7]
PROMPTS = random_prompts(LENGTHS, seed=5)
NEW = 14
NO_STOP: tuple[int, ...] = ()


def _theirs(model: PreTrainedModel, stop_ids: Sequence[int] = (), new: int = NEW) -> list[list[int]]:
    return [hf_greedy(model, prompt, new, stop_ids or [10_000]) for prompt in PROMPTS]


def _stop_ids(answers: Sequence[Sequence[int]]) -> list[int]:
    """Tokens whose stop makes rows end at different times, some at their very first token and some not at all."""
    chosen = [answers[0][0], answers[3][5], answers[6][8]]
    lengths = {next((i for i, token in enumerate(answer) if token in chosen), NEW) for answer in answers}
    assert len(lengths) >= 3
    assert {0, NEW} <= lengths
    return chosen


@pytest.mark.parametrize("max_rows", [1, 3, 32])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equals_generate(family: str, max_rows: int, model_folders: dict[str, Path]) -> None:
    expected = _theirs(hf_model(model_folders[family]))
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)
    base = GPT.from_pretrained(model_folders[family]).base
    assert greedy_decode(base, PROMPTS, max_new_tokens=NEW, stop_ids=NO_STOP, max_rows=max_rows) == expected


@pytest.mark.parametrize("max_rows", [2, 5, 12])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_that_stop_early_make_room(family: str, max_rows: int, model_folders: dict[str, Path]) -> None:
    model = hf_model(model_folders[family])
    stop_ids = _stop_ids(_theirs(model))
    base = GPT.from_pretrained(model_folders[family]).base
    found = greedy_decode(base, PROMPTS, max_new_tokens=NEW, stop_ids=stop_ids, max_rows=max_rows)
    assert found == _theirs(model, stop_ids)


@pytest.mark.parametrize(("family", "targets"), [("llama", "all-linear"), ("gpt2", ["c_attn", "c_proj"])])
def test_with_an_adapter(family: str, targets: str | list[str], model_folders: dict[str, Path], tmp_path: Path) -> None:
    adapted = hf_lora(model_folders[family], tmp_path, targets=targets)
    model = GPT.from_pretrained(model_folders[family])
    bare = greedy_decode(model.base, PROMPTS, max_new_tokens=NEW, stop_ids=NO_STOP)
    model.load_adapters(tmp_path)
    assert model.adapter is not None
    weights = model.adapter.weights(model.base)
    found = greedy_decode(model.base, PROMPTS, max_new_tokens=NEW, stop_ids=NO_STOP, weights=weights, max_rows=5)
    assert found == [hf_greedy(adapted, prompt, NEW, [10_000]) for prompt in PROMPTS]
    assert all(with_it != without for with_it, without in zip(found, bare, strict=True))


def test_every_finished_row_is_reported_once(llama_folder: Path) -> None:
    base = GPT.from_pretrained(llama_folder).base
    reported: list[int] = []
    found = greedy_decode(base, PROMPTS, max_new_tokens=6, stop_ids=NO_STOP, max_rows=4, on_finished=reported.append)
    assert sorted(reported) == sorted(len(answer) for answer in found) == [6] * len(PROMPTS)


def test_no_prompts_no_answers(llama_folder: Path) -> None:
    assert greedy_decode(GPT.from_pretrained(llama_folder).base, [], max_new_tokens=4, stop_ids=NO_STOP) == []


def test_one_new_token(llama_folder: Path) -> None:
    expected = _theirs(hf_model(llama_folder), new=1)
    base = GPT.from_pretrained(llama_folder).base
    assert greedy_decode(base, PROMPTS, max_new_tokens=1, stop_ids=NO_STOP) == expected


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([[5, 6], []], 4, "prompt 1 is empty"),
        ([[5]], 0, "max_new_tokens must be at least 1, not 0"),
        ([[5], [7] * 250], 10, "prompt 1 has 250 tokens; with 10 new ones that is over the 256 positions of this base"),
    ],
)
def test_what_cannot_be_decoded_is_refused(
    prompts: list[list[int]], max_new_tokens: int, message: str, gpt2_folder: Path
) -> None:
    base = GPT.from_pretrained(gpt2_folder).base
    with pytest.raises(QuiverError, match=message):
        greedy_decode(base, prompts, max_new_tokens=max_new_tokens, stop_ids=NO_STOP)
