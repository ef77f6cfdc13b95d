"""Samples on their way to a shelf: how they come into memory, or into a file."""

import errno
import fcntl
import os
import shutil
import tempfile
import time
import weakref
from array import array
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Optional

import numpy as np

from litfreeze.data.shelf import IGNORE, InMemory, OnDisk, Sample, Shelf, Table
from litfreeze.errors import UsageError
from litfreeze.sizes import megabytes

IN_MEMORY = 10**9  # bytes of samples from which on `auto` keeps them in a file
BUFFER = 1 << 20  # bytes that are written at once
SUFFIX = ".samples"
FRESH = 60  # seconds in which a file may not be locked yet


def default_keep_dir() -> Path:
    """$XDG_CACHE_HOME/litfreeze/samples, or ~/.cache/litfreeze/samples."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litfreeze" / "samples"


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
        self.given_up.detach()
        with self.file:  # its lock is held until the next one is
            return Shelf(OnDisk(self.path, owner=True), table, order)

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
            self.given_up = weakref.finalize(self, self.path.unlink, missing_ok=True)
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


def _sweep(folder: Path) -> None:
    """Removes the files that a process that was killed left in `folder`."""
    for path in folder.glob(f"*{SUFFIX}"):
        with suppress(OSError), path.open("rb") as file:
            if time.time() - path.stat().st_mtime < FRESH:  # somebody may be about to lock it
                continue
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody uses it
            path.unlink()
