"""Paths that a page may name: those inside of one folder, the root, with every link followed."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from litfreeze.errors import UsageError

CHECKPOINT = ("litfreeze.json", "config.json", "adapter_config.json")
DATA = (".json", ".jsonl", ".csv", ".txt", ".parquet")


@dataclass(frozen=True)
class Entry:
    """What stands in a folder. `kind`: checkpoint, folder, data or file."""

    name: str
    kind: str


@dataclass(frozen=True)
class Root:
    """The folder `path`, which is absolute and has no links in it."""

    path: Path

    def inside(self, given: str, option: str) -> Path:
        """The place that `given` means, from the root. Raises UsageError, naming `option`, if that, or what stands
        directly in it, lies outside."""
        try:
            place = (self.path / Path(given).expanduser()).resolve()
            within = [place]
            if place.is_dir() and place.is_relative_to(self.path):
                with os.scandir(place) as children:
                    within += [Path(child.path).resolve() for child in children if child.is_symlink()]
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(f"--{option} {given} cannot be looked at: {error}.") from None
        for each in within:
            if not each.is_relative_to(self.path):
                where = f"{given} leads" if each == place else f"{given} holds a link to {each}, which leads"
                raise UsageError(
                    f"--{option}: {where} outside of this board's root, {self.path}. litfreeze board --root chooses "
                    "another."
                )
        return place

    def check(self, values: Mapping[str, str], paths: set[str]) -> None:
        """Raises UsageError if one of the options `paths` in `values` leads outside."""
        for name in paths & values.keys():
            if values[name] not in ("", "null"):
                self.inside(values[name], name)

    def shown(self, place: Path) -> str:
        """`place` as a person would write it: from the root, if it lies there."""
        return str(place.relative_to(self.path)) if place.is_relative_to(self.path) else str(place)

    def list(self, folder: str) -> list[Entry]:
        """What stands in `folder`, folders first; hidden names, and links that lead outside, are left out."""
        found = []
        for child in sorted(self.inside_folder(folder).iterdir(), key=lambda child: child.name.lower()):
            if child.name.startswith(".") or not child.resolve().is_relative_to(self.path):
                continue
            if child.is_dir():
                known = any((child / name).is_file() for name in CHECKPOINT)
                found.append(Entry(child.name, "checkpoint" if known else "folder"))
            else:
                found.append(Entry(child.name, "data" if child.suffix in DATA else "file"))
        return sorted(found, key=lambda entry: entry.kind not in ("folder", "checkpoint"))

    def inside_folder(self, folder: str) -> Path:
        """Where `folder` is. Raises UsageError if that is outside, or no folder."""
        place = (self.path / folder).resolve()
        if not place.is_relative_to(self.path) or not place.is_dir():
            raise UsageError(f"{folder} is no folder inside of {self.path}.")
        return place
