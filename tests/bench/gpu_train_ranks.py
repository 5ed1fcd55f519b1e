"""What each process of `gpu_train.py` does: some steps of a LoRA on a random base, timed after the first ones."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from quiver_peft.adapters.lora import LoraPEFTConfig
from quiver_peft.base.gpt import GPTBase
from quiver_peft.model import GPT
from quiver_peft.parallel.adapters import split_adapter
from quiver_peft.parallel.bases import load_split_base
from quiver_peft.parallel.mesh import Mesh, start_mesh
from quiver_trainer.config import OptimiserSection
from quiver_trainer.optimiser import make_optimiser, set_learning_rate
from quiver_trainer.parallel.gradients import Gradients
from quiver_trainer.rows import Sample
from quiver_trainer.run import trainable

# Shapes of a Llama. rows and tokens: of a batch, over all processes.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden": 64, "ffn": 96, "layers": 2, "heads": 4, "vocab": 320, "rows": 8, "tokens": 32},
    "1b": {"hidden": 2048, "ffn": 8192, "layers": 16, "heads": 32, "vocab": 128256, "rows": 16, "tokens": 1024},
    "8b": {"hidden": 4096, "ffn": 14336, "layers": 32, "heads": 32, "vocab": 128256, "rows": 16, "tokens": 2048},
}
_UNTIMED_STEPS = 3


def make_base(folder: Path, size: dict[str, int]) -> None:
    """A random Llama of this size on disk, the same everywhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocab"],
        hidden_size=size["hidden"],
        intermediate_size=size["ffn"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=max(4, size["heads"] // 4),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(str(folder))


def train(settings: dict[str, Any], folder: Path, mesh: Mesh) -> dict[str, Any]:
    """Losses of all steps; tokens per second of all processes and the first one's peak memory, in MiB."""
    size = SIZES[settings["size"]]
    base = load_split_base(folder, mesh, dtype=getattr(torch, settings["dtype"]))
    assert isinstance(base, GPTBase)
    model = GPT(base).train()
    torch.manual_seed(1)
    model.add_adapter(LoraPEFTConfig(adapter_dim=16, target_modules=("all",)))
    assert model.adapter is not None
    model.adapter = split_adapter(model.adapter, base, mesh)
    parameters = trainable(model)
    optimiser = make_optimiser(parameters, OptimiserSection(), dict.fromkeys(parameters, 1e-3))
    gradients = Gradients(model, mesh, parameters, seed=0, overlap=settings["overlap"])
    generator = torch.Generator().manual_seed(2)
    shape = (settings["steps"], size["rows"], size["tokens"])
    batches = torch.randint(3, size["vocab"], shape, generator=generator).tolist()
    losses: list[float] = []
    started = time.perf_counter()
    for step, batch in enumerate(batches):
        if step == _UNTIMED_STEPS:
            dist.barrier()
            started = time.perf_counter()
        losses.append(gradients.compute([[Sample(row, 1) for row in batch]], step, 1.0))
        gradients.clip(1.0)
        set_learning_rate(optimiser, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    dist.barrier()
    seconds = time.perf_counter() - started
    num_tokens = (settings["steps"] - _UNTIMED_STEPS) * size["rows"] * size["tokens"]
    peak = torch.cuda.max_memory_allocated() if mesh.device.type == "cuda" else 0
    return {"losses": losses, "tokens_per_second": num_tokens / seconds, "peak_mib": peak / 2**20}


def main() -> None:
    """Words: settings as JSON, the base's folder, the file for what the first process found."""
    settings, folder, out = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    with start_mesh(tensor=settings["tensor"], sequence=settings["sequence"], device=settings["device"]) as mesh:
        if mesh.is_first and not folder.exists():
            make_base(folder, SIZES[settings["size"]])
        dist.barrier()
        found = train(settings, folder, mesh)
        if mesh.is_first:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
