"""Samples, and where many of them are kept: their numbers in memory or in a file, one sample behind the other.

Memory holds 20 bytes per sample beside the numbers: where it begins, how much of it is learned, where its response is.
The file has no name once it is open, so that it goes with the processes that use it, however they end. It is read, not
mapped, so that memory does not fill with what was read before."""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Optional, Union, overload

import numpy as np

from litfreeze.errors import UsageError
from litfreeze.sizes import megabytes

IGNORE = -100  # the label of a token that is not learned
IN_MEMORY = 10**9  # bytes of samples from which on `auto` keeps them in a file
HEAD = 5  # numbers before the tokens of a sample: its file, its line in two parts, its response
BUFFER = 1 << 20  # bytes that are written at once


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


def default_keep_dir() -> Path:
    """$XDG_CACHE_HOME/litfreeze/samples, or ~/.cache/litfreeze/samples."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litfreeze" / "samples"


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
    """The same in a file. It can go to another process (pickle) for as long as the file has its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb", buffering=0)
        fcntl.flock(self.file, fcntl.LOCK_SH)  # `_sweep` leaves it alone

    def read(self, start: int, count: int) -> np.ndarray:
        numbers = np.empty(count, np.int32)
        if os.preadv(self.file.fileno(), [numbers.data], 4 * start) != numbers.nbytes:
            raise OSError(errno.EIO, "a file of samples has become shorter", str(self.path))
        return numbers

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


class Filling:
    """Samples on their way to a shelf: into memory until there are many (`auto`), or into a file at once (`disk`).

    Args:
        keep: auto, memory or disk.
        folder: Where the file goes; made if need be.
        expected: Bytes that it will take at least.
    """

    def __init__(self, keep: str, folder: Optional[Path] = None, expected: int = 0) -> None:
        self.expected = expected
        self.limit = {"auto": IN_MEMORY, "memory": None, "disk": 0}[keep]
        self.folder = (folder or default_keep_dir()).expanduser()
        self.pending = bytearray()
        self.path: Optional[Path] = None
        self.file: Optional[BinaryIO] = None
        self.starts, self.learned, self.prompts, self.late = array("q", [0]), array("i"), array("i"), bytearray()
        self.names: dict[str, int] = {}
        self.highest = 0
        if self.limit == 0:
            self._to_disk()

    def add(self, sample: Sample, late: bool = False) -> None:
        """Puts one in. Those that are `late` stand behind the others. Raises UsageError if the disk is full."""
        name, _, line = sample.source.rpartition(":")
        if not line.isdecimal():
            name, line = sample.source, "-1"
        head = (
            self.names.setdefault(name, len(self.names)), int(line) >> 31, int(line) & 0x7FFFFFFF, *sample.response
        )  # fmt: skip
        numbers = np.concatenate([np.array(head, np.int32), sample.tokens, sample.labels], dtype=np.int32)
        self.pending += numbers.tobytes()
        self.starts.append(self.starts[-1] + len(numbers))
        self.learned.append(int((sample.labels[1:] != IGNORE).sum()))
        self.prompts.append(sample.response[0])
        self.late.append(late)
        self.highest = max(self.highest, int(sample.tokens.max()))
        if self.file is not None and len(self.pending) > BUFFER:
            self._write()
        elif self.file is None and self.limit is not None and len(self.pending) > self.limit:
            self._to_disk()

    def __len__(self) -> int:
        return len(self.learned)

    def shelf(self) -> Shelf:
        """All of them; nothing comes in any more."""
        table = Table(
            np.frombuffer(self.starts, np.int64),
            np.frombuffer(self.learned, np.int32),
            np.frombuffer(self.prompts, np.int32),
            tuple(self.names),
            self.highest,
        )
        late = np.frombuffer(self.late, np.bool_)
        order = np.concatenate([np.flatnonzero(~late), np.flatnonzero(late)])
        if self.file is None:
            return Shelf(InMemory(np.frombuffer(self.pending, np.int32)), table, order)
        self._write()
        with self.file:  # its lock is held until the next one is
            return Shelf(OnDisk(self.path), table, order)

    def _to_disk(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _sweep(self.folder)
            if self.expected > (free := shutil.disk_usage(self.folder).free):
                raise UsageError(
                    f"--data.keep_dir {self.folder}: {megabytes(free)} are free there, and these samples take "
                    f"{megabytes(self.expected)} or more. Make room, or name a folder on another disk."
                )
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=SUFFIX)
            self.path, self.file = Path(name), os.fdopen(handle, "wb", buffering=0)
            fcntl.flock(self.file, fcntl.LOCK_SH)
        except OSError as error:
            raise UsageError(
                f"--data.keep_dir {self.folder} cannot be used: {error.strerror}. Name a folder that can be written, "
                "or give --data.keep memory."
            ) from None
        self._write()

    def _write(self) -> None:
        left = memoryview(self.pending)
        try:
            while left:
                left = left[os.write(self.file.fileno(), left) :]
        except OSError as error:
            self.path.unlink(missing_ok=True)
            told = f"{megabytes(4 * self.starts[-1])} of samples did not fit" if error.errno == errno.ENOSPC else error
            raise UsageError(
                f"--data.keep_dir {self.folder}: {told} ({megabytes(shutil.disk_usage(self.folder).free)} are free "
                "there). Make room, or name a folder on another disk."
            ) from None
        self.pending = bytearray()


SUFFIX = ".samples"
FRESH = 60  # seconds


def _sweep(folder: Path) -> None:
    """Removes the files that a process that was killed left in `folder`."""
    for path in folder.glob(f"*{SUFFIX}"):
        with suppress(OSError), path.open("rb") as file:
            if time.time() - path.stat().st_mtime < FRESH:  # somebody may be about to lock it
                continue
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody uses it
            path.unlink()
