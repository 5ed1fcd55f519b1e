"""An adapter's files as bytes, wherever they came from, and the revision that they are."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from quiver_peft.adapters.formats.adapterhub import WEIGHTS_FILE as HUB_WEIGHTS_FILE
from quiver_peft.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
QUIVER_FILE = "quiver.json"
# What reading an adapter looks at; whatever else lies beside them is for people.
READ_FILES = (CONFIG_FILE, WEIGHTS_FILE, HUB_WEIGHTS_FILE, QUIVER_FILE)


@dataclass(frozen=True)
class AdapterFiles:
    """The files of one adapter. folder: what errors call the place; record: quiver.json, None where there is none."""

    folder: str
    config: bytes
    weights_name: str
    weights: bytes
    manifest: bytes | None

    @property
    def by_name(self) -> dict[str, bytes]:
        """As they lie in a folder."""
        files = {CONFIG_FILE: self.config, self.weights_name: self.weights}
        return files if self.manifest is None else {**files, QUIVER_FILE: self.manifest}

    @cached_property
    def revision(self) -> str:
        """SHA-256 of configuration and weights: the same bytes are the same adapter, wherever they lie."""
        return revision_of(self.config, self.weights)

    def path_of(self, name: str) -> str:
        """What errors call a file."""
        return f"{self.folder}/{name}"


def revision_of(config: bytes, weights: bytes) -> str:
    """The revision of these two files, 64 hexadecimal digits."""
    digest = hashlib.sha256(config + b"\0")
    digest.update(weights)
    return digest.hexdigest()


def read_files(path: Path) -> AdapterFiles:
    """The files of a folder, or of the folder of the pickle that is named. Raises AdapterError."""
    folder, weights_name = (path.parent, path.name) if path.is_file() and path.suffix == ".bin" else (path, "")
    if not weights_name:
        present = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        weights_name = weights_file(str(folder), present)
    config, weights = _read(folder / CONFIG_FILE), _read(folder / weights_name)
    record = _read(folder / QUIVER_FILE) if (folder / QUIVER_FILE).exists() else None
    return AdapterFiles(str(folder), config, weights_name, weights, record)


def weights_file(folder: str, present: list[str]) -> str:
    """Which of the files that are present holds the tensors. Raises AdapterError where only a pickle does."""
    for name in (WEIGHTS_FILE, HUB_WEIGHTS_FILE):
        if name in present:
            return name
    if pickles := sorted(name for name in present if name.endswith((".bin", ".nemo"))):
        raise AdapterError(
            f"{folder}: holds its tensors only as the pickle {pickles[0]}, which is not read unless that file "
            "itself is named; better save it again as safetensors"
        )
    return WEIGHTS_FILE


def missing(path: str) -> AdapterError:
    """Of an adapter that lacks a file."""
    return AdapterError(f"{path}: no such file; an adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise missing(str(path)) from None
    except OSError as error:
        raise AdapterError(f"{path}: not readable: {error}") from None
