"""Samples, and where many of them are kept: their numbers in memory or in a file, one sample behind the other.

Memory holds 20 bytes per sample beside the numbers: where it begins, how much of it is learned, where its response is.
The file has no name once it is open, so that it goes with the processes that use it, however they end. It is read, not
mapped, so that memory does not fill with what was read before."""

import errno
import fcntl
import hashlib
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Union, overload

import numpy as np

IGNORE = -100  # the label of a token that is not learned
HEAD = 5  # numbers before the tokens of a sample: its file, its line in two parts, its response


@dataclass(frozen=True, eq=False)
class Sample:
    """One sequence to learn from.

    Attributes:
        tokens: (T,) int32, T >= 2.
        labels: (T,) int32, not shifted: the token itself where it is learned, else -100. At least one of `labels[1:]`
            is learned; the first token can be no target, since nothing comes before it.
        source: `file:line` of its record.
        response: Where the first response begins and ends in `tokens`, its end token included, even if every token is
            learned (`mask_prompt` false). All of a plain text is response.
    """

    tokens: np.ndarray
    labels: np.ndarray
    source: str
    response: tuple[int, int]

    @cached_property
    def digest(self) -> bytes:
        """sha256 of the tokens that the model reads: all but the last."""
        return hashlib.sha256(self.tokens[:-1].astype("<i4").tobytes()).digest()

    @property
    def prompt_tokens(self) -> np.ndarray:
        """The tokens before the first response: what to generate it from."""
        return self.tokens[: self.response[0]]

    @property
    def response_tokens(self) -> np.ndarray:
        """The tokens of the first response."""
        return self.tokens[slice(*self.response)]


def lengths_of(samples: Sequence[Sample]) -> np.ndarray:
    """(n,) int64: the tokens of each."""
    if isinstance(samples, Shelf):
        return samples.lengths
    return np.array([len(sample.tokens) for sample in samples], np.int64)


def learned_of(samples: Sequence[Sample]) -> np.ndarray:
    """(n,) int64: how many tokens of each are learned."""
    if isinstance(samples, Shelf):
        return samples.learned
    return np.array([int((sample.labels[1:] != IGNORE).sum()) for sample in samples], np.int64)


# ---- the numbers ----


class InMemory:
    """int32 numbers, readable from anywhere."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers

    def read(self, start: int, count: int) -> np.ndarray:
        return self.numbers[start : start + count]

    def unname(self) -> None:
        """It has no file."""


class OnDisk:
    """The same in a file. It can go to another process (pickle) for as long as the file has its name: until `unname`
    or, if this is its owner, the end of this object."""

    def __init__(self, path: Path, owner: bool = False) -> None:
        self.path = path
        if owner:
            weakref.finalize(self, path.unlink, missing_ok=True)
        self.file = path.open("rb", buffering=0)
        fcntl.flock(self.file, fcntl.LOCK_SH)  # `_sweep` leaves it alone

    def read(self, start: int, count: int) -> np.ndarray:
        content = bytearray(os.pread(self.file.fileno(), 4 * count, 4 * start))
        if len(content) != 4 * count:
            raise OSError(errno.EIO, "a file of samples has become shorter", str(self.path))
        return np.frombuffer(content, np.int32)

    def unname(self) -> None:
        """From here on the file is there for those alone who have it open."""
        self.path.unlink(missing_ok=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return OnDisk, (self.path,)


# ---- the shelf ----


class Shelf(Sequence[Sample]):
    """Samples, each of which is made when it is asked for. A slice, and what is `chosen`, is a shelf over the same
    numbers.

    Attributes:
        lengths: (n,) int64, the tokens of each sample.
        learned: (n,) int64, how many of them are learned.
        prompts: (n,) int64, how many stand before the first response.
        highest: No token of it is higher.
    """

    def __init__(self, numbers: Union[InMemory, OnDisk], table: "Table", order: np.ndarray) -> None:
        self.numbers, self.table, self.order = numbers, table, order

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, i: int) -> Sample: ...
    @overload
    def __getitem__(self, i: slice) -> "Shelf": ...
    def __getitem__(self, i: Union[int, slice]) -> Union[Sample, "Shelf"]:
        if isinstance(i, slice):
            return self.chosen(range(len(self))[i])
        at = self.order[i]
        start, stop = self.table.starts[at], self.table.starts[at + 1]
        numbers = self.numbers.read(int(start), int(stop - start))
        name, high, low, begin, end = numbers[:HEAD].tolist()
        tokens, labels = numbers[HEAD:].reshape(2, -1)
        return Sample(tokens, labels, self.table.source(name, high << 31 | low), (begin, end))

    def chosen(self, indices: Iterable[int]) -> "Shelf":
        """Those of its samples, in that order."""
        return Shelf(self.numbers, self.table, self.order[np.fromiter(indices, np.int64)])

    @property
    def lengths(self) -> np.ndarray:
        return (np.diff(self.table.starts)[self.order] - HEAD) // 2

    @property
    def learned(self) -> np.ndarray:
        return self.table.learned[self.order].astype(np.int64)

    @property
    def prompts(self) -> np.ndarray:
        return self.table.prompts[self.order].astype(np.int64)

    @property
    def highest(self) -> int:
        return self.table.highest

    def __add__(self, other: Sequence[Sample]) -> "Joined":
        return Joined(self, other)


class Joined(Sequence[Sample]):
    """The samples of several sequences, one behind the other."""

    def __init__(self, *parts: Sequence[Sample]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, i: int) -> Sample:
        for part in self.parts:
            if i < len(part):
                return part[i]
            i -= len(part)
        raise IndexError


@dataclass(frozen=True)
class Table:
    """What is in memory of samples: where they begin among the numbers (n + 1), and what `Shelf` tells of each."""

    starts: np.ndarray
    learned: np.ndarray
    prompts: np.ndarray
    names: tuple[str, ...]
    highest: int

    def source(self, name: int, line: int) -> str:
        return f"{self.names[name]}:{line}" if line >= 0 else self.names[name]
