"""Compiles every launch of the kernels for GPUs that need not be here; prints a line for each: name and shared memory.

A program of its own: it puts a compiler where Triton launches, and needs Triton as it is imported without interpreter.
"""

import argparse
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages")


class Compiler:
    """Stands where kernels are run: `kernel[grid](...)` compiles what it would launch, once."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        self._seen: set[tuple[Any, ...]] = set()

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        """In the place of `JITFunction.run`. As Triton does, ones are compiled in."""
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        values = dict(zip(kernel.arg_names, args, strict=False)) | named
        constants: dict[tuple[int, ...], Any] = {}
        signature: dict[str, str] = {}
        for index, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[index,] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = _TYPES[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        key = (kernel.__name__, *signature.values(), *map(str, constants.values()), *options.items())
        if key in self._seen:
            return
        self._seen.add(key)
        made: Any = triton.compile(ASTSource(kernel, signature, constants), target=self._target, options=options)
        print(kernel.__name__, made.metadata.shared, flush=True)


def launch_all(dtype: torch.dtype) -> None:
    """Every kernel in the regimes and with the choices that change its code."""
    from quiver_peft.kernels.paged_layout import PagedLayout
    from quiver_peft.kernels.triton.bottleneck import add_grouped_bottleneck_triton_
    from quiver_peft.kernels.triton.lora import add_grouped_lora_triton_
    from quiver_peft.kernels.triton.paged_attention import paged_attention_triton
    from quiver_peft.kernels.triton.scale import scale_inputs_triton, scale_outputs_triton_
    from quiver_peft.kernels.triton.tiles import tiles_on

    cpu = torch.device("cpu")
    tiles = tiles_on(cpu, [(1, 0, 2), (2, 2, 22)], 22)
    x, memory = torch.zeros(22, 4096, dtype=dtype), torch.zeros(16, dtype=dtype)
    table = torch.zeros(3, 40, dtype=torch.int64)
    add_grouped_lora_triton_(x.clone(), x, memory, table, tiles, 64)
    scale_inputs_triton(x, memory, table, tiles)
    scale_outputs_triton_(x, memory, table, tiles)
    add_grouped_bottleneck_triton_(x, x, memory, table, tiles, 64, has_post_norm=True)
    layout = PagedLayout([1, 40], [600, 40], [range(38), range(38, 41)], 16, cpu)
    for head_dim, biased in ((64, True), (80, False), (128, False)):
        heads = (8, 8) if biased else (32, 8)
        q, kv = (torch.zeros(n, h, head_dim, dtype=dtype) for n, h in zip((41, 656), heads, strict=True))
        bias = torch.zeros(heads[0], 257) if biased else None
        paged_attention_triton(q, kv, kv, layout, 1.0, True, None, bias)


def main() -> None:
    """Compile for one target."""
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int, help="90 for compute capability 9.0")
    parser.add_argument("dtype", help="bfloat16, float16 or float32")
    arguments = parser.parse_args()
    compiler = Compiler(GPUTarget("cuda", arguments.capability, 32))

    def run(kernel: Any, *args: Any, **named: Any) -> None:
        compiler.run(kernel, *args, **named)

    setattr(triton.JITFunction, "run", run)  # noqa: B010 - it is not meant to be replaced
    launch_all(getattr(torch, arguments.dtype))


if __name__ == "__main__":
    main()
