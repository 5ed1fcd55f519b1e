"""What kernels on a device know of the adapters in memory: a row of records for each, written when it is loaded."""

import importlib.util
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quiver_peft.adapters.serving.placement import ResidentWeights
from quiver_peft.base.base import Base
from quiver_peft.kernels.triton.records import (
    BOTTLENECK_FIELDS,
    LORA_FIELDS,
    SCALE_FIELDS,
    bottleneck_record,
    lora_record,
    record_table,
    scale_record,
)


class TableRow(NamedTuple):
    """One adapter's row in the tables, and at which sites it acts: bit i of a number is site i.

    max_rank: of its LoRA and its bottlenecks, summed over the targets of a site.
    """

    number: int
    lora: int
    in_scales: int
    out_scales: int
    bottlenecks: int
    post_norms: int
    max_rank: int


class SlotTables:
    """Row 0 is the base's and stays zero. The tensors never move, so that graphs may keep their addresses.

    linears, sublayers: the number of each site. lora, scales: [linears, rows, fields] int64; bottlenecks: [sublayers,
    rows, fields] int64.
    """

    def __init__(self, linears: Sequence[str], sublayers: Sequence[str], num_rows: int, device: torch.device) -> None:
        self.linears = {site: index for index, site in enumerate(linears)}
        self.sublayers = {site: index for index, site in enumerate(sublayers)}

        def empty(num_sites: int, num_fields: int) -> Tensor:
            return torch.zeros(num_sites, num_rows, num_fields, dtype=torch.int64, device=device)

        self.lora = empty(len(linears), LORA_FIELDS)
        self.scales = empty(len(linears), SCALE_FIELDS)
        self.bottlenecks = empty(len(sublayers), BOTTLENECK_FIELDS)
        self._free = list(range(num_rows - 1, 0, -1))
        self._lock = threading.Lock()

    @classmethod
    def of(cls, base: Base, num_rows: int) -> "SlotTables":
        """For the sites of a base, beside its weights."""
        linears = [linear.site.name for linear in base.linears()]
        return cls(linears, [site.name for site in base.sublayers], num_rows, base.embedding.weight.device)

    @classmethod
    def for_triton(cls, base: Base, num_rows: int) -> "SlotTables | None":
        """On a GPU whose Triton kernels do what their torch forms do: that is tried here; None elsewhere."""
        device = base.embedding.weight.device
        if device.type != "cuda" or importlib.util.find_spec("triton") is None:
            return None
        from quiver_peft.kernels.triton.self_check import check_adapter_kernels

        shapes = [(linear.in_features, linear.out_features) for linear in base.linears()]
        agree = check_adapter_kernels(shapes, base.config.hidden_size, base.compute_dtype, device)
        return cls.of(base, num_rows) if agree else None

    def insert(self, placed: ResidentWeights) -> TableRow | None:
        """Write an adapter's records; None when every row is taken. Raises AdapterError for what no record can hold."""
        lora = {self.linears[site]: lora_record(at_site) for site, at_site in placed.lora.items()}
        scales = {self.linears[site]: scale_record(at_site) for site, at_site in placed.scales.items()}
        bottlenecks = {self.sublayers[site]: bottleneck_record(b) for site, b in placed.bottlenecks.items()}
        with self._lock:
            if not self._free:
                return None
            number = self._free.pop()
        for table, records in ((self.lora, lora), (self.scales, scales), (self.bottlenecks, bottlenecks)):
            rows = record_table([records.get(site, []) for site in range(len(table))], table.shape[2])
            table[:, number].copy_(rows)
        ranks = [record[0] for record in (*lora.values(), *bottlenecks.values())]
        return TableRow(
            number,
            _bits(lora),
            _bits(site for site, record in scales.items() if record[0]),
            _bits(site for site, record in scales.items() if record[2]),
            _bits(bottlenecks),
            _bits(self.sublayers[site] for site, b in placed.bottlenecks.items() if b.norm_position == "post"),
            max(ranks, default=0),
        )

    def remove(self, row: TableRow) -> None:
        """The row may be given to another adapter."""
        with self._lock:
            self._free.append(row.number)


def _bits(sites: Iterable[int]) -> int:
    return sum(1 << site for site in sites)
