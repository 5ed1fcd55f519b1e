"""An adapter over the ranks of its base: every method's rule, none of which communicates at a layer.

    method            beside a linear cut by rows              by columns
    LoRA              A whole*, B by rows as the base's        A by columns, B whole*
    DoRA's lengths    by rows                                  whole (their norms are summed over the ranks)
    IA3               on outputs by rows, on inputs whole      on inputs by columns, on outputs whole
    canonical         whole: after the sum of the ranks
    P-Tuning, prompt  whole: before the first layer
    prefix            by heads; a network that makes it: its last linear by heads, what is before it whole*

Whole* has a share of its gradient on every rank (see shards.py). Sequence parallelism adds a star to what acts between
the linears: canonical adapters, what scales the outputs of a linear cut by columns or the inputs of one cut by rows.
Dropout draws alike on all ranks; where they hold different features, these share one pattern.
"""

import copy
from dataclasses import replace

from torch import nn

from quiver_peft.adapters.methods.bottleneck_module import BottleneckModule
from quiver_peft.adapters.methods.ia3 import IA3Module, IA3Scale
from quiver_peft.adapters.methods.lora import LoraModule, LoraPair
from quiver_peft.adapters.methods.prefix import PrefixEncoder, PrefixModule, PrefixRows
from quiver_peft.adapters.methods.targets import Target
from quiver_peft.adapters.training.trainable_adapter import AnyMethod, TrainableAdapter
from quiver_peft.base.base import Base
from quiver_peft.base.sites import Linear
from quiver_peft.parallel.linears import is_column_parallel
from quiver_peft.parallel.mesh import Mesh
from quiver_peft.parallel.shards import REPLICATED, Shard, evenly, gather, set_shard


def split_adapter(adapter: TrainableAdapter, base: Base, mesh: Mesh) -> TrainableAdapter:
    """This rank's share of a whole adapter; of one rank all of it, with the same marks."""
    linears = {linear.site.name: linear for linear in base.linears()}
    return TrainableAdapter([_split_method(method, base, linears, mesh) for method in _methods(adapter)]).to(
        mesh.device
    )


def gather_adapter(adapter: TrainableAdapter, whole: TrainableAdapter, mesh: Mesh) -> TrainableAdapter:
    """Fill `whole`, an adapter of the same configuration, with what all ranks hold; every rank must ask."""
    for (name, parameter), target in zip(adapter.named_parameters(), whole.parameters(), strict=True):
        found = gather(parameter, mesh)
        assert found.shape == target.shape, name
        target.data.copy_(found)
    return whole


def _methods(adapter: TrainableAdapter) -> list[AnyMethod]:
    return [method for method in adapter.methods if isinstance(method, AnyMethod)]


def _split_method(method: AnyMethod, base: Base, linears: dict[str, Linear], mesh: Mesh) -> AnyMethod:
    if isinstance(method, LoraModule):
        pairs = [
            _split_pair(pair, linears[pair.target.site], mesh) for pair in method.pairs if isinstance(pair, LoraPair)
        ]
        return LoraModule(method.config, pairs)
    if isinstance(method, IA3Module):
        scales = [_split_scale(s, linears[s.target.site], mesh) for s in method.scales if isinstance(s, IA3Scale)]
        return IA3Module(method.config, scales)
    if isinstance(method, PrefixModule):
        return _split_prefix(method, base, mesh)
    if isinstance(method, BottleneckModule) and mesh.sequence:
        for parameter in method.parameters():
            set_shard(parameter, gradient_is_share=True)
    return method


def _local_target(target: Target, linear: Linear) -> Target:
    """The same rows as this rank's linear has them."""
    if is_column_parallel(linear):
        return replace(target, rows=linear.part_rows(target.part))
    return replace(target, in_features=linear.weight.shape[1])


def _rows_shard(target: Target, linear: Linear) -> Shard:
    """How what has a number for each row of a target lies beside a linear cut by rows."""
    if target.part:
        return evenly(target.num_rows)
    return Shard(0, tuple(linear.parts.values()))


def _split_pair(pair: LoraPair, linear: Linear, mesh: Mesh) -> LoraPair:
    by_rows = is_column_parallel(linear)
    rows = _rows_shard(pair.target, linear)
    a_shard, b_shard = (REPLICATED, rows) if by_rows else (Shard(1, ((0, pair.target.in_features),)), REPLICATED)
    lengths = None if pair.magnitude is None else (rows if by_rows else REPLICATED).share(pair.magnitude.data, mesh)
    split = LoraPair(_local_target(pair.target, linear), pair.a.shape[0], pair.alpha, pair.scale, lengths)
    split.a.data.copy_(a_shard.share(pair.a.data, mesh))
    split.b.data.copy_(b_shard.share(pair.b.data, mesh))
    set_shard(split.a, a_shard, gradient_is_share=by_rows)
    set_shard(split.b, b_shard, gradient_is_share=not by_rows)
    if split.magnitude is not None:
        # By columns they act after the sum of the ranks, on the tokens that sequence parallelism left here.
        set_shard(split.magnitude, rows if by_rows else REPLICATED, gradient_is_share=mesh.sequence and not by_rows)
    return split


def _split_scale(scale: IA3Scale, linear: Linear, mesh: Mesh) -> IA3Scale:
    by_rows = is_column_parallel(linear)
    shard = REPLICATED
    if by_rows != scale.on_input:
        shard = evenly(scale.target.in_features) if scale.on_input else _rows_shard(scale.target, linear)
    split = IA3Scale(_local_target(scale.target, linear), scale.on_input)
    split.scale = nn.Parameter(shard.share(scale.scale.data, mesh).clone())
    set_shard(split.scale, shard, gradient_is_share=mesh.sequence and shard == REPLICATED)
    return split


def _split_prefix(method: PrefixModule, base: Base, mesh: Mesh) -> PrefixModule:
    """Of every layer's keys and values this rank's heads."""
    config = base.config
    size = config.num_kv_heads * config.head_dim
    parts = tuple((i * size, (i + 1) * size) for i in range(2 * config.num_layers))
    encoder = copy.deepcopy(method.encoder)
    if isinstance(encoder, PrefixRows):
        shard = Shard(1, parts)
        encoder = PrefixRows(shard.share(encoder.embedding.data, mesh))
        set_shard(encoder.embedding, shard)
    else:
        assert isinstance(encoder, PrefixEncoder)
        for parameter in encoder.parameters():
            set_shard(parameter, gradient_is_share=True)
        last = encoder.transform[-1]
        assert isinstance(last, nn.Linear) and isinstance(last.weight, nn.Parameter)
        last.weight = _share_of(last.weight, Shard(0, parts), mesh)
        assert isinstance(last.bias, nn.Parameter)
        last.bias = _share_of(last.bias, Shard(0, parts), mesh)
    local = replace(
        config, num_heads=config.num_heads // mesh.tensor_size, num_kv_heads=config.num_kv_heads // mesh.tensor_size
    )
    return PrefixModule(method.config, local, encoder)


def _share_of(parameter: nn.Parameter, shard: Shard, mesh: Mesh) -> nn.Parameter:
    return set_shard(nn.Parameter(shard.share(parameter.data, mesh).clone()), shard)
