"""A step as one list of calls of the compiled kernels: noted while Python makes them once, then run without Python."""

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
    """calls: struct Call of program.cpp, so many of them. result: what the step returned, for all rows; or None."""

    calls: "array[int]"
    num_calls: int
    result: Tensor | None


class StepGraphs:
    """The steps of one model that were made before, by key. For one thread.

    A step may be run from its program when it calls nothing but compiled kernels, and nothing of what it gives them
    changes from step to step but the number of rows and the addresses that are its inputs: adapters, tokens and cache
    blocks all lie behind those. Any other step, which is found out when it is first made, is made by Python each time.
    """

    def __init__(self, library: Library, constants: Iterable[Tensor], capacity: int) -> None:
        """constants: all that steps read and write beside inputs, never moved. capacity: rows of a step, at most."""
        self._library = library
        self._memory = _ScratchBlocks(capacity)
        self._constants = sorted({_span(tensor) for tensor in constants})
        self._graphs: dict[Hashable, _StepGraph | None] = {}

    def run(
        self, key: Hashable, make: Callable[[], Tensor | None], num_rows: int, inputs: Sequence[int]
    ) -> Tensor | None:
        """What `make` returns, [num_rows, *] (or nothing, if it returns nothing), to be read before the next call.

        key: of what is not behind the inputs. make: works on tensors at these addresses and calls the kernels.
        """
        if num_rows > self._memory.capacity:
            return make()
        if key not in self._graphs and num_rows == 1:
            # A single row does not tell what grows with the rows; and torch gives it any step to the next one.
            return make()
        if key not in self._graphs:
            if len(self._graphs) == _MAX_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            return self._record(key, make, num_rows, inputs)
        program = self._graphs[key]
        if program is None:
            return make()
        addresses = array("Q", inputs)
        calls, count = program.calls.buffer_info()[0], program.num_calls
        self._library.run(calls, count, num_rows, addresses.buffer_info()[0])
        return None if program.result is None else program.result[:num_rows]

    def _record(
        self, key: Hashable, make: Callable[[], Tensor | None], num_rows: int, inputs: Sequence[int]
    ) -> Tensor | None:
        notes = _Recorder(self._library, self._memory, self._constants, num_rows, inputs)
        with override_kernels(Kernels(notes.function, notes.empty)), _DispatchGuard(notes):
            result = make()
        # Where its result lies now is where it will lie again.
        block = None if result is None else self._memory.block_at(result.data_ptr())
        if result is not None and (block is None or not result.is_contiguous()):
            notes.refuse("its result lies elsewhere")
        if notes.refusal:
            log.debug("a step is made by Python: %s", notes.refusal)
        self._graphs[key] = None if notes.refusal else _StepGraph(notes.calls, notes.num_calls, block)
        return result


def _span(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


class _ScratchBlocks:
    """Blocks of [capacity, width] for what kernels make; one is free again when the last tensor in it is gone."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free: dict[int, list[np.ndarray]] = {}
        self._blocks: dict[int, np.ndarray] = {}  # by address

    def take(self, num_rows: int, width: int) -> Tensor:
        """[num_rows, width] at the start of a block."""
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
        """The block that starts there."""
        block = self._blocks.get(address)
        return None if block is None else torch.from_numpy(block)

    def holds(self, address: int) -> bool:
        """Whether it lies in a block."""
        return any(start <= address < start + block.nbytes for start, block in self._blocks.items())


class _Recorder:
    """The calls of one step, made and noted; `refusal` says why they are no program."""

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
        """There will be no program."""
        self.refusal = self.refusal or reason

    def function(self, name: str, parameters: str) -> Callable[..., None]:
        """A kernel that is called and noted."""
        kernel: Callable[..., None] = getattr(self._library, name)
        invoker = self._library.invoker(name.encode())
        assert invoker is not None, f"program.cpp does not know {name}"

        def call(*arguments: Any) -> None:
            self._record(name, invoker, parameters, arguments)
            kernel(*arguments)

        return call

    def empty(self, shape: Sequence[int]) -> Tensor:
        """Memory of the program."""
        if not shape or shape[0] != self._num_rows:
            self.refuse(f"it makes {tuple(shape)}, of {self._num_rows} rows")
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
                    self.refuse(f"{name}: {value} are not so many for each of {self._num_rows} rows")
            elif letter == "p" and value in self._inputs:
                words[i] = self._inputs[value]
                inputs |= 1 << i
            else:
                words[i] = int(value) % 2**64
                if letter == "p" and value and not self._is_known(value):
                    self.refuse(f"{name}: argument {i} lies in memory that may go")
        self.calls.extend((invoker, per_row, inputs, *words))
        self.num_calls += 1

    def _is_known(self, address: int) -> bool:
        place = bisect.bisect_right(self._constants, (address, 2**64)) - 1
        return (place >= 0 and address < self._constants[place][1]) or self._memory.holds(address)


class _DispatchGuard(TorchDispatchMode):
    """Notices torch's own operators, which no program can repeat."""

    def __init__(self, notes: _Recorder) -> None:
        super().__init__()
        self._recorder = notes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls it. A view computes nothing: it writes nothing, and lies where an argument does."""
        result = func(*args, **(kwargs or {}))
        places = {_span(argument) for argument in tree_leaves((args, kwargs)) if isinstance(argument, Tensor)}
        made = tree_leaves(result)
        lie_there = made and all(isinstance(tensor, Tensor) and _span(tensor) in places for tensor in made)
        if func._schema.is_mutable or not lie_there:
            self._recorder.refuse(f"torch's operator {func}")
        return result
