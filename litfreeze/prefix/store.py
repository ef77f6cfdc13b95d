"""ActivationStore: what the frozen blocks gave for each record, computed once and kept.

The store knows nothing of models: it keeps rows under a digest of whatever they were computed from. Processes and runs
may share a cache without waiting for each other, because a file is written once, whole, under a name of its own."""

import json
import os
import sys
import time
import uuid
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from litfreeze.checkpoint.tensors import SAFETENSORS_DTYPES, as_bytes, nbytes, write_tensors
from litfreeze.errors import UsageError
from litfreeze.prefix.folder import ABOUT, SHARDS, hold, sweep, touch
from litfreeze.version import __version__
from litfreeze.whole import fsync, write_text

SHARD = 64 * 1024**2  # bytes of rows that are collected in memory before they are written


@dataclass(frozen=True, eq=False)
class Shard:
    """A file with the rows of several records, one behind the other. Only what finds a record is in memory."""

    path: Path
    nbytes: int
    offset: int  # of the first row, from the file's beginning
    starts: list[int]  # record i has the rows from starts[i] up to starts[i + 1]
    digests: list[bytes]
    checksums: list[int]

    @classmethod
    def open(cls, path: Path, width: int, dtype: torch.dtype) -> Optional["Shard"]:
        """None if its rows are of another width or dtype. Raises OSError if it cannot be read, and ValueError or
        SafetensorError if it is damaged."""
        with safe_open(path, framework="pt") as file:  # checks the header against the file's length
            if set(file.keys()) != {"rows", "starts", "digests", "checksums"}:
                raise ValueError("other tensors")
            rows = file.get_slice("rows")
            starts, digests, checksums = (file.get_tensor(name) for name in ("starts", "digests", "checksums"))
        shape, records = rows.get_shape(), len(checksums)
        counts = starts.tolist()
        if not (
            len(shape) == 2
            and (starts.dtype, starts.shape) == (torch.int64, (records + 1,))
            and (digests.dtype, digests.shape) == (torch.uint8, (records, 32))
            and (checksums.dtype, checksums.shape) == (torch.int64, (records,))
            and counts == sorted(counts)
            and (counts[0], counts[-1]) == (0, shape[0])
        ):
            raise ValueError("its tensors contradict each other")
        if (shape[1], rows.get_dtype()) != (width, SAFETENSORS_DTYPES[dtype]):
            return None
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            offset = 8 + length + json.loads(file.read(length))["rows"]["data_offsets"][0]
            size = os.fstat(file.fileno()).st_size
        return cls(path, size, offset, counts, [row.tobytes() for row in digests.numpy()], checksums.tolist())


class ActivationStore:
    """Rows (T, C) by digest, in `<root>/<key>/` or, where `root` is None, in memory on `device`.

    What it gives back is what was put in, cast to `dtype`, to the bit: every record carries a checksum over the key,
    its digest and its rows. A damaged shard is deleted, and one of another width or dtype left alone; either way its
    records are absent, and to be computed again. One thread may read while another adds.

    If writing fails, `full` says why, and is empty otherwise. Then what was added stays readable, from memory where it
    was not written, and nothing more is kept, so that memory does not take the place of the disk.

    Args:
        root: The folder of all caches, as --cache_dir names it.
        key: Names everything but the record that rows depend on, such as a sha256 in hex; the folder's name.
        width: C.
        dtype: What rows are kept in.
        about: What a person may want to know of this cache, such as "model" and "layers", for `litfreeze cache ls`.
        device: Where `read` puts rows.

    Raises:
        UsageError: The folder cannot be made or locked.
    """

    def __init__(
        self,
        root: Optional[Path],
        key: str,
        width: int,
        dtype: torch.dtype,
        about: Mapping[str, Any] = {},
        device: Union[str, torch.device] = "cpu",
    ) -> None:
        assert key and Path(key).name == key and not key.startswith("."), f"{key!r} names no folder"
        self.key, self.width, self.dtype, self.device = key, width, dtype, device
        self.full = ""
        self._pending: dict[bytes, Tensor] = {}
        self._pending_bytes = 0
        self._records: dict[bytes, tuple[Shard, int]] = {}
        self._shards: dict[str, int] = {}  # file name -> bytes of those in use, 0 for those that are not
        self._lock: Optional[int] = None
        self.folder = None if root is None else root / key
        if self.folder is None:
            return
        try:
            self._lock = hold(self.folder)
            if not (self.folder / ABOUT).exists():
                facts = {**about, "dtype": str(dtype).removeprefix("torch."), "width": width, "litfreeze": __version__}
                write_text(self.folder / ABOUT, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            if self._lock is not None:
                os.close(self._lock)
            raise UsageError(
                f"--cache_dir {root} cannot be used: {error.strerror}. Name a folder that can be written, on a disk "
                "with room."
            ) from None
        sweep(self.folder)
        self.refresh()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._pending or digest in self._records

    def read(self, digest: bytes) -> Tensor:
        """The rows of a record: (T, C), the caller's own. It costs their bytes, read from the file; the file is not
        mapped, so that memory does not fill with what was read before, and a broken disk is no crash.

        Raises KeyError if the record is absent or, now that it is looked at, damaged or gone: then it is forgotten."""
        pending = self._pending.get(digest)  # first, because `flush` makes it a record before it is pending no more
        if pending is not None:
            return pending.to(self.device, copy=True)
        shard, i = self._records[digest]
        start, stop = shard.starts[i], shard.starts[i + 1]
        rows = torch.empty((stop - start, self.width), dtype=self.dtype)
        content = as_bytes(rows).numpy()
        try:
            with shard.path.open("rb") as file:
                file.seek(shard.offset + nbytes(self.dtype, (start, self.width)))
                whole = file.readinto(content) == content.nbytes
        except OSError:
            self._forget(shard)
            raise KeyError(digest) from None
        if not whole or self._checksum(digest, rows) != shard.checksums[i]:
            self._forget(shard)
            shard.path.unlink(missing_ok=True)
            raise KeyError(digest)
        return rows.to(self.device)

    def add(self, digest: bytes, rows: Tensor, more: bool = False) -> None:
        """Keeps `rows` (T, C) under `digest` (32 bytes), unless it is there already or the store is `full`. They are
        copied, and readable at once; they are written when 64 MiB have come together, but not while `more` follow
        that belong with them."""
        assert len(digest) == 32 and rows.ndim == 2 and rows.shape[1] == self.width, (len(digest), tuple(rows.shape))
        if digest in self or self.full:
            return
        place = self.device if self.folder is None else "cpu"
        self._pending[digest] = torch.empty(rows.shape, dtype=self.dtype, device=place).copy_(rows.detach())
        self._pending_bytes += nbytes(self.dtype, tuple(rows.shape))
        if self._pending_bytes >= SHARD and not more:
            self.flush()

    def flush(self) -> None:
        """Writes what is only in memory. Without a folder, there is nothing to do."""
        if self.folder is None or self.full or not self._pending:
            return
        # Begins with the time, so that of a record that was written twice everybody takes the older one
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex}"
        aside, path = (self.folder / f"{dot}{name}.safetensors" for dot in (".", ""))
        try:
            self._write(aside)
            aside.rename(path)
            fsync(self.folder)
            if not self._learn(path):
                raise OSError(None, "what was written cannot be read back")
        except OSError as error:
            self.full = f"{self.folder}: {error.strerror or error}"
            return
        finally:
            with suppress(OSError):
                aside.unlink()
        self._pending = {}
        self._pending_bytes = 0

    def _write(self, path: Path) -> None:
        rows = list(self._pending.values())
        starts = torch.tensor([0] + [len(part) for part in rows]).cumsum(0)
        digests = torch.frombuffer(bytearray(b"".join(self._pending)), dtype=torch.uint8).view(-1, 32)
        checksums = torch.tensor([self._checksum(*item) for item in self._pending.items()])
        small = {"starts": starts, "digests": digests, "checksums": checksums}
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in small.items()}
        layout["rows"] = self.dtype, (int(starts[-1]), self.width)
        read = lambda name: small[name] if name in small else torch.cat(rows)  # noqa: E731
        write_tensors(path.parent, path.stem, layout, read, max_shard_bytes=sys.maxsize)

    def refresh(self) -> None:
        """Learns of the shards that other processes have written since."""
        for path in sorted(self.folder.glob(SHARDS)) if self.folder else ():
            if path.name not in self._shards:
                self._learn(path)

    def _learn(self, path: Path) -> bool:
        """Makes the records of a shard readable, if it can be used."""
        try:
            shard = Shard.open(path, self.width, self.dtype)
        except OSError:  # gone, or not to be read now: `refresh` tries again
            return False
        except (SafetensorError, ValueError):
            with suppress(OSError):
                path.unlink()
            return False
        self._shards[path.name] = shard.nbytes if shard else 0
        for i, digest in enumerate(shard.digests if shard else ()):
            self._records.setdefault(digest, (shard, i))
        return shard is not None

    def _forget(self, shard: Shard) -> None:
        self._shards[shard.path.name] = 0
        for digest in shard.digests:
            if self._records.get(digest, (None,))[0] is shard:
                self._records.pop(digest, None)

    def _checksum(self, digest: bytes, rows: Tensor) -> int:
        """crc32, which sees every change within 32 bits; rows of another cache or record do not pass either."""
        return zlib.crc32(as_bytes(rows).numpy(), zlib.crc32(self.key.encode() + digest))

    @property
    def nbytes(self) -> int:
        """Bytes on disk, and of what is only in memory."""
        return sum(self._shards.values()) + self._pending_bytes

    def close(self) -> None:
        """Writes what is only in memory, or forgets it where there is no folder, and lets the cache be removed."""
        self.flush()
        self._pending = {}
        if self._lock is not None:
            touch(self._lock)
            os.close(self._lock)
            self._lock = None
