"""litfreeze.json: what a directory of ours says of itself, read and checked."""

import sys
from pathlib import Path
from typing import Any

from litfreeze.errors import UsageError
from litfreeze.json_file import read_json

MANIFEST = "litfreeze.json"
FORMAT = 1
WHOLE, TRAINED = "whole", "trained"  # what a directory of ours holds
STEMS = {WHOLE: "litfreeze", TRAINED: "trained"}  # the names of its weights' file


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the directory `path`. Raises UsageError for one that no litfreeze has written."""
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UsageError(f"{path / MANIFEST} has format {manifest.get('format')!r}; this litfreeze reads {FORMAT}.")
    if not isinstance(manifest.get("weights_hash"), str) or not _are_hashes(manifest.get("tensors")):
        raise UsageError(f"{path / MANIFEST} has no hashes: it is damaged, or not written by litfreeze.")
    last, earlier = manifest.get("training") or {}, manifest.get("history", [])
    sound = {
        "source": isinstance(manifest.get("source", ""), str),
        "files": _are_files(manifest.get("files", {})),
        "prompt": _is_prompt(manifest.get("prompt")),
        "training": isinstance(earlier, list) and all(map(_is_run, [last, *earlier])),
    }
    if damaged := [name for name, fine in sound.items() if not fine]:
        raise UsageError(f"{path / MANIFEST}: what it says of its {damaged[0]} is damaged.")
    return manifest


def _are_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


def _are_files(value: Any) -> bool:
    """Names in the directory itself, each with a size."""
    return isinstance(value, dict) and all(
        Path(name).name == name and isinstance(known, dict) and isinstance(known.get("bytes"), int)
        for name, known in value.items()
    )


def _is_prompt(value: Any) -> bool:
    """A style with its arguments, or none."""
    return value is None or (
        isinstance(value, dict) and isinstance(value.get("style"), str) and isinstance(value.get("arguments", {}), dict)
    )


def _is_run(value: Any) -> bool:
    """How far a run came, or nothing."""
    if not isinstance(value, dict) or not value:
        return isinstance(value, dict)
    after, trained = value.get("after") or {"loss": 0.0}, value.get("trained", [])
    figures = [value.get(key) for key in ("step", "epochs", "tokens")]
    figures += [value[key] for key in ("lr", "lora_plus_ratio") if key in value]
    return (
        all(map(_is_number, figures))
        and isinstance(after, dict)
        and _is_number(after.get("loss"))
        and isinstance(trained, list)
        and all(isinstance(name, str) for name in trained)
        and isinstance(value.get("kind", ""), str | None)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) <= sys.maxsize)
