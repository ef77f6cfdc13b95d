"""Files and directories appear whole or not at all: written aside, fsynced, renamed."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Optional, TypeVar

from litfreeze.errors import UsageError

Result = TypeVar("Result")


def check_new_file(option: str, path: Optional[Path], suffix: str = "") -> None:
    """Raises UsageError unless `path`, which `--option` names, can be written without anything being lost. None can."""
    if path is None:
        return
    path = Path(path)
    if path.is_dir() or not path.absolute().parent.is_dir() or not path.name.endswith(suffix):
        kind = f"{suffix} file" if suffix else "file"
        raise UsageError(f"--{option} {path} must name a {kind}, in a folder that is there.")
    if path.exists():
        raise UsageError(f"--{option} {path} exists. Name another file, or move it away.")


def check_new_directory(path: Path, option: str = "out_dir") -> None:
    """Raises UsageError if `path` already holds something."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} is not empty. Choose another --{option}, or move it away.")


def hash_file(path: Path) -> str:
    """sha256 of what stands in a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes aside, fsyncs and renames, so that `path` is whole or as it was."""
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file that is whole or as it was: yields a hidden one beside `path`, fsynced and renamed to it on success and
    removed on failure."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        fsync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory that appears complete or not at all: yields a hidden one beside `path`, renamed to it on success
    and removed on failure. Raises UsageError if `path` already holds something."""
    path = path.resolve()  # "." has no name to put another one beside
    check_new_directory(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for file in aside.iterdir():
            fsync(file)
        fsync(aside)
        aside.rename(path)
        fsync(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def replace_directory(path: Path, write: Callable[[Path], Result]) -> Result:
    """Has `write` make a directory, whole or not at all, and puts it in the place of `path`, if there is one already.

    At every moment `path` is there, or `settle_directory` can bring it back."""
    settle_directory(path)
    if not path.exists():
        return write(path)
    fresh, old = _fresh_and_old(path)
    result = write(fresh)
    path.rename(old)
    fresh.rename(path)
    fsync(path.parent)
    shutil.rmtree(old)
    return result


def remove_directory(path: Path) -> None:
    """Removes `path`: at no moment a part of it stands under its name."""
    gone = path.with_name(f".{path.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def clean_directory(path: Path) -> None:
    """Takes away what a writer that was killed left in `path`, and finishes, or takes back, what it was replacing."""
    for left in list(path.glob(".*")) if path.is_dir() else ():
        name, _, what = left.name[1:].rpartition(".")
        if left.is_dir() and what in ("new", "old"):
            settle_directory(path / name)
        elif left.is_dir() and (what == "gone" or what.isdigit()):
            shutil.rmtree(left, ignore_errors=True)
        elif what.isdigit():
            left.unlink(missing_ok=True)


def settle_directory(path: Path) -> None:
    """Finishes, or takes back, a replacement of `path` that was cut short."""
    fresh, old = _fresh_and_old(path)
    for whole in (fresh, old):
        if not path.exists() and whole.exists():
            with suppress(FileNotFoundError):  # another process of the run was faster
                whole.rename(path)
        shutil.rmtree(whole, ignore_errors=True)


def _fresh_and_old(path: Path) -> tuple[Path, Path]:
    return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")


def fsync(path: Path) -> None:
    """What was written to this file, or renamed in this folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
