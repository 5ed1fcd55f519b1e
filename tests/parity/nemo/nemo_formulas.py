"""NeMo 1.x's own forward formulas as hooks on transformers' models: the oracle for adapters that were read.

Written from `megatron/adapters/{parallel_adapters,mcore_mixins}.py` and, for older models,
`megatron/{attention,mlp,transformer,token_level_encoder_decoder}.py` of NeMo 1.23 and 2.0, in NeMo's layouts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from parity.nemo.nemo_files import VIRTUAL, Full, Shape
from support.tiny import target_of
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_utils import PreTrainedModel

Hook = Callable[..., Any]


def nemo_logits(
    model: PreTrainedModel, shape: Shape, schemes: Mapping[str, Mapping[str, Any]], full: Full, tokens: Tensor
) -> Tensor:
    """What the model makes of tokens with NeMo's adapters on it. tokens: [B, S] -> [B, S, V]."""
    adapted = _NemoModel(model, shape, schemes, full)
    try:
        return adapted.logits(tokens)
    finally:
        for handle in adapted.handles:
            handle.remove()


class _NemoModel:
    """transformers' model with hooks on it, while these are there."""

    def __init__(
        self, model: PreTrainedModel, shape: Shape, schemes: Mapping[str, Mapping[str, Any]], full: Full
    ) -> None:
        self.model, self.shape, self.schemes, self.full = model, shape, schemes, full
        self.handles: list[RemovableHandle] = []
        lora = schemes.get("lora", {})
        self.scale = lora.get("alpha", lora.get("adapter_dim", 1)) / lora.get("adapter_dim", 1)
        for stack, depth in shape.depths.items():
            for layer in range(depth):
                self._hook_layer(stack, layer)

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """tokens: [B, S] -> [B, S, V], without the rows of virtual tokens."""
        model: Any = self.model
        if "ptuning" not in self.schemes:
            if self.shape.is_t5:
                return model(input_ids=tokens, decoder_input_ids=target_of(tokens)).logits
            return model(input_ids=tokens).logits
        table = self._virtual_tokens().expand(tokens.shape[0], -1, -1)
        if self.shape.is_t5:
            embedded = torch.cat([table, model.shared(tokens)], dim=1)
            return model(inputs_embeds=embedded, decoder_input_ids=target_of(tokens)).logits

        def replace(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
            return torch.cat([table, out[:, VIRTUAL:]], dim=1)

        # After word and position embeddings: NeMo replaces their sum.
        where = model.transformer.drop if model.config.model_type == "gpt2" else model.model.embed_tokens
        self._after(where, replace)
        placeholders = torch.ones(tokens.shape[0], VIRTUAL, dtype=tokens.dtype)
        return model(input_ids=torch.cat([placeholders, tokens], dim=1)).logits[:, VIRTUAL:]

    def _virtual_tokens(self) -> Tensor:
        network = {name.partition(".")[2]: tensor for (_, name), tensor in self.full.items() if "ptuning" in name}
        first = network["embedding.weight"] @ network["first.weight"].T + network["first.bias"]
        gelu = 0.5 * first * (1 + torch.tanh(0.7978845608 * first * (1 + 0.044715 * first * first)))
        return gelu @ network["second.weight"].T + network["second.bias"]

    def _after(self, module: nn.Module, hook: Hook) -> None:
        self.handles.append(module.register_forward_hook(hook))

    def _hook_layer(self, stack: str, layer: int) -> None:
        model: Any = self.model
        place = (stack, layer)
        if self.shape.is_t5:
            block = getattr(model, stack).block[layer]
            attention, mlp = block.layer[0].SelfAttention, block.layer[-1].DenseReluDense
            self._hook_projections(attention, ("q", "k", "v"), (*place, "self_attention."))
            up = ("wi_0", "wi_1") if self.shape.is_gated else ("wi",)
            names = {"out": "o", "down": "wo"}
            if stack == "decoder":
                cross = block.layer[1].EncDecAttention
                self._hook_cross_attention(cross, (*place, "inter_attention."))
        elif model.config.model_type == "gpt2":
            block = model.transformer.h[layer]
            attention, mlp, up, names = block.attn, block.mlp, ("c_fc",), {"out": "c_proj", "down": "c_proj"}
            self._after(attention.c_attn, self._fused_projection((*place, "self_attention.")))
        else:
            block = model.model.layers[layer]
            attention, mlp, up = block.self_attn, block.mlp, ("gate_proj", "up_proj")
            names = {"out": "o_proj", "down": "down_proj"}
            self._hook_projections(attention, ("q_proj", "k_proj", "v_proj"), (*place, "self_attention."))
        out, down = getattr(attention, names["out"]), getattr(mlp, names["down"])
        self._hook_pair(out, (*place, "self_attention."), "lora_dense_attention_adapter")
        for half, name in enumerate(up):
            self._after(getattr(mlp, name), self._up(half, (*place, "mlp.")))
        self.handles.append(down.register_forward_pre_hook(self._scaled_input((*place, "mlp."))))
        self._hook_pair(down, (*place, "mlp."), "lora_4htoh_adapter")
        self._after(attention, self._bottleneck(out, (*place, ""), "adapter_1"))
        self._after(mlp, self._bottleneck(down, (*place, ""), "adapter_2"))

    def _get(self, place: Any, name: str) -> Tensor | None:
        return self.full.get((place, name))

    def _pair(self, place: Any, adapter: str, x: Tensor) -> Tensor | None:
        """ParallelLinearAdapter.forward with the identity for an activation."""
        a, b = self._get(place, f"{adapter}.linear_in.weight"), self._get(place, f"{adapter}.linear_out.weight")
        return None if a is None or b is None else x @ a.T @ b.T * self.scale

    def _hook_pair(self, linear: nn.Module, place: Any, adapter: str) -> None:
        def hook(_module: nn.Module, args: Any, out: Tensor) -> Tensor:
            added = self._pair(place, adapter, args[0])
            return out if added is None else out + added

        self._after(linear, hook)

    def _mixed(self, place: Any, x: Tensor) -> list[Tensor] | None:
        """The fused pair's output [sq, b, ng, (np/ng + 2) * hn], split."""
        mixed = self._pair(place, "lora_kqv_adapter", x)
        if mixed is None:
            return None
        shape = self.shape
        per_group = shape.heads // shape.groups
        mixed = mixed.view(*x.shape[:-1], shape.groups, (per_group + 2) * shape.head)
        return [part.flatten(-2) for part in mixed.split([per_group * shape.head, shape.head, shape.head], dim=-1)]

    def _projected(self, place: Any, part: int, x: Tensor, y: Tensor) -> Tensor:
        """get_query_key_value_tensors of one of the three: the fused pair, IA3, the pair of its own."""
        mixed = self._mixed(place, x)
        if mixed is not None:
            y = y + mixed[part]
        scale = self._get(place, ("", "key_infused_adapter.scalers", "value_infused_adapter.scalers")[part])
        if scale is not None:
            y = y * scale
        own = self._pair(place, f"lora_unfused_kqv_adapter.{'qkv'[part]}_adapter", x)
        return y if own is None else y + own

    def _hook_projections(self, attention: nn.Module, names: tuple[str, str, str], place: Any) -> None:
        for part, name in enumerate(names):

            def hook(_module: nn.Module, args: Any, out: Tensor, part: int = part) -> Tensor:
                return self._projected(place, part, args[0], out)

            self._after(getattr(attention, name), hook)

    def _fused_projection(self, place: Any) -> Hook:
        """Of GPT-2, whose queries, keys and values are the thirds of one output."""

        def hook(_module: nn.Module, args: Any, out: Tensor) -> Tensor:
            parts = out.chunk(3, dim=-1)
            return torch.cat([self._projected(place, part, args[0], y) for part, y in enumerate(parts)], dim=-1)

        return hook

    def _hook_cross_attention(self, attention: Any, place: Any) -> None:
        """IA3 as on any attention, of LoRA only what `ParallelAttention` asks there: the pair on its output."""
        for name, adapter in ((attention.k, "key_infused_adapter"), (attention.v, "value_infused_adapter")):

            def hook(_module: nn.Module, _args: Any, out: Tensor, adapter: str = adapter) -> Tensor:
                scale = self._get(place, f"{adapter}.scalers")
                return out if scale is None else out * scale

            self._after(name, hook)
        self._hook_pair(attention.o, place, "lora_dense_attention_adapter")

    def _up(self, half: int, place: Any) -> Hook:
        """Before the activation; a gated MLP's output is halved into the gate and what it multiplies."""

        def hook(_module: nn.Module, args: Any, out: Tensor) -> Tensor:
            added = self._pair(place, "lora_hto4h_adapter", args[0])
            if added is not None and self.shape.is_gated:
                added = added.chunk(2, dim=-1)[half]
            own = self._pair(place, f"lora_unfused_hto4h_adapter.{('gate', 'up')[half]}_adapter", args[0])
            return out + sum(part for part in (added, own) if part is not None)

        return hook

    def _scaled_input(self, place: Any) -> Hook:
        def hook(_module: nn.Module, args: Any) -> Any:
            scale = self._get(place, "mlp_infused_adapter.scalers")
            return args if scale is None else (args[0] * scale, *args[1:])

        return hook

    def _bottleneck(self, last: Any, place: Any, adapter: str) -> Hook:
        """On what the sub-layer's last linear gives before its bias, which is added later."""
        norm_position = self.schemes.get("adapter", {}).get("norm_position", "pre")

        def hook(_module: nn.Module, _args: Any, result: Any) -> Any:
            down, up = self._get(place, f"{adapter}.linear_in.weight"), self._get(place, f"{adapter}.linear_out.weight")
            if down is None or up is None:
                return result
            out = result[0] if isinstance(result, tuple) else result
            bias = 0.0 if last.bias is None else last.bias
            before = out - bias
            x = self._norm(place, adapter, before) if norm_position == "pre" else before
            x = F.silu(x @ down.T) @ up.T
            x = self._norm(place, adapter, x) if norm_position == "post" else x
            out = before + x + bias
            return (out, *result[1:]) if isinstance(result, tuple) else out

        return hook

    def _norm(self, place: Any, adapter: str, x: Tensor) -> Tensor:
        weight, bias = self.full[place, f"{adapter}.layer_norm.weight"], self.full[place, f"{adapter}.layer_norm.bias"]
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
