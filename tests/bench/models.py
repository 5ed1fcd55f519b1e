"""Makes the models and adapters that are measured: random weights in Hugging Face folders, by Hugging Face's own code.

    python -m bench.models FOLDER NAME KIND...     e.g. runs/bench/models llama60 lora mix

Folders that are there already are left as they are. What they hold:

    FOLDER/NAME/base            the model and a tokenizer with an entry for each of its ids
    FOLDER/NAME/lora/lora-00    rank 16 on all linears, as many as `adapter_sets` says
    FOLDER/NAME/mix/...         LoRA, IA3, P-Tuning and canonical adapters, four of each
    FOLDER/NAME/none            no adapter
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench.adapter_sets import MIX, Kind, loras
from bench.shapes import RANK, SHAPES, Shape
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PromptEncoderConfig, get_peft_model
from support.tiny import hf_model, their_deprecations
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_utils import PreTrainedModel

from quiver_peft import CanonicalAdaptersPEFTConfig, load_model

_INITIALIZER_RANGE = 0.1
# Of what an adapter has learnt: so that it changes its base's weights about as much as they are. A T5's queries and
# keys are small, their products unscaled: larger ones would make its attention so hard that rounding decides answers.
_DEVIATION = {"llama": 0.1, "qwen2": 0.1, "t5": 0.02}
_MAX_POSITIONS = 2048
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_VIRTUAL_TOKENS = 20
_BOTTLENECK = 32


def make_base(shape: Shape, folder: Path) -> None:
    """Random weights from seed 0, large enough for distinct answers."""
    torch.manual_seed(0)
    model = _model(shape)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases, which start at exactly 1 and 0
            parameter.data += torch.randn(parameter.shape, generator=generator) * _INITIALIZER_RANGE
    model.save_pretrained(str(folder))
    _write_tokenizer(folder, shape.vocab_size)


def _model(shape: Shape) -> PreTrainedModel:
    if shape.family == "t5":
        sizes = {
            "vocab_size": shape.vocab_size,
            "d_model": shape.hidden_size,
            "d_kv": shape.head_dim,
            "d_ff": shape.ffn_size,
            "num_layers": shape.num_layers,
            "num_heads": shape.num_heads,
        }
        settings: dict[str, Any] = {**sizes, **_SPECIAL, "decoder_start_token_id": 2}
        config = T5Config(**settings)
        model = T5ForConditionalGeneration(config)
        model.shared.weight.data.mul_(_INITIALIZER_RANGE)  # it starts at unit deviation
        return model
    settings = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": _MAX_POSITIONS,
        "tie_word_embeddings": True,
        "initializer_range": _INITIALIZER_RANGE,
        **_SPECIAL,
    }
    if shape.family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**settings))
    return LlamaForCausalLM(LlamaConfig(**settings))


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE with an entry for each id, so that every random answer has a text to make and to send."""
    special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    characters = [chr(code) for code in range(0x21, 0x7F)] + ["Ġ"]
    pieces = special + characters
    merges: list[str] = []
    for left in characters:
        for right in characters:
            if len(pieces) < vocab_size:
                pieces.append(left + right)
                merges.append(f"{left} {right}")
    words = [piece for piece in pieces if len(piece) == 2]
    for left in words:
        for right in words:
            if len(pieces) >= vocab_size:
                break
            pieces.append(left + right)
            merges.append(f"{left} {right}")
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
            for i, text in enumerate(special)
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    named = {"bos_token": special[0], "eos_token": special[1], "pad_token": special[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))


def make_loras(base: Path, folder: Path) -> None:
    """Many LoRA adapters from one PEFT model whose weights are drawn anew for each."""
    model = _peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", **_task(base)))
    for i, name in enumerate(loras(base.parent.name)):
        _randomise(model, _deviation(base), seed=i)
        model.save_pretrained(str(folder / name))


def make_mix(base: Path, folder: Path) -> None:
    """Four of each of the four methods; canonical ones, which Hugging Face does not have, with our library."""
    hf: dict[str, Callable[[], PeftConfig]] = {
        "lora": lambda: LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", **_task(base)),
        "ia3": lambda: IA3Config(**_task(base)),
        "ptuning": lambda: PromptEncoderConfig(num_virtual_tokens=_VIRTUAL_TOKENS, **_task(base)),
    }
    for method, names in MIX.items():
        for i, name in enumerate(names):
            if method == "canonical":
                ours = load_model(base)
                ours.add_adapter([CanonicalAdaptersPEFTConfig(adapter_dim=_BOTTLENECK)])
                assert ours.adapter is not None
                _randomise(ours.adapter, _deviation(base), seed=i)
                ours.save_adapter(folder / name)
            else:
                model = _peft_model(base, hf[method]())
                _randomise(model, _deviation(base), seed=i)
                model.save_pretrained(str(folder / name))


def _task(base: Path) -> dict[str, Any]:
    is_t5 = json.loads((base / "config.json").read_text())["model_type"] == "t5"
    return {"task_type": "SEQ_2_SEQ_LM" if is_t5 else "CAUSAL_LM"}


def _peft_model(base: Path, config: PeftConfig) -> PeftModel:
    with their_deprecations():
        model = get_peft_model(hf_model(base), config)
    assert isinstance(model, PeftModel)
    return model


def _deviation(base: Path) -> float:
    return _DEVIATION[json.loads((base / "config.json").read_text())["model_type"]]


def _randomise(model: torch.nn.Module, deviation: float, seed: int) -> None:
    """Scales stay near 1, the rest near 0."""
    generator = torch.Generator().manual_seed(seed + 100)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            mean = 1.0 if "ia3_" in name else 0.0
            parameter.data = mean + torch.randn(parameter.shape, generator=generator) * deviation


def make(models: Path, name: str, kinds: list[Kind]) -> None:
    """What is missing of a model's folders; each is made beside its place and then renamed."""
    base = models / name / "base"
    makers: dict[str, Callable[[Path], None]] = {
        "base": lambda folder: make_base(SHAPES[name], folder),
        "none": lambda folder: folder.mkdir(parents=True),
        "lora": lambda folder: make_loras(base, folder),
        "mix": lambda folder: make_mix(base, folder),
    }
    for kind in ("base", *kinds):
        folder = models / name / kind
        if folder.exists():
            continue
        unfinished = folder.with_name(f"{kind}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        makers[kind](unfinished)
        unfinished.rename(folder)
        print(f"made {folder}", file=sys.stderr)


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])  # pyright: ignore[reportArgumentType]
