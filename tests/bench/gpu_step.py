"""One decode step of the engine on a device: a base with random weights, a full cache, adapters in the banks."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from quiver_peft import GPT, LoraPEFTConfig
from quiver_peft.adapters.serving.banks import BASE_SLOT, AdapterBanks
from quiver_peft.adapters.serving.slot_tables import SlotTables
from quiver_peft.adapters.serving.torch_seam import RowGroup
from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.base.config import GPTConfig, RopeConfig
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.paged import PagedAttention, PagedKV, PagedLayout
from quiver_peft.rounding import ceil_div

BLOCK_TOKENS = 16

_LLAMA_1B = GPTConfig(
    family="llama",
    vocab_size=128_256,
    hidden_size=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    ffn_size=8192,
    max_positions=8192,
    norm="rms",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    tied_embeddings=True,
    rope=RopeConfig(theta=500_000.0, dim=64),
)
SHAPES = {
    "llama-1b": _LLAMA_1B,
    "tiny": replace(_LLAMA_1B, vocab_size=256, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=128),
}


@dataclass(frozen=True)
class Load:
    """Who decodes: `batch` rows after `context` tokens each; adapters of these ranks in turn, none: the base alone."""

    batch: int
    context: int
    ranks: tuple[int, ...]

    @property
    def name(self) -> str:
        """For the table."""
        kinds = "/".join(str(rank) for rank in sorted(set(self.ranks)))
        return f"B={self.batch} context={self.context} K={len(self.ranks)}" + (f" r={kinds}" if self.ranks else "")


class StepBench:
    """The base, its cache and the banks, for all loads of one run."""

    def __init__(self, config: GPTConfig, dtype: torch.dtype, device: torch.device, bank_bytes: int) -> None:
        torch.manual_seed(0)
        self.device, self.dtype, self.config = device, dtype, config
        with device:
            self.base = GPTBase(config).to(dtype).eval()
        tables = SlotTables.for_triton(self.base, num_rows=256)
        self.uses_triton = tables is not None
        self.banks = AdapterBanks(bank_bytes, dtype, device, tables)
        self._weights: dict[int, AdapterWeights] = {}
        self._slots: dict[int, list[int]] = {}

    @property
    def base_bytes(self) -> int:
        """Of the weights that a step reads: all but the embedding, which only a tied head reads."""
        return sum(parameter.nbytes for parameter in self.base.parameters())

    def adapter_bytes(self, ranks: Sequence[int]) -> int:
        """Of adapters of these ranks."""
        return sum(self.banks.num_bytes(self._adapter(rank)) for rank in ranks)

    def load_seconds(self, rank: int) -> float:
        """How long an adapter takes from the host's memory into the banks, ready to be used."""
        weights = self._adapter(rank)
        started = time.perf_counter()
        slot = self.banks.insert(weights)
        wait_for(self.device)
        seconds = time.perf_counter() - started
        assert slot is not None
        self.banks.remove(slot)
        return seconds

    def forward(self, load: Load) -> Callable[[], torch.Tensor]:
        """A step's work on the device: all but the copies to it and the wait for the tokens, which come back [B]."""
        groups = self._groups(load)
        widths = ceil_div(load.context, BLOCK_TOKENS)
        blocks = list(range(load.batch * widths))
        random.Random(0).shuffle(blocks)
        kv = PagedKV(self.config, len(blocks), BLOCK_TOKENS, self.dtype, self.device)
        kv.keys.normal_()
        kv.values.normal_()
        block_tables = [blocks[i * widths : (i + 1) * widths] for i in range(load.batch)]
        lengths = [load.context] * load.batch
        layout = PagedLayout([1] * load.batch, lengths, block_tables, BLOCK_TOKENS, self.device)
        tokens = torch.arange(load.batch, device=self.device)
        positions = torch.full_like(tokens, load.context - 1)
        seam = self.banks.seam(groups)

        def run() -> torch.Tensor:
            hidden = self.base(tokens, positions, PagedAttention(kv, layout), seam)
            return self.base.logits(hidden).argmax(-1)

        return run

    def kv_bytes(self, load: Load) -> int:
        """Of the cache that a step reads."""
        return load.batch * load.context * PagedKV.bytes_per_token(self.config, self.dtype)

    def _groups(self, load: Load) -> list[RowGroup]:
        """Rows in as equal parts as can be, each of one adapter."""
        if not load.ranks:
            return [RowGroup(BASE_SLOT, 0, load.batch)]
        slots = self._slots_of(load.ranks)
        edges = [round(i * load.batch / len(slots)) for i in range(len(slots) + 1)]
        return [RowGroup(slot, edges[i], edges[i + 1]) for i, slot in enumerate(slots)]

    def _slots_of(self, ranks: Sequence[int]) -> list[int]:
        """One adapter for each, loaded when there are not enough of its rank yet."""
        used: dict[int, int] = {}
        slots: list[int] = []
        for rank in ranks:
            have, used[rank] = self._slots.setdefault(rank, []), used.get(rank, 0) + 1
            while len(have) < used[rank]:
                slot = self.banks.insert(self._adapter(rank))
                assert slot is not None, "the banks are full"
                have.append(slot)
            slots.append(have[used[rank] - 1])
        return slots

    def _adapter(self, rank: int) -> AdapterWeights:
        """LoRA on all linears, each part with an A of its own; the same numbers for all of one rank."""
        if rank not in self._weights:
            # A base of its own on the host, without memory: only its shapes are wanted.
            with torch.device("meta"):
                model = GPT(GPTBase(self.config))
            model.base.to_empty(device="cpu")
            model.add_adapter([LoraPEFTConfig(adapter_dim=rank, target_modules=["all"], variant="canonical")])
            assert model.adapter is not None
            for parameter in model.trainable_parameters():
                parameter.data.normal_(std=0.01)
            self._weights[rank] = model.adapter.weights(model.base)
        return self._weights[rank]


def wait_for(device: torch.device) -> None:
    """Until all that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
