"""What each process of `gpu_train.py` does: some steps of a LoRA on a random base, timed after the first ones."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench.gpu_train import SIZES, UNTIMED_STEPS

from quiver_peft.adapters.methods.lora import LoraPEFTConfig
from quiver_peft.base.gpt import GPTBase
from quiver_peft.model import GPT
from quiver_peft.parallel.adapters import split_adapter
from quiver_peft.parallel.bases import load_split_base
from quiver_peft.parallel.mesh import Mesh, start_mesh
from quiver_trainer.data.jsonl import Sample
from quiver_trainer.loop.optimizer import make_optimizer, set_learning_rate
from quiver_trainer.loop.run import trainable
from quiver_trainer.parallel.gradients import Gradients
from quiver_trainer.recipe.config import OptimizerSection


def train(settings: dict[str, Any], folder: Path, mesh: Mesh) -> dict[str, Any]:
    """Losses of all steps; tokens per second of all processes and the first one's peak memory, in MiB."""
    size = SIZES[settings["size"]]
    base = load_split_base(folder, mesh, dtype=getattr(torch, settings["dtype"]))
    assert isinstance(base, GPTBase)
    base.recomputes = True
    model = GPT(base).train()
    torch.manual_seed(1)
    model.add_adapter(LoraPEFTConfig(adapter_dim=16, target_modules=("all",)))
    assert model.adapter is not None
    model.adapter = split_adapter(model.adapter, base, mesh)
    parameters = trainable(model)
    optimizer = make_optimizer(parameters, OptimizerSection(), dict.fromkeys(parameters, 1e-3))
    gradients = Gradients(model, mesh, parameters, seed=0, overlap=settings["overlap"])
    generator = torch.Generator().manual_seed(2)
    shape = (settings["steps"], size["rows"], size["tokens"])
    batches = torch.randint(3, size["vocab"], shape, generator=generator).tolist()
    losses: list[float] = []
    started = time.perf_counter()
    for step, batch in enumerate(batches):
        if step == UNTIMED_STEPS:
            dist.barrier()
            started = time.perf_counter()
        losses.append(gradients.compute([[Sample(row, 1) for row in batch]], step, 1.0))
        gradients.clip(1.0)
        set_learning_rate(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    seconds = time.perf_counter() - started
    num_tokens = (settings["steps"] - UNTIMED_STEPS) * size["rows"] * size["tokens"]
    return {"losses": losses, "tokens_per_second": num_tokens / seconds, "peak_mib": _peak_bytes(mesh) / 2**20}


def _peak_bytes(mesh: Mesh) -> int:
    """Of this process: of its GPU's memory, or where there is none of the machine's."""
    if mesh.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Words: settings as JSON, the base's folder, the file for what the first process found."""
    settings, folder, out = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    with start_mesh(tensor=settings["tensor"], sequence=settings["sequence"], device=settings["device"]) as mesh:
        found = train(settings, folder, mesh)
        if mesh.is_first:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
