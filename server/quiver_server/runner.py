"""The model, the adapter banks and the cache together: one batch in, the wanted logits out."""

import torch
from torch import Tensor

from quiver_peft.adapters.banks import AdapterBanks
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.paged import PagedAttention, PagedKV
from quiver_server.batch import StepBatch


class Runner:
    """Owns the device side of the engine. Used by the engine's thread only."""

    def __init__(self, base: GPTBase, banks: AdapterBanks, kv: PagedKV) -> None:
        self._base = base
        self._banks = banks
        self._kv = kv

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> Tensor:
        """Logits of the wanted rows, [R, V]; keys and values of all rows are in the cache afterwards."""
        attend = PagedAttention(self._kv, batch.layout)
        seam = self._banks.seam(batch.groups, batch.virtual)
        hidden = self._base(batch.tokens, batch.positions, attend, seam)
        return self._base.logits(hidden[batch.logit_rows])
