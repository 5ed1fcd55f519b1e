"""Spans are missing in as many places as T5's pretraining leaves out, and source and target together are the text."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny import EOS, tiny_t5, tiny_tokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from quiver_peft import LoraPEFTConfig, load_model
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer import DataError, DataSection, TrainConfig, Trainer
from quiver_trainer.data.span_corruption import SpanCorruptor, corrupt_spans, sentinel_ids

SENTINELS = list(range(900, 1000))


def mended(source: list[int], target: list[int]) -> list[int]:
    """The text again: each sentinel of the source replaced by what follows it in the target."""
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[[*spans][-1]].append(token)
    assert spans[[*spans][-1]] == [], "the last sentinel ends the target"
    return [t for token in source[:-1] for t in spans.get(token, [token])]


@pytest.mark.parametrize("length", [2, 3, 5, 20, 114, 512])
def test_source_and_target_make_the_text(length: int) -> None:
    text = [random.Random(length).randrange(100, 800) for _ in range(length)]
    for seed in range(20):
        sample = corrupt_spans(text, SENTINELS, EOS, random.Random(seed))
        source, target = sample.tokens[: sample.num_prompt_tokens], sample.tokens[sample.num_prompt_tokens :]
        assert source[-1] == target[-1] == EOS
        assert mended(source, target) == text
        missing = sum(token not in SENTINELS for token in target[:-1])
        spans = [token for token in source if token in SENTINELS]
        assert missing == max(1, round(0.15 * length)) and len(spans) == max(1, round(missing / 3))
        assert spans == SENTINELS[: len(spans)] and source[0] not in SENTINELS


def test_spans_are_drawn_anew_in_each_epoch(tmp_path: Path) -> None:
    tokenizer = tokenizer_with_sentinels(tmp_path)
    mender = SpanCorruptor(tokenizer, EOS, 3)
    text = corrupt_spans(list(range(10, 60)), sentinel_ids(tokenizer), EOS, random.Random(0))
    assert mender(text, 4, 0) is text, "a prompt with a completion is left as it is"
    raw = type(text)(list(range(10, 60)), 0)
    assert mender(raw, 4, 0) == mender(raw, 4, 0) != mender(raw, 4, 1)
    assert mender(raw, 4, 0) != mender(raw, 5, 0)


def tokenizer_with_sentinels(folder: Path) -> Tokenizer:
    tiny_tokenizer(folder)
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_special_tokens([AddedToken(f"<extra_id_{i}>") for i in range(8)])
    fast.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def test_a_t5_goes_on_with_its_pretraining(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    base = tmp_path / "t5"
    base.mkdir()
    tokenizer = tokenizer_with_sentinels(base)
    tiny_t5(base, vocab_size=max(sentinel_ids(tokenizer)) + 1)
    rows = tmp_path / "texts.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"Number {i} is a text of a few words and more."}) + "\n" for i in range(9))
    )
    config = make_config(base=base, data=DataSection(train=rows, validation=rows), max_steps=4)
    model = load_model(base)
    model.add_adapter(LoraPEFTConfig(adapter_dim=2))
    record = Trainer(config).fit(model).record
    assert record["steps"] == 4 and record["data"]["train"]["rows"] == 9


def test_a_base_without_sentinels_says_so(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    base = tmp_path / "t5"
    tiny_t5(base)
    tiny_tokenizer(base)
    rows = tmp_path / "texts.jsonl"
    rows.write_text('{"text": "a text of some words"}')
    config = make_config(base=base, data=DataSection(train=rows))
    model = load_model(base)
    model.add_adapter(LoraPEFTConfig(adapter_dim=2))
    with pytest.raises(DataError, match="need a tokenizer with <extra_id_0>"):
        Trainer(config).fit(model)
