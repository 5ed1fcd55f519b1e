"""Python binding of the C++ kernels (ctypes), and the one place that decides whether they are used."""

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from quiver_peft.errors import QuiverError
from quiver_peft.kernels.cpp.build import BuildError, built_library

log = logging.getLogger(__name__)

ENV_KERNELS = "QUIVER_KERNELS"
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "n": ctypes.c_int64, "f": ctypes.c_float}


class Kernels:
    """The kernels that a step calls (`kernels.h`; `*.cpp` document them) and the allocator of their outputs.

    function: makes a callable from a kernel's name and its parameters, a letter each: p an address (0: null), i an
        integer, n an integer proportional to the rows of the step, f a float.
    empty: allocates an uninitialized fp32 tensor; the first size of its shape is the number of rows.
    """

    def __init__(self, function: Callable[[str, str], Callable[..., None]], empty: Callable[..., Tensor]) -> None:
        self.empty = empty
        self.linear = function("linear", "pipippinii")
        self.add_lora = function("add_lora", "pipiipi")
        self.paged_attention = function("paged_attention", "pippiiippiiifiipi")
        self.store_rows = function("store_rows", "ppiipipipn")
        self.rms_norm = function("rms_norm", "pipfpnii")
        self.layer_norm = function("layer_norm", "pppffpni")
        self.activate = function("activate", "pipniii")
        self.rotate = function("rotate", "pipniippi")
        self.rotary = function("rotary", "ppfppni")
        self.add = function("add", "pppni")
        self.gather = function("gather", "piiippni")
        self.best = function("best", "ppni")
        self.scale_inputs = function("scale_inputs", "pipnipi")
        self.scale_outputs = function("scale_outputs", "pipi")
        self.add_bottleneck = function("add_bottleneck", "ppipi")


class Library(Kernels):
    """The kernels of a compiled library, and its functions that are called outside of steps."""

    def __init__(self, path: Path) -> None:
        dll = ctypes.CDLL(str(path))

        def function(name: str, parameters: str) -> Callable[..., None]:
            found = dll[f"quiver_{name}"]
            found.argtypes = [_TYPES[letter] for letter in parameters]
            found.restype = None
            return found

        super().__init__(function, torch.empty)
        self.set_num_threads = function("set_num_threads", "i")
        self.keep_freed_memory = function("keep_freed_memory", "")
        self.use_large_pages = function("use_large_pages", "pi")
        self.pack = function("pack", "piiipi")
        self.run = function("run", "piip")
        self.invoker: Callable[[bytes], int | None] = dll.quiver_invoker
        dll.quiver_invoker.argtypes = [ctypes.c_char_p]
        dll.quiver_invoker.restype = ctypes.c_void_p
        self.set_num_threads(torch.get_num_threads())


_override: ContextVar[Kernels | None] = ContextVar("override_kernels", default=None)


def kernel_choice() -> str:
    """Which kernels the environment asks for: auto, avx2 or torch. Raises QuiverError for anything else."""
    choice = os.environ.get(ENV_KERNELS, "auto")
    if choice not in ("auto", "avx2", "torch"):
        raise QuiverError(f"{ENV_KERNELS}={choice}: must be auto, avx2 or torch")
    return choice


@functools.cache
def library() -> Library | None:
    """The compiled kernels, built at the first call. None, with one log line, where they are off or unavailable."""
    choice = kernel_choice()
    if choice == "torch":
        log.info("%s=torch: using PyTorch operators", ENV_KERNELS)
        return None
    try:
        return Library(built_library(avx512=choice == "auto"))
    except (BuildError, OSError, AttributeError) as error:
        log.warning("compiled CPU kernels unavailable, using slower PyTorch operators: %s", error)
        return None


@contextmanager
def override_kernels(kernels: Kernels) -> Generator[None]:
    """Within the context, `library_for` returns these kernels in this thread instead of the library's."""
    token = _override.set(kernels)
    try:
        yield
    finally:
        _override.reset(token)


def library_for(*tensors: Tensor) -> Kernels | None:
    """The compiled kernels if they support these tensors (fp32, on the CPU, gradients off), else None."""
    if torch.is_grad_enabled():
        return None
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype != torch.float32:
            return None
    return _override.get() or library()


def configure_process() -> None:
    """Prepares a serving process: the compiled kernels get torch's threads, and torch is left with one.

    Torch's idle threads would spin on the cores that the kernels need. Also keeps freed memory for the next step.
    """
    cpp = library()
    if cpp is not None:
        cpp.keep_freed_memory()
        cpp.set_num_threads(torch.get_num_threads())
        torch.set_num_threads(1)
