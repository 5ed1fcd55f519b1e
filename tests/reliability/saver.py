"""Kills processes that save an adapter, and looks at what is left: `-m reliability.saver BASE FOLDER MOMENTS SEED`.

Each moment a child is forked that saves two contents in turn over the same folder; it is killed by SIGKILL somewhere in
between. Whatever lies there then must be one of the two, whole. Prints how many of each were found.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from quiver_peft import GPT, LoraPEFTConfig
from quiver_peft.adapters.formats.adapter_folder import read_adapter, save_adapter
from quiver_peft.files.atomic_folder import replace_folder

torch.set_num_threads(1)  # a forked child has no other threads


def adapters_of(base: Path) -> list[GPT]:
    """Two contents, of different sizes."""
    models: list[GPT] = []
    for rank in (4, 64):
        model = GPT.from_pretrained(base)
        model.add_adapter(LoraPEFTConfig(adapter_dim=rank))
        models.append(model)
    return models


def save_for_ever(models: list[GPT], folder: Path) -> None:
    while True:
        for model in models:
            assert model.adapter is not None
            save_adapter(folder, model.base, model.adapter)


def kill_one(models: list[GPT], folder: Path, seconds: float) -> None:
    """A child that saves, and its end after so long."""
    pid = os.fork()
    if not pid:
        try:
            save_for_ever(models, folder)
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "the child failed by itself"


def main(base: Path, folder: Path, num_moments: int, seed: int) -> None:
    draw = random.Random(seed)
    models = adapters_of(base)
    whole: set[str] = set()
    for model in models:
        assert model.adapter is not None
        whole.add(save_adapter(folder, model.base, model.adapter))
    found: Counter[str] = Counter()
    num_left_over = 0
    for _ in range(num_moments):
        kill_one(models, folder, draw.uniform(0.0, 0.05))
        revision = read_adapter(folder, models[0].base).revision  # raises for anything half-written
        assert revision in whole, revision
        found[revision[:6]] += 1
        left_over = [path for path in folder.parent.iterdir() if path != folder]
        num_left_over += len(left_over)
        assert all(path.name.startswith(".") for path in left_over), "no name that a server would serve"
        for path in left_over:
            shutil.rmtree(path)
    replace_folder(folder, {path.name: path.read_bytes() for path in folder.iterdir()})
    print(f"{num_moments} killed while saving: {sorted(found.values())} of each content, {num_left_over} left over")
    assert num_left_over, "no child was killed in the middle"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
