"""NeMo 1.x's `.nemo` archive of an adapter: a tar of its model's configuration and of each rank's tensors.

    model_config.yaml                                  the whole model's settings; those of the adapter under `peft`
    model_weights.ckpt                                 its tensors, or, of a training run on several devices,
    mp_rank_01/model_weights.ckpt                      those of a tensor-parallel rank, or
    tp_rank_01_pp_rank_002/model_weights.ckpt          those of a tensor-parallel rank of a pipeline stage

Format: NeMo 1.23 and 2.0, `nlp_overrides.NLPSaveRestoreConnector`. Nothing is unpacked to disk, nothing run.
"""

import re
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor

from quiver_peft.adapters.formats.tensor_files import require_finite, unpickle_tensors
from quiver_peft.errors import AdapterError

CONFIG_MEMBER = "model_config.yaml"
WEIGHTS_MEMBER = "model_weights.ckpt"
# What P-Tuning's network made when it was last asked: allocated without a value, and never brought up to date.
_STALE = ".inference_table"
_RANK = re.compile(r"(?:mp_rank_(\d+)|tp_rank_(\d+)_pp_rank_(\d+))/" + re.escape(WEIGHTS_MEMBER))


class Archive(NamedTuple):
    """ranks: {(tensor-parallel rank, pipeline stage): its tensors by NeMo's names}; every rank is there."""

    config: dict[str, Any]
    ranks: dict[tuple[int, int], dict[str, Tensor]]

    @property
    def num_shards(self) -> int:
        """Tensor-parallel ranks."""
        return 1 + max(shard for shard, _ in self.ranks)

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return 1 + max(stage for _, stage in self.ranks)


def read_archive(path: Path) -> Archive:
    """Raises AdapterError."""
    config_bytes, weights = _members(path)
    if config_bytes is None:
        raise AdapterError(f"{path}: holds no {CONFIG_MEMBER}; is it a .nemo archive?")
    if not weights:
        raise AdapterError(
            f"{path}: holds no {WEIGHTS_MEMBER}; adapters that NeMo 1.x saved have one (a folder model_weights is the "
            "distributed checkpoint of a whole model)"
        )
    archive = Archive(_parse_config(path, config_bytes), {})
    for rank, data in weights.items():
        member = f"{path}: {WEIGHTS_MEMBER} of rank {rank[0]}, stage {rank[1]}"
        tensors = unpickle_tensors(member, data)
        archive.ranks[rank] = {name: tensor for name, tensor in tensors.items() if not name.endswith(_STALE)}
        require_finite(member, archive.ranks[rank])
    _require_every_rank(path, archive)
    return archive


def _members(path: Path) -> tuple[bytes | None, dict[tuple[int, int], bytes]]:
    config: bytes | None = None
    weights: dict[tuple[int, int], bytes] = {}
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                match = _RANK.fullmatch(name)
                if name not in (CONFIG_MEMBER, WEIGHTS_MEMBER) and match is None:
                    continue  # tokenizers and the like
                file = tar.extractfile(member) if member.isfile() else None
                if file is None:
                    raise AdapterError(f"{path}: {member.name} is no plain file")
                if name == CONFIG_MEMBER:
                    config = file.read()
                else:
                    rank = (0, 0) if match is None else (int(match[1] or match[2]), int(match[3] or 0))
                    weights[rank] = file.read()
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        raise AdapterError(f"{path}: not a whole tar archive: {error}") from None
    return config, weights


def _parse_config(path: Path, data: bytes) -> dict[str, Any]:
    try:
        config: object = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: {CONFIG_MEMBER} is not valid YAML: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: {CONFIG_MEMBER} must hold settings by name, not {type(config).__name__}")
    return config  # pyright: ignore[reportUnknownVariableType]


def _require_every_rank(path: Path, archive: Archive) -> None:
    sizes = (archive.num_shards, archive.num_stages)
    fields = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    for field, size in zip(fields, sizes, strict=True):
        said = archive.config.get(field) or 1
        if said != size:
            raise AdapterError(f"{path}: {CONFIG_MEMBER}: {field} is {said!r}, but the archive holds {size}")
    for shard in range(sizes[0]):
        for stage in range(sizes[1]):
            if (shard, stage) not in archive.ranks:
                raise AdapterError(f"{path}: the tensors of tensor-parallel rank {shard}, stage {stage} are missing")
