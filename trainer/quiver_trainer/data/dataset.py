"""Datasets: the samples of one or several JSONL files, their token ids in a memory-mapped temporary file.

Memory holds three numbers for each sample: offset, length and number of prompt tokens.
"""

import hashlib
import random
import tempfile
import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from quiver_trainer.data.jsonl import EXAMPLE, Encoder, Sample, read_lines
from quiver_trainer.errors import DataError


@dataclass(frozen=True)
class DataFile:
    """One file of a dataset. weight: its passes per epoch. samples: indices of its samples.

    num_skipped: rows left out as too long; first_skipped: the line of the first.
    """

    path: Path
    weight: float
    samples: range
    sha256: str
    num_skipped: int = 0
    first_skipped: int = 0


class Dataset(Sequence[Sample]):
    """Samples by index. files: in their order. lengths: tokens of each sample."""

    def __init__(self) -> None:
        self.files: list[DataFile] = []
        self.lengths = array("i")
        self._given = array("i")
        self._starts = array("q")
        # Unnamed: it is gone when the process is.
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._tokens: np.ndarray[Any, np.dtype[np.int32]] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self._tokens is None:
            self._file.flush()
            self._tokens = np.memmap(self._file, dtype=np.int32, mode="r")
        start = self._starts[index]
        return Sample(self._tokens[start : start + self.lengths[index]].tolist(), self._given[index])

    @property
    def has_raw_text(self) -> bool:
        """Whether any sample is raw text for span corruption."""
        return any(given == 0 for given in self._given)

    def add_file(
        self, path: Path, weight: float, encoder: Encoder, *, skip_too_long: bool, on_row: Callable[[], object]
    ) -> None:
        """Encode and append all rows of a file.

        Rows of more tokens than the encoder's limit are never cut: they are left out and counted, or an error.
        on_row: called after each. Raises DataError.
        """
        assert self._tokens is None, "samples were read already"
        first, skipped, num_rows = len(self), array("q"), 0
        for line in read_lines(path):
            num_rows += 1
            for sample in encoder.encode(line):
                if encoder.max_length is None or len(sample.tokens) <= encoder.max_length:
                    self._add(sample)
                elif skip_too_long:
                    skipped.append(line.number)
                else:
                    raise _too_long(sample, line.where, encoder.max_length)
            on_row()
        if not num_rows:
            raise DataError(f"{path}: holds no rows; each line must be an object such as {EXAMPLE}")
        if len(self) == first:
            raise DataError(f"{path}: all {num_rows} rows are longer than max_length {encoder.max_length} tokens")
        samples = range(first, len(self))
        self.files.append(
            DataFile(path, weight, samples, file_sha256(path), len(skipped), skipped[0] if skipped else 0)
        )

    def _add(self, sample: Sample) -> None:
        self._starts.append(self._starts[-1] + self.lengths[-1] if self._starts else 0)
        self.lengths.append(len(sample.tokens))
        self._given.append(sample.num_prompt_tokens)
        self._file.write(np.array(sample.tokens, dtype=np.int32).tobytes())

    def epoch(self, seed: int, epoch: int) -> list[int]:
        """The sample indices of an epoch, in the order of the files; each file is repeated by its weight.

        A fractional weight takes another part of the file in each epoch, deterministically by seed.
        """
        chosen: list[int] = []
        for number, file in enumerate(self.files):
            whole = int(file.weight)
            chosen += list(file.samples) * whole
            if part := round((file.weight - whole) * len(file.samples)):
                generator = random.Random(f"seed {seed}, epoch {epoch}, file {number}")
                chosen += sorted(generator.sample(file.samples, part))
        return chosen


def read_dataset(path: Path, encoder: Encoder, *, skip_too_long: bool = False) -> Dataset:
    """A dataset of one file. Raises DataError."""
    data = Dataset()
    data.add_file(path, 1.0, encoder, skip_too_long=skip_too_long, on_row=lambda: None)
    return data


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content. Raises DataError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def evenly_spaced(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    """`count` evenly spaced samples, so that a sorted file is represented whole. None: all."""
    if count is None or count >= len(samples):
        return list(samples)
    return [samples[i * len(samples) // count] for i in range(count)]


def _too_long(sample: Sample, where: str, max_length: int) -> DataError:
    return DataError(
        f"{where}: prompt ({sample.num_prompt_tokens} tokens) and completion "
        f"({len(sample.tokens) - sample.num_prompt_tokens} with the end token) are longer than max_length "
        f"{max_length}; shorten the row, or set data.too_long=skip to leave such rows out"
    )
