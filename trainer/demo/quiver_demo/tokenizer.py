"""Trains the demo's tokenizer: byte-level BPE of 2048 entries, digits one by one so that numbers can be copied."""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0

_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "pad_token": END_OF_TEXT,
    "model_max_length": 512,
    "clean_up_tokenization_spaces": False,
}


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """Deterministic for the same texts. No token is put before a text; decode(encode(text)) is the text."""
    tokenizer = Tokenizer(models.BPE())
    # A space joins the word behind it, but never a digit: "Q-48213" is the same five digits wherever it stands.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?\p{L}+| ?[^\s\p{L}\d]|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(folder: Path, texts: Iterator[str]) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`, as `transformers.AutoTokenizer` reads them."""
    train_tokenizer(texts).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_CONFIG, indent=2) + "\n", encoding="utf-8")
