"""Adapters of every method on a tiny base: made by Hugging Face PEFT where it can, else by us; each with its oracle."""

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from support.live_server import LiveServer
from support.tiny import EOS, hf_model, hf_peft, their_deprecations
from transformers.modeling_utils import PreTrainedModel

from quiver_peft import (
    T5,
    CanonicalAdaptersPEFTConfig,
    IA3PEFTConfig,
    LoraPEFTConfig,
    PrefixPEFTConfig,
    PromptTuningPEFTConfig,
    PtuningPEFTConfig,
    load_model,
)

# Of a prompt [1, S] and the answer so far [1, N], N from 0: a GPT's logits of all of it, [1, S + N, V]; a T5's of the
# answer behind its start token, [1, 1 + N, V]. The last row foretells the next token.
Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

HF_ADAPTERS: dict[str, Callable[[dict[str, Any]], PeftConfig]] = {
    "lora-r4": lambda task: LoraConfig(r=4, lora_alpha=8, **task),
    "lora-all-r7": lambda task: LoraConfig(r=7, lora_alpha=5, target_modules="all-linear", use_rslora=True, **task),
    "dora-r3": lambda task: LoraConfig(r=3, lora_alpha=6, use_dora=True, **task),
    "dora-all-r2": lambda task: LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules="all-linear", **task),
    "ia3": lambda task: IA3Config(**task),
    "ia3-b": lambda task: IA3Config(**task),
    "prompt-1": lambda task: PromptTuningConfig(num_virtual_tokens=1, **task),
    "prompt-9": lambda task: PromptTuningConfig(num_virtual_tokens=9, **task),
    "ptuning-5": lambda task: PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=24, **task),
    "ptuning-20": lambda task: PromptEncoderConfig(num_virtual_tokens=20, encoder_hidden_size=24, **task),
    "prefix-3": lambda task: PrefixTuningConfig(num_virtual_tokens=3, **task),
    "prefix-17": lambda task: PrefixTuningConfig(num_virtual_tokens=17, **task),
}
OUR_ADAPTERS: dict[str, list[Any]] = {
    "canonical-pre": [CanonicalAdaptersPEFTConfig(adapter_dim=6)],
    "canonical-post": [CanonicalAdaptersPEFTConfig(adapter_dim=11, norm_position="post", activation="relu")],
    "ptuning+canonical": [
        PtuningPEFTConfig(virtual_tokens=4, bottleneck_dim=16, embedding_dim=16),
        CanonicalAdaptersPEFTConfig(adapter_dim=5, norm_position=None),
    ],
    "lora+ia3": [LoraPEFTConfig(adapter_dim=3, target_modules=["all"]), IA3PEFTConfig()],
    "dora+ia3": [LoraPEFTConfig(adapter_dim=3, use_dora=True, variant="canonical"), IA3PEFTConfig()],
    "prefix+prompt": [PrefixPEFTConfig(virtual_tokens=6), PromptTuningPEFTConfig(virtual_tokens=3)],
    "all-four": [
        IA3PEFTConfig(),
        CanonicalAdaptersPEFTConfig(adapter_dim=4),
        LoraPEFTConfig(adapter_dim=2, target_modules=["all"]),
        PtuningPEFTConfig(virtual_tokens=8, bottleneck_dim=16, embedding_dim=16),
    ],
}
# What an encoder-decoder has besides.
OUR_T5_ADAPTERS: dict[str, list[Any]] = {
    "cross-lora": [LoraPEFTConfig(adapter_dim=5, target_modules=["cross_attention"])],
    "cross-canonical": [CanonicalAdaptersPEFTConfig(adapter_dim=7, places=["attention", "cross_attention", "mlp"])],
}


@dataclass
class MethodBench:
    """A base, its adapters on disk, a server on them, and for each id ("": the base) what it computes alone."""

    base: Path
    adapters: Path
    server: LiveServer
    oracles: dict[str, Logits] = field(default_factory=dict[str, Logits])
    _known: dict[tuple[str, tuple[int, ...]], list[int]] = field(
        default_factory=dict[tuple[str, tuple[int, ...]], list[int]]
    )

    def expected(self, adapter_id: str, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """The greedy answer of one request alone, its end token left out: whole sequences, no cache, no padding."""
        known = self._known.setdefault((adapter_id, tuple(prompt)), [])
        while len(known) < num_tokens and (not known or known[-1] != EOS):
            so_far = torch.tensor([known], dtype=torch.int64)
            logits = self.oracles[adapter_id](torch.tensor([list(prompt)]), so_far)
            known.append(int(logits[0, -1].argmax()))
        answer = known[:num_tokens]
        return answer[:-1] if answer[-1] == EOS else answer


def make_hf_adapter(base: Path, folder: Path, config: PeftConfig, seed: int) -> Logits:
    """Write one with PEFT itself, every trained number random; its oracle is what PEFT loads again."""
    plain = hf_model(base)
    if isinstance(config, LoraConfig | IA3Config):
        config.fan_in_fan_out = plain.config.model_type == "gpt2"
    with their_deprecations():
        model = get_peft_model(plain, config)
    _randomise(model, seed)
    model.save_pretrained(str(folder))
    return hf_oracle(hf_peft(base, folder))


def hf_oracle(model: PreTrainedModel | PeftModel) -> Logits:
    """Transformers or PEFT itself, one whole sequence at a time."""

    @torch.inference_mode()
    def logits(prompt: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        # With a cache, as a prefix lives in one; without the rows of virtual tokens.
        if model.config.is_encoder_decoder:
            return model(input_ids=prompt, decoder_input_ids=with_start(model.config, answer)).logits
        tokens = torch.cat([prompt, answer], dim=1)
        return model(input_ids=tokens).logits[:, -tokens.shape[1] :]

    return logits


def with_start(config: Any, answer: torch.Tensor) -> torch.Tensor:
    """[1, N] -> [1, 1 + N]."""
    return F.pad(answer, (1, 0), value=config.decoder_start_token_id)


def make_our_adapter(base: Path, folder: Path, configs: Sequence[Any], seed: int) -> Logits:
    """Write one with our library, every trained number random; its oracle is the trainable form, read again."""
    model = load_model(base)
    model.add_adapter(configs)
    assert model.adapter is not None
    _randomise(model.adapter, seed)
    model.save_adapter(folder)
    loaded = load_model(base)
    loaded.load_adapters(folder)
    loaded.freeze()

    @torch.inference_mode()
    def logits(prompt: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        if isinstance(loaded, T5):
            return loaded(prompt, F.pad(answer, (1, 0), value=loaded.base.config.start_token_id))
        return loaded(torch.cat([prompt, answer], dim=1))

    return logits


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Trained numbers move by 0.2 around where they start: gates and scales stay near 1, the rest near 0."""
    generator = torch.Generator().manual_seed(seed + 500)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2


@contextmanager
def running(folder: Path, base: Path, *options: str, without: Collection[str] = ()) -> Generator[MethodBench]:
    """The adapters above on `base`, and a server that must drain and exit with 0 at the end.

    without: names of `HF_ADAPTERS` that Hugging Face itself cannot compute on this base.
    """
    adapters = folder / "adapters"
    adapters.mkdir(parents=True)
    plain = hf_model(base)
    is_t5 = plain.config.is_encoder_decoder
    task = {"task_type": "SEQ_2_SEQ_LM" if is_t5 else "CAUSAL_LM"}
    oracles: dict[str, Logits] = {"": hf_oracle(plain)}
    for seed, (adapter_id, make) in enumerate(HF_ADAPTERS.items()):
        if adapter_id not in without:
            oracles[adapter_id] = make_hf_adapter(base, adapters / adapter_id, make(task), seed)
    for seed, (adapter_id, configs) in enumerate({**OUR_ADAPTERS, **(OUR_T5_ADAPTERS if is_t5 else {})}.items()):
        oracles[adapter_id] = make_our_adapter(base, adapters / adapter_id.replace("+", "-"), configs, 100 + seed)
    server = LiveServer(base, adapters, folder / "server.log", *options)
    try:
        yield MethodBench(base, adapters, server, {key.replace("+", "-"): value for key, value in oracles.items()})
    finally:
        assert server.stop() == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()
