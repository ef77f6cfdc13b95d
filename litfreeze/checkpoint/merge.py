"""Folding what trained into the base: fp32 arithmetic, one rounding, a few rows at a time.

    W + Σ weight · (W as each checkpoint has it - W)

where "as a checkpoint has it" is the base's weight or the one in its place, with the adapter folded in."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.open import identity
from litfreeze.checkpoint.write import stored_as, write_checkpoint
from litfreeze.errors import UsageError
from litfreeze.lora import MAGNITUDE, A, B, folded, model_parameters

HEAD = "head.weight"
ROWS_BYTES = 16 * 1024**2  # of fp32 weights in work at once


@dataclass
class Rounding:
    """What rounding to the stored dtype did to the change Δ, over the weights that were to move.

    `wanted` and `lost` are sums of squares: of Δ, and of what is missing from it. `moving` counts weights with a Δ,
    `stuck` those that rounded back to where they were."""

    wanted: float = 0.0
    lost: float = 0.0
    moving: int = 0
    stuck: int = 0

    def add(self, before: Tensor, exact: Tensor, rounded: Tensor) -> None:
        """Some rows more, (n, in) each: fp32, fp32, and as they are stored."""
        moved, kept = exact != before, rounded.float()
        self.wanted += torch.linalg.vector_norm(exact - before).item() ** 2
        self.lost += torch.linalg.vector_norm(kept - exact).item() ** 2
        self.moving += int(torch.count_nonzero(moved))
        self.stuck += int(torch.count_nonzero(moved & (kept == before)))

    @property
    def error(self) -> float:
        """‖rounded Δ - Δ‖ / ‖Δ‖."""
        return (self.lost / self.wanted) ** 0.5 if self.wanted else 0.0

    @property
    def stuck_share(self) -> float:
        """The share of the weights that were to move and did not."""
        return self.stuck / self.moving if self.moving else 0.0

    def describe(self, merged: Checkpoint) -> str:
        """'Rounding to bfloat16 left …', in one line."""
        stored = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in merged.dtypes.values()}))
        return (
            f"Rounding to {stored} left a relative error of {100 * self.error:.2g} % in the change; "
            f"{100 * self.stuck_share:.2g} % of the {self.moving:,} weights it moves stayed where they were."
        )


class FoldedTensors(Mapping):
    """The tensors of `checkpoints`, which stand over the same base, folded when they are read. `rounding` grows as
    tensors are read."""

    def __init__(
        self, checkpoints: Sequence[Checkpoint], weights: Sequence[float], dtypes: Mapping[str, torch.dtype]
    ) -> None:
        self.parts = list(zip(checkpoints, weights, strict=True))
        self.base = checkpoints[0].whole
        self.dtypes = dtypes
        self.rounding = Rounding()

    def __iter__(self) -> Iterator[str]:
        return iter(self.dtypes)

    def __len__(self) -> int:
        return len(self.dtypes)

    def __contains__(self, name: object) -> bool:
        return name in self.dtypes  # Mapping's own would fold the tensor

    def __getitem__(self, name: str) -> Tensor:
        before = self._before(name)
        module = name.rpartition(".")[0] if name.endswith(".weight") else ""
        adapted = [part for part in self.parts if part[0].lora is not None and module in part[0].lora.ranks]
        changed = [part for part in self.parts if part in adapted or name in part[0].replaced]
        if not changed:
            return before.to(self.dtypes[name])
        if len(changed) == 1 and not adapted and changed[0][1] == 1:
            return self._counted(before, changed[0][0].read(name), self.dtypes[name])
        return self._fold(name, module, before, changed)

    def _before(self, name: str) -> Tensor:
        """The base's weight. Where the base is a language model under a classifier, its head counts as zeros."""
        first = self.parts[0][0]
        if name == HEAD and _has_new_head(first):
            return torch.zeros(first.config.n_outputs, first.config.n_embd, dtype=first.dtype(name))
        return self.base.read(name)

    def _fold(self, name: str, module: str, before: Tensor, changed: list[tuple[Checkpoint, float]]) -> Tensor:
        rounded = torch.empty(before.shape, dtype=self.dtypes[name])
        step = max(1, ROWS_BYTES // max(1, 4 * before[:1].numel()))
        for start in range(0, len(before), step):
            rows = slice(start, start + step)
            old = before[rows].float()  # (n, in)
            if len(changed) == 1 and changed[0][1] == 1:
                exact = _own_rows(changed[0][0], name, module, rows)
            else:
                exact = old.clone()
                for checkpoint, weight in changed:
                    exact.add_(_own_rows(checkpoint, name, module, rows) - old, alpha=weight)
            rounded[rows] = exact.to(rounded.dtype)
            self.rounding.add(old, exact, rounded[rows])
        return rounded

    def _counted(self, before: Tensor, after: Tensor, dtype: torch.dtype) -> Tensor:
        """A weight that trained itself: it was rounded when it was saved, and is stored in `dtype`."""
        rounded = after.to(dtype)
        step = max(1, ROWS_BYTES // max(1, 4 * before[:1].numel()))
        for start in range(0, len(before), step):
            rows = slice(start, start + step)
            self.rounding.add(before[rows].float(), after[rows].float(), rounded[rows])
        return rounded


def _has_new_head(checkpoint: Checkpoint) -> bool:
    """Whether it is a classifier over a language model."""
    return bool(checkpoint.config.labels) and not checkpoint.whole.config.labels


def _own_rows(checkpoint: Checkpoint, name: str, module: str, rows: slice) -> Tensor:
    """Some rows of the weight as `checkpoint` has it, its adapter folded in: (n, in) fp32."""
    weight, lora = checkpoint.read(name)[rows], checkpoint.lora
    if lora is None or module not in lora.ranks:
        return weight.float()
    magnitude = checkpoint.read(f"{module}.{MAGNITUDE}")[rows] if lora.dora else None
    a, b = checkpoint.read(f"{module}.{A}"), checkpoint.read(f"{module}.{B}")[rows]
    return folded(weight, a, b, lora.scale(module), magnitude)


def fold(
    checkpoints: Sequence[Checkpoint], weights: Optional[Sequence[float]] = None, dtype: Optional[torch.dtype] = None
) -> Checkpoint:
    """A whole checkpoint that does what `checkpoints` together do to their base, each with its weight (by default 1).

    Its tensors are folded when they are read, and rounded once to `dtype` or to the base's; `tensors.rounding` says
    what that did. An adapter on a tied head gives the head weights of its own. Raises UsageError unless all stand
    over the same base."""
    first, *others = checkpoints
    weights = [1.0] * len(checkpoints) if weights is None else list(weights)
    for other in others:
        if other.whole.weights_hash != first.whole.weights_hash:
            raise UsageError(f"{other.path} was trained over another base than {first.path}: they cannot be merged.")
        if other.config.tie_embeddings != first.config.tie_embeddings:
            raise UsageError(f"Of {first.path} and {other.path} one has untied its head: they cannot be merged.")
        if other.config.labels != first.config.labels:
            raise UsageError(f"{first.path} and {other.path} do not know the same classes: they cannot be merged.")
    adapts_head = any(checkpoint.lora is not None and "head" in checkpoint.lora.ranks for checkpoint in checkpoints)
    if adapts_head and first.config.tie_embeddings:
        checkpoints = [checkpoint.untied() for checkpoint in checkpoints]
        first = checkpoints[0]
    names = model_parameters(first.config)
    own = {HEAD} if _has_new_head(first) else ()
    dtypes = {name: dtype or (first if name in own else first.whole).dtype(name) for name in names}
    tensors = FoldedTensors(checkpoints, weights, dtypes)
    made = {"tensors": tensors, "dtypes": dtypes, "base": None, "lora": None, "aliases": {}}
    return replace(first, **made, manifest=first.without_hashes())


def write_merged(out_dir: Path, merged: Checkpoint) -> Rounding:
    """Writes what `fold` gave as a checkpoint of its own, and says what rounding did to it."""
    parts = [part for part, _ in merged.tensors.parts]
    manifest = {
        "kind": "merged",
        "merged": [{"path": str(part.path.resolve()), "weights_hash": part.weights_hash} for part in parts],
        "base": identity(parts[0].whole, Path(out_dir)),
        "prompt": merged.prompt,
        "history": merged.history,
    }
    layout = merged.layout()
    config = merged.hf_config
    stored = {dtype for dtype, _ in layout.values()}
    if len(stored) == 1:
        config = stored_as(config, stored.pop())
    write_checkpoint(out_dir, config, layout, merged.read, manifest, merged.tokenizer_dir)
    return merged.tensors.rounding
