"""The seam of one mixed batch on a device with Triton: a launch or two at a site, however many adapters act there."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from quiver_peft.adapters.serving.slot_tables import SlotTables, TableRow
from quiver_peft.adapters.serving.torch_seam import TorchSeam
from quiver_peft.base.sites import Linear, Site
from quiver_peft.kernels.triton.bottleneck import add_grouped_bottleneck_triton_
from quiver_peft.kernels.triton.lora import add_grouped_lora_triton_
from quiver_peft.kernels.triton.scale import scale_inputs_triton, scale_outputs_triton_
from quiver_peft.kernels.triton.tiles import tiles_on
from quiver_peft.rounding import round_up

# Ranks are rounded up to it where they size what lies between two kernels: fewer sizes to compile for.
_RANK_STEP = 16


class TableRowRange(NamedTuple):
    """Rows [start, end) of the batch use the records in `row`."""

    row: TableRow
    start: int
    end: int


class TritonSeam:
    """As `TorchSeam`, of which it keeps the virtual tokens; everything else it finds in the tables on the device.

    A step copies which rows belong to which adapter, once for all sites; it never waits for the device.
    """

    def __init__(
        self, memory: Tensor, tables: SlotTables, used: Sequence[TableRowRange], num_rows: int, virtual: TorchSeam
    ) -> None:
        """memory: the adapter memory, which the tables' records point into. num_rows: of the batch, T."""
        self._memory = memory
        self._tables = tables
        self._virtual = virtual
        self._tiles = tiles_on(memory.device, [(rows.row.number, rows.start, rows.end) for rows in used], num_rows)
        self._lora = self._in_scales = self._out_scales = self._bottlenecks = self._post_norms = 0
        largest = 1
        for row, _, _ in used:
            self._lora |= row.lora
            self._in_scales |= row.in_scales
            self._out_scales |= row.out_scales
            self._bottlenecks |= row.bottlenecks
            self._post_norms |= row.post_norms
            largest = max(largest, row.max_rank)
        self._max_rank = round_up(largest, _RANK_STEP)

    def embed(self, site: Site, tokens: Tensor, embedding: nn.Embedding) -> Tensor:
        """tokens: [T] -> [T, D], the rows of virtual tokens replaced."""
        return self._virtual.embed(site, tokens, embedding)

    def key_values(self, site: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: [T, G, E], the rows of prefixes replaced."""
        return self._virtual.key_values(site, k, v)

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        """x: [T, K] -> [T, N]."""
        site = self._tables.linears[linear.site.name]
        scales = self._tables.scales[site]
        if self._in_scales >> site & 1:
            x = scale_inputs_triton(x, self._memory, scales, self._tiles)
        y = linear(x)
        if self._lora >> site & 1:
            add_grouped_lora_triton_(y, x, self._memory, self._tables.lora[site], self._tiles, self._max_rank)
        if self._out_scales >> site & 1:
            scale_outputs_triton_(y, self._memory, scales, self._tiles)
        return y

    def sublayer(self, site: Site, out: Tensor, residual: Tensor) -> Tensor:
        """out, residual: [T, D] -> [T, D]."""
        number = self._tables.sublayers[site.name]
        if self._bottlenecks >> number & 1:
            add_grouped_bottleneck_triton_(
                out,
                residual,
                self._memory,
                self._tables.bottlenecks[number],
                self._tiles,
                self._max_rank,
                has_post_norm=bool(self._post_norms >> number & 1),
            )
        return out
