"""A tiny base with adapters made by Hugging Face PEFT, a server on them, and what transformers answers itself."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from support.live_server import SERVE, LiveServer, answer_tokens
from support.tiny import (
    hf_greedy,
    hf_lora,
    hf_model,
    tiny_flan,
    tiny_gpt2,
    tiny_llama,
    tiny_mistral,
    tiny_t5,
    tiny_tokenizer,
)
from transformers.modeling_utils import PreTrainedModel

from quiver import Client
from quiver.request_messages import GenerateOptions

LLAMA_ADAPTERS: dict[str, dict[str, Any]] = {
    "attention-r4": {"rank": 4, "targets": ["q_proj", "v_proj"]},
    "all-r2": {"rank": 2, "targets": "all-linear"},
    "mlp-r8": {"rank": 8, "alpha": 4, "targets": ["gate_proj", "up_proj", "down_proj"]},
    "keys-r16": {"rank": 16, "targets": ["k_proj", "o_proj"], "use_rslora": True},
    "one-r1": {"rank": 1, "alpha": 3, "targets": ["q_proj"], "layers_to_transform": [1]},
    "pattern-r3": {"rank": 3, "targets": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 7}},
}
GPT2_ADAPTERS: dict[str, dict[str, Any]] = {
    "fused-r4": {"rank": 4, "targets": ["c_attn"]},
    "mlp-r6": {"rank": 6, "targets": ["c_fc", "mlp.c_proj"]},
}

# What runs on `enduring_base` until it is closed, on any machine.
ENDURING: GenerateOptions = {"max_new_tokens": 8000, "ignore_eos": True}


@dataclass
class ServerFixture:
    """What a test needs: folders, a running server, and the oracles by adapter id ("": the base)."""

    base: Path
    adapters: Path
    server: LiveServer
    oracles: dict[str, PreTrainedModel | PeftModel] = field(default_factory=dict[str, PreTrainedModel | PeftModel])

    def add(self, adapter_id: str, **settings: Any) -> None:
        """Make one more adapter and its oracle."""
        self.oracles[adapter_id] = hf_lora(self.base, self.adapters / adapter_id, **settings)

    def expected(self, adapter_id: str, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """What Hugging Face answers to one request alone."""
        return hf_greedy(self.oracles[adapter_id], prompt, num_tokens)

    def check(self, client: Client, adapter_id: str = "", seed: int = 0, num_tokens: int = 8) -> None:
        """The server answers one request exactly as Hugging Face does."""
        prompt = [5 + (seed * 31 + i * 17) % 300 for i in range(9)]
        answer = client.generate(prompt, adapter=adapter_id, max_new_tokens=num_tokens)
        assert answer_tokens(answer) == self.expected(adapter_id, prompt, num_tokens)


def make_base(folder: Path, family: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """A tiny base with its tokenizer. overrides: of the family's configuration."""
    makers: dict[str, Callable[..., Any]] = {
        "llama": tiny_llama,
        "gpt2": tiny_gpt2,
        "mistral": tiny_mistral,
        "t5": tiny_t5,
        "flan": tiny_flan,
    }
    makers[family](folder, seed=seed, **overrides)
    tiny_tokenizer(folder)
    return folder


@contextmanager
def running_server(
    folder: Path,
    base: Path,
    settings: Mapping[str, Mapping[str, Any]],
    *options: str,
    launcher: Sequence[str] = SERVE,
    faults: int = 0,
) -> Generator[ServerFixture]:
    """Adapters and a server on them, under `folder`; the server must drain and exit with 0 at the end.

    launcher: as of `spawn`. faults: tracebacks that its log may hold, because they were provoked.
    """
    adapters = folder / "adapters"
    adapters.mkdir(parents=True)
    oracles: dict[str, PreTrainedModel | PeftModel] = {"": hf_model(base)}
    for seed, (adapter_id, adapter) in enumerate(settings.items()):
        oracles[adapter_id] = hf_lora(base, adapters / adapter_id, seed=seed, **adapter)
    server = LiveServer(base, adapters, folder / "server.log", *options, launcher=launcher)
    try:
        yield ServerFixture(base, adapters, server, oracles)
    finally:
        if server.process.poll() is None:
            assert server.stop() == 0, server.log.read_text()
    assert server.log.read_text().count("Traceback") <= faults
