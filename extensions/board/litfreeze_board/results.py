"""What a run has left: its checkpoints, and the commands that go on with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from litfreeze.config import read_json
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import UsageError
from litfreeze.freeze.plan import EXTRAS, part_of
from litfreeze_board.runs import Run


@dataclass(frozen=True)
class Left:
    """One checkpoint of a run: `place` from the root, and what its litfreeze.json says."""

    name: str
    place: str
    manifest: Mapping[str, Any]

    @property
    def partial(self) -> bool:
        """It holds only what trained, over its base."""
        return self.manifest.get("holds") == "trained"

    @property
    def base(self) -> str:
        """What it began from."""
        return self.manifest["training"].get("began_from") or str(MODEL_DIR)

    @property
    def adapter(self) -> bool:
        """It is an adapter beside its base."""
        return self.partial and self.manifest.get("kind") == "lora"

    @property
    def merged(self) -> str:
        """Where it goes as a whole."""
        return f"{self.place}-{'merged' if self.adapter else 'whole'}"

    @property
    def exported(self) -> str:
        """Where it goes for other tools."""
        return f"{self.place}-{'peft' if self.adapter else 'hf'}"

    def merge(self) -> list[str]:
        """The words that make it whole."""
        command = "merge_lora" if self.adapter else "merge_delta"
        return [command, "--checkpoint_dir", self.place, "--out_dir", self.merged]

    def diff(self, picture: str) -> list[str]:
        """The words that compare it with what it began from, and prove that nothing else changed."""
        parts = {part_of(name) for name in self.manifest["training"].get("trained", [])}
        inside = [str(part) for part in sorted(part for part in parts if isinstance(part, int))]
        chosen = ",".join(inside + [part for part in EXTRAS if part in parts]) or "none"
        return ["diff", self.base, self.place, "--expect_only", chosen, "--png", picture]

    def export(self) -> list[str]:
        """The words that write it for transformers, vLLM and the like, or an adapter for PEFT."""
        command = "to_peft" if self.adapter else "to_hf"
        return ["convert", command, "--checkpoint_dir", self.place, "--out_dir", self.exported]


def left_by(run: Run) -> list[Left]:
    """The checkpoints of a run: the final one first, then the best, then those on the way, newest first."""
    found = {}
    for manifest in run.place.glob("*/litfreeze.json"):
        left = _left(run, manifest.parent)
        if left is not None and "training" in left.manifest:
            found[left.name] = left
    order = sorted((name for name in found if name not in ("final", "best")), reverse=True)
    return [found[name] for name in ("final", "best", *order) if name in found]


def _left(run: Run, place: Path) -> Optional[Left]:
    try:
        return Left(place.name, str(Path(run.out_dir) / place.name), read_json(place / "litfreeze.json"))
    except UsageError:  # it has just gone, for a newer one
        return None
