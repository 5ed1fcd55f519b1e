"""Capture and replay of steps on the CPU: what CUDA graphs are on a GPU.

The first step with a key is captured: it runs in Python as usual, while every call of a compiled kernel is recorded
with its arguments. Later steps with the same key are replayed: `quiver_run` in program.cpp makes the recorded calls one
after another, without Python. As with CUDA graphs, a replay reads and writes the same addresses as the capture did.
Unlike there, two things may change from replay to replay: the number of rows, and the addresses of the step's inputs.
So an argument is recorded as one of three kinds:

    a constant     weights, the KV cache, scratch memory, sizes
    per row        a count that is multiplied by the number of rows
    an input       the index of an address that the caller passes to each replay
"""

import bisect
import itertools
import logging
import math
import struct
import weakref
from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quiver_peft.kernels.cpp.library import Kernels, Library, override_kernels

log = logging.getLogger(__name__)

_MAX_WORDS = 21  # MAX_WORDS of program.cpp
_MAX_GRAPHS = 64
_LINE = 16  # floats in a cache line


class _StepGraph(NamedTuple):
    """A captured step.

    calls: `num_calls` of struct Call of program.cpp. result: the scratch block that holds what the step returns
        ([capacity, *]), or None when it returns nothing.
    """

    calls: "array[int]"
    num_calls: int
    result: Tensor | None


class StepGraphs:
    """The captured steps of one model, by key. Not thread-safe.

    A step can be replayed when it calls compiled kernels only and their arguments depend on nothing but the row count
    and the input addresses; tokens, block tables and adapters are reached through the inputs. The capture finds out.
    A step that cannot be replayed runs in Python every time. The oldest graph is dropped when there are too many.
    """

    def __init__(self, library: Library, constants: Iterable[Tensor], capacity: int) -> None:
        """constants: every tensor that steps read or write besides their inputs; they must never move.

        capacity: the most rows of a captured step; larger steps run in Python.
        """
        self._library = library
        self._memory = _ScratchBlocks(capacity)
        self._constants = sorted({_span(tensor) for tensor in constants})
        self._graphs: dict[Hashable, _StepGraph | None] = {}

    def run(
        self, key: Hashable, make: Callable[[], Tensor | None], num_rows: int, inputs: Sequence[int]
    ) -> Tensor | None:
        """Replays the step captured under `key`, or runs `make`, capturing it. Returns what `make` returns.

        key: everything that decides which kernels are called and is not read through the inputs.
        make: runs the step in Python; its input tensors lie at the addresses `inputs`.
        The result, [num_rows, *] or None, may lie in scratch memory: read it before the next call.
        """
        if num_rows > self._memory.capacity:
            return make()
        if key not in self._graphs and num_rows == 1:
            # With one row, sizes that scale with the batch cannot be recognized, and torch reports arbitrary strides.
            return make()
        if key not in self._graphs:
            if len(self._graphs) == _MAX_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            return self._capture(key, make, num_rows, inputs)
        graph = self._graphs[key]
        if graph is None:
            return make()
        addresses = array("Q", inputs)
        calls, count = graph.calls.buffer_info()[0], graph.num_calls
        self._library.run(calls, count, num_rows, addresses.buffer_info()[0])
        return None if graph.result is None else graph.result[:num_rows]

    def _capture(
        self, key: Hashable, make: Callable[[], Tensor | None], num_rows: int, inputs: Sequence[int]
    ) -> Tensor | None:
        recorder = _Recorder(self._library, self._memory, self._constants, num_rows, inputs)
        with override_kernels(Kernels(recorder.function, recorder.empty)), _DispatchGuard(recorder):
            result = make()
        # A replay leaves its result where the capture left it, so that must be scratch memory.
        block = None if result is None else self._memory.block_at(result.data_ptr())
        if result is not None and (block is None or not result.is_contiguous()):
            recorder.refuse("its result is not in scratch memory")
        if recorder.refusal:
            log.debug("step cannot be replayed, it runs in Python: %s", recorder.refusal)
        self._graphs[key] = None if recorder.refusal else _StepGraph(recorder.calls, recorder.num_calls, block)
        return result


def _span(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


class _ScratchBlocks:
    """Scratch memory for kernel outputs: blocks [capacity, width], reused when the last tensor in a block is gone."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free: dict[int, list[np.ndarray]] = {}
        self._blocks: dict[int, np.ndarray] = {}  # by address

    def take(self, num_rows: int, width: int) -> Tensor:
        """A tensor [num_rows, width] at the start of a free block."""
        free = self._free.setdefault(width, [])
        if not free:
            memory = np.empty(self.capacity * width + _LINE, np.float32)
            start = -memory.ctypes.data % (4 * _LINE) // 4
            free.append(memory[start:][: self.capacity * width].reshape(self.capacity, width))
            self._blocks[free[-1].ctypes.data] = free[-1]
        block = free.pop()
        rows = block[:num_rows]
        # The tensor and all its views hold `rows`, and nothing else does.
        weakref.finalize(rows, free.append, block).atexit = False
        return torch.from_numpy(rows)

    def block_at(self, address: int) -> Tensor | None:
        """The whole block [capacity, width] that starts at an address, or None."""
        block = self._blocks.get(address)
        return None if block is None else torch.from_numpy(block)

    def holds(self, address: int) -> bool:
        return any(start <= address < start + block.nbytes for start, block in self._blocks.items())


class _Recorder:
    """Runs the kernels of one step and records their calls. `refusal`: why the step cannot be replayed, or ""."""

    def __init__(
        self,
        library: Library,
        memory: _ScratchBlocks,
        constants: Sequence[tuple[int, int]],
        num_rows: int,
        inputs: Sequence[int],
    ) -> None:
        self._library = library
        self._memory = memory
        self._constants = constants
        self._num_rows = num_rows
        self._inputs = {address: number for number, address in enumerate(inputs)}
        self.calls = array("Q")
        self.num_calls = 0
        self.refusal = ""

    def refuse(self, reason: str) -> None:
        """Marks the step as one that cannot be replayed; the first reason is kept."""
        self.refusal = self.refusal or reason

    def function(self, name: str, parameters: str) -> Callable[..., None]:
        """A callable that records a call of the kernel, then makes it. See `Kernels` for `parameters`."""
        kernel: Callable[..., None] = getattr(self._library, name)
        invoker = self._library.invoker(name.encode())
        assert invoker is not None, f"program.cpp does not know {name}"

        def call(*arguments: Any) -> None:
            self._record(name, invoker, parameters, arguments)
            kernel(*arguments)

        return call

    def empty(self, shape: Sequence[int]) -> Tensor:
        """Scratch memory, uninitialized. shape: [rows of the step, *]."""
        if not shape or shape[0] != self._num_rows:
            self.refuse(f"it allocates {tuple(shape)}, whose first size is not its {self._num_rows} rows")
            return torch.empty(*shape)
        return self._memory.take(shape[0], math.prod(shape[1:])).view(*shape)

    def _record(self, name: str, invoker: int, parameters: str, arguments: Sequence[Any]) -> None:
        words = [0] * _MAX_WORDS
        per_row = inputs = 0
        for i, letter, value in zip(itertools.count(), parameters, arguments, strict=False):
            if letter == "f":
                words[i] = struct.unpack("I", struct.pack("f", value))[0]
            elif letter == "n":
                words[i], rest = divmod(value, self._num_rows)
                per_row |= 1 << i
                if rest:
                    self.refuse(f"{name}: argument {i} = {value} is no multiple of the {self._num_rows} rows")
            elif letter == "p" and value in self._inputs:
                words[i] = self._inputs[value]
                inputs |= 1 << i
            else:
                words[i] = int(value) % 2**64
                if letter == "p" and value and not self._is_known(value):
                    self.refuse(f"{name}: argument {i} points to memory that may be freed")
        self.calls.extend((invoker, per_row, inputs, *words))
        self.num_calls += 1

    def _is_known(self, address: int) -> bool:
        place = bisect.bisect_right(self._constants, (address, 2**64)) - 1
        return (place >= 0 and address < self._constants[place][1]) or self._memory.holds(address)


class _DispatchGuard(TorchDispatchMode):
    """Refuses the capture when torch's own operators compute something: a replay could not repeat them."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator. Views are allowed: they write nothing, and their memory is an argument's."""
        result = func(*args, **(kwargs or {}))
        spans = {_span(argument) for argument in tree_leaves((args, kwargs)) if isinstance(argument, Tensor)}
        outputs = tree_leaves(result)
        is_view = outputs and all(isinstance(tensor, Tensor) and _span(tensor) in spans for tensor in outputs)
        if func._schema.is_mutable or not is_view:
            self._recorder.refuse(f"torch's operator {func}")
        return result
