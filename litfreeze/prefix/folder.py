"""The folder in which activations are kept, seen from outside: what lies there, who uses it, what may go.

`<root>/<key>/` is one cache: `about.json` for people, shards `*.safetensors`, and `lock`. Whoever has the cache open
holds a shared flock on `lock`, whose time says when that was last; whoever removes the cache takes it exclusively.
Names that begin with a dot are not whole: files on their way in, caches on their way out.
No heavy import here: `litfreeze cache` needs no more."""

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from litfreeze.errors import UsageError
from litfreeze.json_file import read_json

LOCK, ABOUT, SHARDS = "lock", "about.json", "[!.]*.safetensors"  # pathlib's * would take hidden files too
ASIDE = (".*.safetensors", f".{ABOUT}.*")
GONE = ".removed"  # how the hidden name of a cache on its way out ends
DAY = 24 * 3600  # seconds, after which nobody is still writing a file
SPARE = 1.05  # times what is needed must be free on the disk


@dataclass(frozen=True)
class CacheEntry:
    """One cache: what its writer said about it, and what can be seen."""

    key: str
    about: dict[str, Any]
    records: int
    nbytes: int
    last_used: float  # seconds since 1970
    in_use: bool


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/litfreeze/prefix, or ~/.cache/litfreeze/prefix."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litfreeze" / "prefix"


# ---- who uses a cache ----


def hold(folder: Path) -> int:
    """Makes the cache `folder` if need be, and keeps it from being removed until the file descriptor is closed."""
    while True:
        with suppress(FileExistsError):  # raised, too, if somebody removes what exists
            folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # removed since the line above
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
            if _is_lock_of(handle, folder):
                touch(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def touch(handle: int) -> None:
    """The cache that `handle` holds is used now."""
    os.utime(handle)


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether nobody has the cache open; if so, nobody opens it meanwhile. FileNotFoundError if it is gone."""
    handle = os.open(folder / LOCK, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = _is_lock_of(handle, folder)
        except BlockingIOError:
            alone = False
        yield alone
    finally:
        os.close(handle)


def _is_lock_of(handle: int, folder: Path) -> bool:
    """False if the cache was removed, and perhaps made again, between opening its lock and getting it."""
    try:
        return os.path.samestat(os.fstat(handle), (folder / LOCK).stat())
    except FileNotFoundError:
        return False


# ---- what lies there ----


def list_caches(root: Path) -> list[CacheEntry]:
    """The caches under `root`, the last used one first. A folder that holds anything else is none."""
    entries = []
    for lock in root.glob(f"[!.]*/{LOCK}"):
        with suppress(FileNotFoundError):  # removed meanwhile
            if _is_cache(lock.parent):
                entries.append(_entry(lock.parent))
    return sorted(entries, key=lambda entry: entry.last_used, reverse=True)


def _is_cache(folder: Path) -> bool:
    """A folder with a file of any other name is somebody's own, and must not be offered for removal."""
    ours = (LOCK, ABOUT, SHARDS, *ASIDE)
    return all(any(child.match(pattern) for pattern in ours) for child in folder.iterdir())


def _entry(folder: Path) -> CacheEntry:
    about: dict[str, Any] = {}
    with suppress(UsageError):  # not written yet
        about = read_json(folder / ABOUT)
    digests: set[bytes] = set()  # of a record that two processes wrote there is one
    for path in folder.glob(SHARDS):
        with suppress(SafetensorError, OSError), safe_open(path, framework="np") as shard:
            digests.update(digest.tobytes() for digest in shard.get_tensor("digests"))
    nbytes = 0
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # a file on its way in that has got its name
            nbytes += file.stat().st_size
    with _alone(folder) as alone:
        last_used = (folder / LOCK).stat().st_mtime
    return CacheEntry(folder.name, about, len(digests), nbytes, last_used, in_use=not alone)


# ---- what may go ----


def remove(root: Path, keys: Iterable[str]) -> list[str]:
    """Removes those caches that nobody uses, and gives back the keys of the others. Raises OSError."""
    sweep(root)
    return [key for key in keys if not _remove(root / key)]


def _remove(folder: Path) -> bool:
    """Whether the cache is gone: False if somebody uses it. It goes at once, whatever then becomes of its files."""
    gone = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}{GONE}")
    try:
        with _alone(folder) as alone:
            if alone:
                folder.rename(gone)
    except FileNotFoundError:
        return True
    if alone:
        shutil.rmtree(gone, ignore_errors=True)
    return alone


def make_room(root: Path, needed_bytes: int, limit_bytes: int, keep_key: str) -> bool:
    """Removes the least recently used caches, whole, until `needed_bytes` more fit: within `limit_bytes` for all
    caches under `root`, and on the disk with 5 % to spare. `keep_key` stays, and so does what is in use.

    False, and nothing is removed, if that cannot be reached."""
    sweep(root)
    entries = list_caches(root)
    there = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    missing = max(
        sum(entry.nbytes for entry in entries) + needed_bytes - limit_bytes,
        int(needed_bytes * SPARE) - free,
    )
    victims = [entry for entry in reversed(entries) if entry.key != keep_key and not entry.in_use]
    if missing > sum(entry.nbytes for entry in victims):
        return False
    for entry in victims:
        if missing <= 0:
            break
        with suppress(OSError):  # another person's, say: the next one may do
            missing -= entry.nbytes if _remove(root / entry.key) else 0
    return missing <= 0


def sweep(folder: Path) -> None:
    """Removes what a process that died left in `folder`: caches half removed, and files half written a day ago."""
    for gone in folder.glob(f".*{GONE}"):
        shutil.rmtree(gone, ignore_errors=True)
    for aside in (file for pattern in ASIDE for file in folder.glob(pattern)):
        with suppress(OSError):
            if aside.stat().st_mtime < time.time() - DAY:
                aside.unlink()
