"""Writes `.nemo` adapters as NeMo 1.x does: its names, its layouts, its shards. Written from NeMo's own modules.

Knows nothing of the reader under test. A full tensor here is what one tensor-parallel rank alone would hold.
"""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

Place = tuple[str, int, str]  # stack, layer over all stages, "module." or ""; P-Tuning: ("", -1, "")
Full = dict[tuple[Place, str], Tensor]  # and "adapter.parameter"
RANK = 4  # of every LoRA and bottleneck; a multiple of the tensor-parallel size
VIRTUAL, INPUTS, INNER = 5, 12, 16

LORA = {"adapter_dim": RANK, "adapter_dropout": 0.0, "column_init_method": "xavier", "weight_tying": False}
BOTTLENECK = {"adapter_dim": RANK, "adapter_dropout": 0.1, "norm_type": "mixedfusedlayernorm", "weight_tying": False}
PTUNING = {"virtual_tokens": VIRTUAL, "bottleneck_dim": INNER, "embedding_dim": INPUTS, "init_std": 0.023}


class Shape(NamedTuple):
    """Of a model. depths: layers of each stack. is_gated: gate and other half are one projection, `mlp_fc1`."""

    hidden: int
    heads: int
    groups: int
    head: int
    ffn: int
    is_gated: bool
    depths: dict[str, int]
    is_mcore: bool

    @property
    def is_t5(self) -> bool:
        return "encoder" in self.depths


def shape_of(config: Any, *, is_mcore: bool) -> Shape:
    """Of transformers' configuration of a Llama, GPT-2 or T5."""
    if config.model_type == "gpt2":
        heads, hidden = config.n_head, config.n_embd
        return Shape(hidden, heads, heads, hidden // heads, 4 * hidden, False, {"": config.n_layer}, is_mcore)
    if config.model_type == "t5":
        depths = {"encoder": config.num_layers, "decoder": config.num_decoder_layers}
        gated = config.is_gated_act
        return Shape(
            config.d_model, config.num_heads, config.num_heads, config.d_kv, config.d_ff, gated, depths, is_mcore
        )
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    head, depths = config.hidden_size // heads, {"": config.num_hidden_layers}
    return Shape(config.hidden_size, heads, groups, head, config.intermediate_size, True, depths, is_mcore)


def make_full(shape: Shape, schemes: Mapping[str, Mapping[str, Any]], seed: int = 0) -> Full:
    """Random tensors for these schemes, scales around one."""
    draw = torch.Generator().manual_seed(seed)
    full: Full = {}

    def put(place: Place, name: str, *size: int, mean: float = 0.0) -> None:
        full[place, name] = mean + 0.25 * torch.randn(size, generator=draw)

    for stack, depth in shape.depths.items():
        for layer in range(depth):
            for scheme, settings in schemes.items():
                chosen = settings.get("layer_selection")
                if chosen and layer + 1 not in chosen and not (shape.is_t5 and not shape.is_mcore):
                    continue
                if scheme == "lora":
                    _put_lora(put, shape, settings, stack, layer)
                elif scheme == "ia3":
                    _put_ia3(put, shape, stack, layer)
                elif scheme == "adapter":
                    for adapter in ("adapter_1", "adapter_2"):
                        put((stack, layer, ""), f"{adapter}.linear_in.weight", RANK, shape.hidden)
                        put((stack, layer, ""), f"{adapter}.linear_out.weight", shape.hidden, RANK)
                        if settings.get("norm_position", "pre"):
                            put((stack, layer, ""), f"{adapter}.layer_norm.weight", shape.hidden, mean=1.0)
                            put((stack, layer, ""), f"{adapter}.layer_norm.bias", shape.hidden)
    if "ptuning" in schemes:
        nowhere = ("", -1, "")
        put(nowhere, "ptuning_adapter.embedding.weight", VIRTUAL, INPUTS, mean=0.5)
        put(nowhere, "ptuning_adapter.first.weight", INNER, INPUTS)
        put(nowhere, "ptuning_adapter.first.bias", INNER)
        put(nowhere, "ptuning_adapter.second.weight", shape.hidden, INNER)
        put(nowhere, "ptuning_adapter.second.bias", shape.hidden)
        # Allocated without a value, saved all the same.
        full[nowhere, "ptuning_adapter.inference_table"] = torch.full((VIRTUAL, shape.hidden), float("nan"))
    return full


def places_of(settings: Mapping[str, Any]) -> list[str]:
    names = settings.get("target_modules", ["attention_qkv"])
    groups = {
        "attention": ["attention_qkv", "attention_dense"],
        "mlp": ["mlp_fc1", "mlp_fc2"],
        "all": ["attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"],
    }
    return [place for name in names for place in groups.get(name, [name])]


def _put_lora(put: Any, shape: Shape, settings: Mapping[str, Any], stack: str, layer: int) -> None:
    hidden, ffn = shape.hidden, shape.ffn
    queries, keys = shape.heads * shape.head, shape.groups * shape.head
    canonical = settings.get("variant") == "canonical"

    def pair(module: str, adapter: str, inputs: int, outputs: int) -> None:
        put((stack, layer, module), f"{adapter}.linear_in.weight", RANK, inputs)
        put((stack, layer, module), f"{adapter}.linear_out.weight", outputs, RANK)

    has_cross = stack == "decoder" and not shape.is_mcore
    for place in places_of(settings):
        if place == "attention_qkv" and canonical:
            for part, size in (("q", queries), ("k", keys), ("v", keys)):
                pair("self_attention.", f"lora_unfused_kqv_adapter.{part}_adapter", hidden, size)
        elif place == "attention_qkv":
            pair("self_attention.", "lora_kqv_adapter", hidden, queries + 2 * keys)
            if has_cross:
                pair("inter_attention.", "lora_kqv_adapter", hidden, queries + 2 * keys)
        elif place == "attention_dense":
            pair("self_attention.", "lora_dense_attention_adapter", queries, hidden)
            if has_cross:
                pair("inter_attention.", "lora_dense_attention_adapter", queries, hidden)
        elif place == "mlp_fc1" and canonical:
            for part in ("gate", "up"):
                pair("mlp.", f"lora_unfused_hto4h_adapter.{part}_adapter", hidden, ffn)
        elif place == "mlp_fc1":
            pair("mlp.", "lora_hto4h_adapter", hidden, 2 * ffn if shape.is_gated else ffn)
        else:
            pair("mlp.", "lora_4htoh_adapter", ffn, hidden)


def _put_ia3(put: Any, shape: Shape, stack: str, layer: int) -> None:
    modules = ["self_attention."]
    if stack == "decoder" and not shape.is_mcore:
        modules.append("inter_attention.")
    for module in modules:
        for adapter in ("key_infused_adapter", "value_infused_adapter"):
            put((stack, layer, module), f"{adapter}.scalers", shape.groups * shape.head, mean=1.0)
    put((stack, layer, "mlp."), "mlp_infused_adapter.scalers", shape.ffn, mean=1.0)


def write_nemo(
    path: Path,
    shape: Shape,
    schemes: Mapping[str, Mapping[str, Any]],
    full: Full,
    *,
    tensor_parallel: int = 1,
    pipeline: int = 1,
    prefix: str = "model.",
    mode: str = "w:",
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """One archive. prefix: of every tensor's name. mode: "w:" or "w:gz". changes: of model_config.yaml."""
    sections = {"adapter": "adapter_tuning", "ia3": "ia3_tuning", "lora": "lora_tuning", "ptuning": "p_tuning"}
    # The sections of schemes that are not in use lie there too.
    peft = {"peft_scheme": ",".join(schemes), "restore_from_path": None, "lora_tuning": LORA, "ia3_tuning": {}}
    peft.update({sections[scheme]: dict(settings) for scheme, settings in schemes.items()})
    sizes = {
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "kv_channels": None if shape.heads * shape.head == shape.hidden else shape.head,
    }
    config: dict[str, Any] = {
        "mcore_gpt": shape.is_mcore,
        "precision": "bf16",
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": pipeline,
        "peft": peft,
    }
    if shape.is_t5:
        config.update({stack: {**sizes, "num_layers": depth} for stack, depth in shape.depths.items()})
        config["pipeline_model_parallel_split_rank"] = pipeline // 2 if pipeline > 1 else None
    else:
        groups = None if shape.groups == shape.heads else shape.groups
        config.update({**sizes, "num_layers": shape.depths[""], "num_query_groups": groups})
    config.update(changes or {})
    with tarfile.open(path, mode) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        add_member(tar, "./model_config.yaml", yaml.safe_dump(config).encode())
        for shard in range(tensor_parallel):
            for stage in range(pipeline):
                tensors = _rank(shape, full, shard, tensor_parallel, stage, pipeline, prefix)
                buffer = io.BytesIO()
                torch.save(tensors, buffer)
                folder = f"tp_rank_{shard:02d}_pp_rank_{stage:03d}/" if pipeline > 1 else f"mp_rank_{shard:02d}/"
                folder = folder if tensor_parallel * pipeline > 1 else ""
                add_member(tar, f"./{folder}model_weights.ckpt", buffer.getvalue())
        add_member(tar, "./tokenizer.model", b"not ours to read")
    return path


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _rank(
    shape: Shape, full: Full, shard: int, tensor_parallel: int, stage: int, pipeline: int, prefix: str
) -> dict[str, Tensor]:
    """What one rank's `state_dict` holds: its shards of its stage's layers, which it counts from 0."""
    found: dict[str, Tensor] = {}
    for ((stack, layer, module), name), tensor in full.items():
        own = stage
        stages = pipeline
        if shape.is_t5 and pipeline > 1:
            stages = pipeline // 2
            own = stage if stack != "decoder" else stage - stages
        if layer < 0:
            if stage > 0:
                continue
            where = {(True, True): "embedding.", (True, False): "embedding.", (False, False): "language_model."}
            key = f"{prefix}{where.get((shape.is_mcore, shape.is_t5), '')}adapter_layer.{name}"
        else:
            per_stage = shape.depths[stack] // stages
            if layer // per_stage != own:
                continue
            key = f"{prefix}{_stack_path(shape, stack)}.layers.{layer % per_stage}.{module}adapter_layer.{name}"
        found[key] = _shard(shape, name, tensor, shard, tensor_parallel).clone()
    return found


def _stack_path(shape: Shape, stack: str) -> str:
    if shape.is_mcore:
        return stack or "decoder"
    return f"enc_dec_model.{stack}.model" if stack else "language_model.encoder"


def _shard(shape: Shape, name: str, tensor: Tensor, shard: int, num_shards: int) -> Tensor:
    """As Megatron's ColumnParallelLinear (rows) and RowParallelLinear (columns) hold it."""
    adapter, _, parameter = name.partition(".")
    is_bottleneck = adapter in ("adapter_1", "adapter_2")
    if "layer_norm" in name or parameter in ("embedding.weight", "second.bias", "inference_table"):
        return tensor
    if adapter == "lora_hto4h_adapter" and parameter == "linear_out.weight" and shape.is_gated:
        gate, other = tensor.chunk(2)  # a rank computes its own part of either and splits what it computed in halves
        return torch.cat([gate.chunk(num_shards)[shard], other.chunk(num_shards)[shard]])
    row_parallel = (
        (adapter in ("lora_dense_attention_adapter", "lora_4htoh_adapter") and parameter == "linear_in.weight")
        or (is_bottleneck and parameter == "linear_out.weight")
        or parameter == "second.weight"
    )
    return tensor.chunk(num_shards, dim=1 if row_parallel else 0)[shard]
