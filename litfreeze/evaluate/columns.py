"""What stands side by side: the checkpoints that were named, and before them the bases they began from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.hub import origin
from litfreeze.checkpoint.open import began_from, open_checkpoint, paths_of
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import LitfreezeError, UsageError


@dataclass(frozen=True)
class Column:
    """A checkpoint under its `name`; `asked_as` is the one whose prompt style its records are put in."""

    name: str
    checkpoint: Checkpoint
    asked_as: Checkpoint


def columns_of(
    checkpoint_dir: Union[str, list[str], None], base_dir: Optional[Path], with_base: bool
) -> tuple[list[Column], list[str]]:
    """The columns of the table, and what the person is told about them. Raises UsageError for what is no checkpoint,
    and where classifiers and language models are named together."""
    paths = paths_of(checkpoint_dir) or [str(MODEL_DIR)]
    opened = [(path, open_checkpoint(path, base_dir)) for path in paths]
    if len({bool(checkpoint.config.labels) for _, checkpoint in opened}) > 1:
        raise UsageError("--checkpoint_dir names classifiers and language models: no figure is common to them.")
    names = _names(paths)
    columns = [Column(name, checkpoint, checkpoint) for name, (_, checkpoint) in zip(names, opened, strict=True)]
    notes: list[str] = []
    bases: list[Column] = []
    for column in columns if with_base else []:
        base, note = _base_of(column.checkpoint)
        notes += [f"Note      {column.name}: {note}"] if note else []
        known = {each.checkpoint.path.resolve() for each in columns + bases}
        if base is not None and base.path.resolve() not in known:
            bases.append(Column(f"base ({_name(str(base.path))})", base, column.checkpoint))
    return bases + columns, notes


def _base_of(checkpoint: Checkpoint) -> tuple[Optional[Checkpoint], str]:
    """What it was trained from, and why there is nothing to compare with if so."""
    try:
        base = began_from(checkpoint)
    except LitfreezeError as error:
        return None, f"its base is left out. {error}"
    if base is None:
        return None, ""
    if checkpoint.config.labels and not base.config.labels:
        return None, "its base is a language model, which knows no classes, and is left out."
    return base, ""


def _name(path: str) -> str:
    """As it was named; of a model in the Hub's cache its name there, and the embedded model by that."""
    if Path(path) == MODEL_DIR:
        return "demo"
    found = origin(Path(path))
    return path if found is None else found.partition("@")[0]


def _names(paths: list[str]) -> list[str]:
    """No two alike: one commit of a model and another, say."""
    names = [_name(path) for path in paths]
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]
