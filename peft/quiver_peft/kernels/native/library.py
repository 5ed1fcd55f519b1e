"""The compiled kernels as Python sees them, and the one place that says whether they may be used."""

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from quiver_peft.kernels.native.build import BuildError, built_library

log = logging.getLogger(__name__)

SWITCH = "QUIVER_KERNELS"
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


class Library:
    """The functions of `*.cpp`, whose comments say what they take. Pointers are addresses, 0 for none."""

    def __init__(self, path: Path) -> None:
        dll = ctypes.CDLL(str(path))

        def function(name: str, parameters: str) -> Callable[..., None]:
            found = dll[f"quiver_{name}"]
            found.argtypes = [_TYPES[letter] for letter in parameters]
            found.restype = None
            return found

        self.set_num_threads = function("set_num_threads", "i")
        self.keep_freed_memory = function("keep_freed_memory", "")
        self.use_large_pages = function("use_large_pages", "pi")
        self.pack = function("pack", "piiip")
        self.linear = function("linear", "pipppiiii")
        self.add_lora = function("add_lora", "pipiipi")
        self.paged_attention = function("paged_attention", "pippiippippiiiiifiipi")
        self.store_rows = function("store_rows", "ppipipipi")
        self.rms_norm = function("rms_norm", "pipfpii")
        self.activate = function("activate", "pipiiii")
        self.rotate = function("rotate", "piiiippi")
        self.set_num_threads(torch.get_num_threads())


@functools.cache
def library() -> Library | None:
    """The compiled kernels, made at the first call; None, and one line in the log, where there can be none."""
    choice = os.environ.get(SWITCH, "auto")
    if choice == "torch":
        log.info("%s=torch: torch's operators serve", SWITCH)
        return None
    if choice != "auto":
        raise ValueError(f"{SWITCH}={choice}: must be auto or torch")
    try:
        return Library(built_library())
    except (BuildError, OSError, AttributeError) as error:
        log.warning("the compiled CPU kernels are off, torch's operators serve, which is slower: %s", error)
        return None


def library_for(*tensors: Tensor) -> Library | None:
    """The compiled kernels, if they can work on these tensors: fp32 on the CPU, no gradient wanted."""
    if torch.is_grad_enabled():
        return None
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype != torch.float32:
            return None
    return library()


def take_over() -> None:
    """Arrange the process for the compiled kernels: they have torch's threads, and torch works in its caller's alone.

    Torch's idle threads would spin on the cores that the kernels' need. Also, freed memory is kept for the next step.
    """
    native = library()
    if native is not None:
        native.keep_freed_memory()
        native.set_num_threads(torch.get_num_threads())
        torch.set_num_threads(1)
