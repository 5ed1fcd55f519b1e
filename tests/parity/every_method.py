"""Adapters of every method on a tiny base: made by Hugging Face PEFT where it can, else by us; each with its oracle."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from server.live_server import LiveServer
from tiny import EOS, hf_logits, hf_model, hf_peft, their_deprecations

from quiver_peft import (
    GPT,
    CanonicalAdaptersPEFTConfig,
    IA3PEFTConfig,
    LoraPEFTConfig,
    PrefixPEFTConfig,
    PromptTuningPEFTConfig,
    PtuningPEFTConfig,
)

Logits = Callable[[torch.Tensor], torch.Tensor]  # [1, S] -> [1, S, V]

_CAUSAL: Any = {"task_type": "CAUSAL_LM"}
HF_ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "lora-r4": lambda: LoraConfig(r=4, lora_alpha=8, **_CAUSAL),
    "lora-all-r7": lambda: LoraConfig(r=7, lora_alpha=5, target_modules="all-linear", use_rslora=True, **_CAUSAL),
    "dora-r3": lambda: LoraConfig(r=3, lora_alpha=6, use_dora=True, **_CAUSAL),
    "dora-all-r2": lambda: LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules="all-linear", **_CAUSAL),
    "ia3": lambda: IA3Config(**_CAUSAL),
    "ia3-b": lambda: IA3Config(**_CAUSAL),
    "prompt-1": lambda: PromptTuningConfig(num_virtual_tokens=1, **_CAUSAL),
    "prompt-9": lambda: PromptTuningConfig(num_virtual_tokens=9, **_CAUSAL),
    "ptuning-5": lambda: PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=24, **_CAUSAL),
    "ptuning-20": lambda: PromptEncoderConfig(num_virtual_tokens=20, encoder_hidden_size=24, **_CAUSAL),
    "prefix-3": lambda: PrefixTuningConfig(num_virtual_tokens=3, **_CAUSAL),
    "prefix-17": lambda: PrefixTuningConfig(num_virtual_tokens=17, **_CAUSAL),
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
            logits = self.oracles[adapter_id](torch.tensor([[*prompt, *known]]))
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
    loaded = hf_peft(base, folder)

    @torch.inference_mode()
    def logits(tokens: torch.Tensor) -> torch.Tensor:
        # With a cache, as a prefix lives in one; without the rows of virtual tokens.
        return loaded(input_ids=tokens).logits[:, -tokens.shape[1] :]

    return logits


def make_our_adapter(base: Path, folder: Path, configs: Sequence[Any], seed: int) -> Logits:
    """Write one with our library, every trained number random; its oracle is the trainable form, read again."""
    model = GPT.from_pretrained(base)
    model.add_adapter(configs)
    assert model.adapter is not None
    _randomise(model.adapter, seed)
    model.save_adapter(folder)
    loaded = GPT.from_pretrained(base)
    loaded.load_adapters(folder)
    loaded.freeze()
    return torch.inference_mode()(loaded.forward)


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Trained numbers move by 0.2 around where they start: gates and scales stay near 1, the rest near 0."""
    generator = torch.Generator().manual_seed(seed + 500)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2


@contextmanager
def running(folder: Path, base: Path, *options: str) -> Generator[MethodBench]:
    """All of the adapters above on `base`, and a server that must drain and exit with 0 at the end."""
    adapters = folder / "adapters"
    adapters.mkdir(parents=True)
    plain = hf_model(base)
    oracles: dict[str, Logits] = {"": lambda tokens: hf_logits(plain, tokens)}
    for seed, (adapter_id, make) in enumerate(HF_ADAPTERS.items()):
        oracles[adapter_id] = make_hf_adapter(base, adapters / adapter_id, make(), seed)
    for seed, (adapter_id, configs) in enumerate(OUR_ADAPTERS.items()):
        oracles[adapter_id] = make_our_adapter(base, adapters / adapter_id.replace("+", "-"), configs, 100 + seed)
    server = LiveServer(base, adapters, folder / "server.log", *options)
    try:
        yield MethodBench(base, adapters, server, {key.replace("+", "-"): value for key, value in oracles.items()})
    finally:
        assert server.stop() == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()
