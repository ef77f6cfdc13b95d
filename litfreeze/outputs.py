"""Where runs are written: out/finetune/<method>[-n]/, and what stands in such a folder."""

from pathlib import Path
from typing import Optional

from litfreeze.config import read_json
from litfreeze.errors import UsageError

RUNS = Path("out/finetune")
FINAL, BEST, RESUME, MERGED_BASE = "final", "best", "resume", "base"
RESULTS = "results.json"  # what a run came to
LOGS = ("metrics.csv", "blocks.csv", "tensorboard")  # what a run that ended before it saved anything leaves


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


def used(path: Path) -> bool:
    """It is there and holds more than the logs of a run that ended before it saved anything."""
    if not path.is_dir():
        return path.exists()
    return any(child.name not in LOGS for child in path.iterdir())


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
    for point in RUNS.glob(f"*/{RESUME}/resume.json"):
        if read_json(point).get("method") == method:
            found.append((point.stat().st_mtime_ns, point.parent.parent))
    if not found:
        raise UsageError(f"{RUNS} holds no interrupted run of finetune {method} to resume. Name one with --resume.")
    return max(found)[1]
