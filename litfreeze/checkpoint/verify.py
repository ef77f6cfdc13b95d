"""Whether a directory still holds what was written there."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from litfreeze.checkpoint.checkpoint import Checkpoint, weights_hash
from litfreeze.checkpoint.manifest import MANIFEST
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.checkpoint.resume import points, read_facts
from litfreeze.checkpoint.tensors import sha256
from litfreeze.errors import UsageError
from litfreeze.outputs import BEST, FINAL, MERGED_BASE, kept_steps
from litfreeze.tokenizer import TOKENIZER_FILES
from litfreeze.whole import hash_file


@dataclass(frozen=True)
class Verdict:
    """On one directory: what it is and, if it is not whole, what is wrong with it."""

    path: Path
    what: str
    fault: str = ""


def verify(path: Path) -> Iterator[Verdict]:
    """Reads all of a checkpoint, or of every checkpoint and point in a run's folder, and compares it with what is on
    record, one verdict after another. Raises UsageError if nothing of the kind is there."""
    if (path / "config.json").is_file() or (path / MANIFEST).is_file():
        yield _verify_checkpoint(path)
        return
    names = [FINAL, f"{FINAL}-delta", BEST, MERGED_BASE]
    checkpoints = [path / name for name in names if (path / name).is_dir()] + kept_steps(path)
    kept = points(path)
    if not checkpoints and not kept:
        raise UsageError(f"{path} is no checkpoint, and no folder of a run that kept one.")
    for checkpoint in checkpoints:
        yield _verify_checkpoint(checkpoint)
    for point in kept:
        try:
            yield Verdict(point, f"point to go on from, {len(read_facts(point)['tensors'])} tensors")
        except UsageError as error:
            yield Verdict(point, "point to go on from", str(error))


def _verify_checkpoint(path: Path) -> Verdict:
    try:
        checkpoint = open_checkpoint(path)
        checkpoint.tokenizer()
        _check_files(checkpoint)
        return Verdict(path, _check_tensors(checkpoint))
    except UsageError as error:
        return Verdict(path, "checkpoint", str(error))


def _check_files(checkpoint: Checkpoint) -> None:
    """The files that the manifest lists, if there is one, and that no other is read with them. Raises UsageError."""
    on_record = (checkpoint.manifest or {}).get("files", {})
    for name in TOKENIZER_FILES:
        if on_record and name not in on_record and (checkpoint.path / name).exists():
            raise UsageError(f"{checkpoint.path / name} is read with the checkpoint, but was not written with it.")
    for name, known in on_record.items():
        file = checkpoint.path / name
        if not file.is_file():
            raise UsageError(f"{file} is missing.")
        if (size := file.stat().st_size) != known["bytes"]:
            raise UsageError(f"{file} has {size:,} bytes, and {known['bytes']:,} were written.")
        if "sha256" in known and hash_file(file) != known["sha256"]:
            raise UsageError(f"{file} has other contents than were written.")


def _check_tensors(checkpoint: Checkpoint) -> str:
    """Every tensor, those of the base among them, against its hash. Raises UsageError. What was found, in words."""
    told = f"{len(checkpoint.tensors)} tensors"
    if checkpoint.manifest is None:
        checkpoint.hash_of_contents()
        return f"{told}, all readable; of a Hugging Face or PEFT directory no hashes are on record"
    known = checkpoint.manifest["tensors"]
    for name in tqdm(checkpoint.tensors, desc=checkpoint.path.name, unit="tensor", leave=False, disable=None):
        if sha256(checkpoint.tensors[name], checkpoint.dtypes[name]) != known.get(name):
            raise UsageError(f"{checkpoint.path}: {name} is damaged (its sha256 is not the one on record).")
    if checkpoint.base is not None:
        if checkpoint.base.hash_of_contents() != checkpoint.manifest["base"]["weights_hash"]:
            raise UsageError(f"{checkpoint.path}: its base, {checkpoint.base.path}, has other weights than on record.")
        told += f" over {checkpoint.base.path}"
    if weights_hash(checkpoint.layout(), checkpoint.tensor_hashes) != checkpoint.manifest["weights_hash"]:
        raise UsageError(f"{checkpoint.path / MANIFEST}: its hash of all weights does not fit those of the tensors.")
    return told
