"""Where runs are written: out/finetune/<method>[-n]/, and what stands in such a folder."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Optional

from filelock import FileLock, Timeout

from litfreeze.errors import UsageError
from litfreeze.json_file import read_json

RUNS = Path("out/finetune")
FINAL, BEST, RESUME, MERGED_BASE = "final", "best", "resume", "base"
RECIPE = "recipe.yaml"  # what was asked for
RESULTS = "results.json"  # what a run came to
LOCK, WHO = ".lock", ".running"  # held by the run that writes there, and which one that is
LOGGER = "logger.json"  # the id by which a logger knows the run
LOGS = ("metrics.csv", "blocks.csv", "tensorboard", "wandb", LOGGER)  # what a run that saved nothing leaves


def check_new_file(option: str, path: Optional[Path]) -> None:
    """Raises UsageError unless a file can be made at `path`: in a folder that is there, where nothing stands yet. What
    stands there may be the very records that a command reads."""
    if path is None:
        return
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--{option} {path} must name a file, in a folder that is there.")
    if path.exists():
        raise UsageError(f"--{option} {path} exists. Name another file, or move it away.")


def claim(out_dir: Optional[Path], method: str) -> Path:
    """A directory of this run's own, made if need be: the one asked for, or the next default that nobody has, another
    run that has just begun included.

    Raises UsageError if it cannot be made."""
    asked, number = out_dir is not None, 1
    while True:
        place = out_dir if asked else RUNS / (method if number == 1 else f"{method}-{number}")
        try:
            place.mkdir(parents=True, exist_ok=asked)
            return place
        except OSError as error:
            if asked or not isinstance(error, FileExistsError):
                raise UsageError(f"--out_dir {place} cannot be made: {error.strerror}.") from None
            number += 1


def step_name(step: int) -> str:
    """step-000010: the folder of what was kept after 10 steps."""
    return f"step-{step:06d}"


def kept_steps(folder: Path) -> list[Path]:
    """The folders in `folder` of what was kept after some steps, newest first."""
    return sorted((f for f in folder.glob("step-*") if f.name[5:].isdecimal()), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """10 of step-000010."""
    return int(folder.name.removeprefix("step-"))


def used(path: Path) -> bool:
    """It is there and holds more than the logs of a run that ended before it saved anything."""
    if not path.is_dir():
        return path.exists()
    return any(child.name not in (*LOGS, RECIPE, LOCK, WHO) for child in path.iterdir())


def began_as(path: Path, recipe: str) -> bool:
    """Whether a run of just this recipe began there, and did not end."""
    written = path / RECIPE
    return written.is_file() and written.read_text(encoding="utf-8") == recipe and not (path / FINAL).exists()


@contextmanager
def sole_user(run_dir: Path) -> Iterator[Optional[str]]:
    """While it is entered no other run can write to `run_dir`. The lock is the system's and goes with the process that
    holds it, however that ends. Yields which run was here last, if that ended without taking leave.

    Raises UsageError if another run is at work there."""
    lock, note = FileLock(run_dir / LOCK), run_dir / WHO
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = note.read_text(encoding="utf-8") if note.is_file() else "another process"
        raise UsageError(f"{run_dir} is in use by {who}. Wait for that run, or choose another folder.") from None
    try:
        left = note.read_text(encoding="utf-8") if note.is_file() else None
        note.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield left
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def last_checkpoint(method: str, holds: str) -> Path:
    """The newest final checkpoint of `method` under out/finetune that holds what `holds` says: "whole" or "trained".

    Raises UsageError if there is none."""
    found = []
    for manifest in RUNS.glob(f"*/{FINAL}*/litfreeze.json"):
        known = read_json(manifest)
        if known.get("kind") == method and known.get("holds") == holds:
            found.append((manifest.stat().st_mtime_ns, manifest.parent))
    if not found:
        what = f"whose final checkpoint is {'whole' if holds == 'whole' else 'only what trained'}"
        raise UsageError(f"{RUNS} holds no run of finetune {method} {what}. Name a checkpoint with --checkpoint_dir.")
    return max(found)[1]


def last_resumable(method: str) -> Path:
    """The newest run of `method` under out/finetune that was interrupted after it had saved a point to go on from.

    Raises UsageError if there is none."""
    found = []
    for point in RUNS.glob(f"*/{RESUME}/step-*/resume.json"):
        with suppress(UsageError):  # a damaged one is told of when its run goes on
            if read_json(point).get("method") == method:
                found.append((point.stat().st_mtime_ns, point.parents[2]))
    if not found:
        raise UsageError(f"{RUNS} holds no interrupted run of finetune {method} to resume. Name one with --resume.")
    return max(found)[1]
