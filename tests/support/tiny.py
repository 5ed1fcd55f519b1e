"""Tiny random Hugging Face folders, tokenizers and LoRA adapters, made by other people's code: the tests' oracles.

Weights are drawn with a large deviation (0.15) and norms and biases are randomised too: at Hugging Face's default
of 0.02 even a wrong position moves the logits so little that tests pass vacuously.
"""

import json
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from quiver_peft import GPT, T5

VOCAB_SIZE = 320
BOS, EOS, PAD = 0, 1, 2  # ids of the tiny tokenizer's special tokens, and of the tiny models' configurations
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
INITIALIZER_RANGE = 0.15
TOLERANCE = 1e-4  # fp32 against another implementation
MAX_POSITIONS = 256
_T5_SETTINGS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "decoder_start_token_id": 2,
}

disable_progress_bar()

_Model = TypeVar("_Model", bound=PreTrainedModel)

_TEXT = [
    "The parcel arrived late and the box was broken.",
    "Please send the order number and the name of the product.",
    "I would like to return the lamp that I bought last week.",
    "Where is my refund? I have been waiting for two weeks now.",
    "Thank you for the quick answer, the new charger works well.",
]


def tiny_tokenizer(folder: str | Path, *, add_bos: bool = False) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json: a byte-level BPE of `VOCAB_SIZE` ids that can spell any text.

    add_bos: the post-processor puts `<|bos|>` before every text, as Llama's does.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL_TOKENS[BOS]} $A", special_tokens=[(SPECIAL_TOKENS[BOS], BOS)]
        )
    tokenizer.save(str(path / "tokenizer.json"))
    named = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_POSITIONS, **named}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def tiny_llama(folder: str | Path, *, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Write a random Llama (GQA, untied, 3 layers) and return it, in evaluation mode. overrides: of LlamaConfig."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        **special_ids(),
        **overrides,
    }
    torch.manual_seed(seed)
    return save_model(LlamaForCausalLM(LlamaConfig(**settings)), folder, seed)


def tiny_gpt2(folder: str | Path, *, seed: int = 0, **overrides: Any) -> GPT2LMHeadModel:
    """Write a random GPT-2 (tied, 3 layers) and return it, in evaluation mode. overrides: of GPT2Config."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": MAX_POSITIONS,
        **special_ids(),
        **overrides,
    }
    torch.manual_seed(seed)
    return save_model(GPT2LMHeadModel(GPT2Config(**settings)), folder, seed)


def tiny_mistral(folder: str | Path, *, seed: int = 0) -> MistralForCausalLM:
    """Write a random Mistral whose layers look 13 tokens back, and return it, in evaluation mode."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "sliding_window": 13,
        "tie_word_embeddings": False,
        **special_ids(),
    }
    torch.manual_seed(seed)
    return save_model(MistralForCausalLM(MistralConfig(**settings)), folder, seed)


def tiny_t5(folder: str | Path, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Write a random T5 1.0 (tied, ReLU; an encoder of 3 layers, a decoder of 3) and return it, in evaluation mode.

    Few buckets of short distances: sequences of tests reach all of them. overrides: of T5Config.
    """
    settings: dict[str, Any] = {**_T5_SETTINGS, "initializer_factor": 4.0, **overrides}
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**settings))
    # The embedding starts at unit deviation, at which the scaled head would hide what lies before it.
    model.shared.weight.data.mul_(INITIALIZER_RANGE * 4)
    return save_model(model, folder, seed)


def tiny_flan(folder: str | Path, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The same in the form of T5 1.1 and Flan: gated GELU, an unscaled head of its own."""
    form: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    settings: dict[str, Any] = {**_T5_SETTINGS, "initializer_factor": 4.0, **form, **overrides}
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**settings))
    _untie(model, seed)
    return save_model(model, folder, seed)


def tiny_mt5(folder: str | Path, *, seed: int = 0) -> PreTrainedModel:
    """The same as mT5, whose configuration says less."""
    torch.manual_seed(seed)
    model = MT5ForConditionalGeneration(MT5Config(**_T5_SETTINGS, initializer_factor=4.0))
    _untie(model, seed)
    return save_model(model, folder, seed)


def _untie(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(model.lm_head.weight.shape, generator=generator) * INITIALIZER_RANGE
    model.lm_head.weight = torch.nn.Parameter(weight)


def hf_lora(
    model_folder: str | Path,
    out_folder: str | Path,
    *,
    rank: int = 4,
    alpha: float = 8,
    targets: str | Sequence[str] = ("q_proj", "v_proj"),
    seed: int = 0,
    save_dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> PeftModel:
    """Write a randomised LoRA with Hugging Face PEFT itself, and return the model with it as PEFT loads it again.

    settings: any other field of `LoraConfig`. save_dtype: the type of the tensors on disk.
    """
    base = hf_model(model_folder)
    names = targets if isinstance(targets, str) else list(targets)
    is_gpt2 = base.config.model_type == "gpt2"
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] - PEFT takes fractions as well
        target_modules=names,
        fan_in_fan_out=is_gpt2,
        task_type="SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM",
        **settings,
    )
    with their_deprecations():
        model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    generator = torch.Generator().manual_seed(seed + 1000)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            _randomise(parameter, 0.0, 0.3, generator)
    if save_dtype != torch.float32:
        model.to(save_dtype)
    model.save_pretrained(str(out_folder))
    return hf_peft(model_folder, out_folder)


def hf_model(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The folder as transformers loads it, in evaluation mode."""
    is_t5 = AutoConfig.from_pretrained(str(folder)).is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM
    return auto.from_pretrained(str(folder), dtype=dtype).eval()


def hf_peft(model_folder: str | Path, adapter_folder: str | Path) -> PeftModel:
    """An adapter folder on its base as Hugging Face PEFT loads it, in evaluation mode."""
    base = hf_model(model_folder)
    with their_deprecations():
        return PeftModel.from_pretrained(base, str(adapter_folder)).eval()


@torch.inference_mode()
def hf_logits(model: PreTrainedModel | PeftModel, tokens: Tensor, *, use_cache: bool = False) -> Tensor:
    """Logits of whole sequences without padding, as `our_logits` makes them. tokens: [B, S] -> [B, S, V]."""
    if model.config.is_encoder_decoder:
        return model(input_ids=tokens, decoder_input_ids=target_of(tokens), use_cache=use_cache).logits
    return model(input_ids=tokens, use_cache=use_cache).logits


def our_logits(model: GPT | T5, tokens: Tensor) -> Tensor:
    """A T5 reads the tokens and writes `target_of` them, a GPT continues them. tokens: [B, S] -> [B, S, V]."""
    return model(tokens, target_of(tokens)) if isinstance(model, T5) else model(tokens)


def target_of(tokens: Tensor) -> Tensor:
    """A target for a source, as long as it: any other tokens will do. [B, S] -> [B, S]."""
    return (tokens + 1).clamp(max=VOCAB_SIZE - 1).flip(-1)


@torch.inference_mode()
def hf_greedy(
    model: PreTrainedModel | PeftModel, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int] = (EOS,)
) -> list[int]:
    """The greedy continuation of one prompt by transformers' own `generate`, its stop token left out."""
    tokens = torch.tensor([list(prompt)])
    out = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=PAD,
    )
    first = 1 if model.config.is_encoder_decoder else len(prompt)
    new: list[int] = out[0, first:].tolist()
    return new[:-1] if new and new[-1] in stop_ids else new


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    """Token ids without the special ones, int64."""
    return torch.randint(len(SPECIAL_TOKENS), VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """One prompt of random ids for each length."""
    return [random_tokens(length, seed=seed + i).tolist() for i, length in enumerate(lengths)]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal within `tolerance`, absolutely; and finite, and large enough that agreeing means something."""
    assert actual.shape == expected.shape
    assert expected.abs().max().item() >= 1000 * tolerance, "the expected values are too small to test against"
    assert (actual.float() - expected.float()).abs().max().item() <= tolerance


def assert_matters(result: Tensor, without: Tensor, tolerance: float = TOLERANCE) -> None:
    """What is under test moves the result by at least a thousand tolerances, so that a test cannot pass without it."""
    assert (result - without).abs().max().item() >= 1000 * tolerance


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file on disk: `edit` gets them by name and changes the dictionary."""
    # Copied: loaded tensors are views of the mapped file that is about to be written.
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON object on disk; a field set to `...` is removed."""
    content: Mapping[str, Any] = json.loads(path.read_text())
    edited = {**content, **changes}
    path.write_text(json.dumps({key: value for key, value in edited.items() if value is not ...}))


@contextmanager
def their_deprecations() -> Generator[None]:
    """PEFT calls what transformers deprecates: not ours to mend, and warnings are errors here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def special_ids() -> dict[str, Any]:
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    return {**ids, "initializer_range": INITIALIZER_RANGE}


def save_model(model: _Model, folder: str | Path, seed: int) -> _Model:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases, which start at exactly 1 and 0
            mean = 1.0 if bool((parameter == 1).all()) else 0.0
            _randomise(parameter, mean, INITIALIZER_RANGE, generator)
    model.save_pretrained(str(folder))
    return model.eval()


def _randomise(parameter: Tensor, mean: float, deviation: float, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator) * deviation
    parameter.data.copy_(mean + noise)
