"""What lies between two checkpoints of one shape, however they are stored: tensor by tensor, never a whole model.

    compare(A, B) ─ a Change for every tensor ─ added up per module and per block ─ table, summary, to_json

Every weight of both is read: a hash on record would prove what was once written, a comparison what is there."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Optional

import torch
from torch import Tensor

from litfreeze.aligned import aligned
from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.merge import fold
from litfreeze.checkpoint.tensors import pieces
from litfreeze.config import Config
from litfreeze.errors import UsageError, did_you_mean
from litfreeze.freeze.layers import GRAMMAR, WORDS, Spec, format_layers, parse_layers
from litfreeze.freeze.plan import EXTRAS, Part, part_of
from litfreeze.model import meta_parameters

STRETCH = 2**20  # elements in work at once: 8 MiB for each copy in fp64
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
HEAD = "head.weight"
NO_MATTER = ("tie_embeddings", "initializer_range")  # of a config, once a tied head is compared as the embedding


# --- one tensor ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """From A to B, in one tensor or in several added up.

    An element has changed if its bits differ once both sides are in the wider of their dtypes: -0.0 is not 0.0, and a
    NaN equals itself. Sums are in fp64; NaN and infinity are counted, and stay in the figures they get into."""

    tensors: int = 0
    tensors_changed: int = 0
    elements: int = 0
    elements_changed: int = 0
    squares: float = 0.0  # Σ A²
    delta_squares: float = 0.0  # Σ (B - A)², of the changed elements
    largest: float = 0.0  # max |B - A|
    not_finite: tuple[int, int] = (0, 0)  # elements that are NaN or infinite in A, in B
    dtypes: frozenset[tuple[str, str]] = frozenset()  # in A, in B

    def __add__(self, other: "Change") -> "Change":
        return Change(
            self.tensors + other.tensors,
            self.tensors_changed + other.tensors_changed,
            self.elements + other.elements,
            self.elements_changed + other.elements_changed,
            self.squares + other.squares,
            self.delta_squares + other.delta_squares,
            self.largest if self.largest > other.largest or math.isnan(self.largest) else other.largest,
            (self.not_finite[0] + other.not_finite[0], self.not_finite[1] + other.not_finite[1]),
            self.dtypes | other.dtypes,
        )

    @property
    def state(self) -> str:
        """'identical' to the bit, 'equal values' in another dtype, or 'changed'."""
        if self.elements_changed:
            return "changed"
        return "identical" if all(a == b for a, b in self.dtypes) else "equal values"

    @property
    def relative(self) -> float:
        """‖B - A‖ / ‖A‖ (Frobenius); infinite if A is zero and B is not."""
        if self.delta_squares == 0:
            return 0.0
        return math.sqrt(self.delta_squares / self.squares) if self.squares else math.inf

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN and no infinity: they become null, and `not_finite` counts the elements."""
        figures = {
            "relative_change": self.relative,
            "largest_change": self.largest,
            "norm_of_change": math.sqrt(self.delta_squares),
            "norm": math.sqrt(self.squares),
        }
        return {
            "state": self.state,
            "tensors": self.tensors,
            "tensors_changed": self.tensors_changed,
            "elements": self.elements,
            "elements_changed": self.elements_changed,
            **{name: value if math.isfinite(value) else None for name, value in figures.items()},
            "not_finite": list(self.not_finite),
            "dtypes": [list(pair) for pair in sorted(self.dtypes)],
        }


def measure(a: Tensor, b: Tensor) -> Change:
    """The change from `a` to `b`, tensors of one shape, (n,) or (n, in). Holds some rows of each, and no whole copy."""
    wide = torch.promote_types(a.dtype, b.dtype)
    found = Change()
    for rows_a, rows_b in zip(pieces(a, wide), pieces(b, wide), strict=True):
        stretches = zip(rows_a.view(wide).split(STRETCH), rows_b.view(wide).split(STRETCH), strict=True)
        found = sum((_measure_stretch(x, y) for x, y in stretches), found)
    dtypes = frozenset([tuple(str(tensor.dtype).removeprefix("torch.") for tensor in (a, b))])
    return replace(found, tensors=1, tensors_changed=int(found.elements_changed > 0), dtypes=dtypes)


def _measure_stretch(a: Tensor, b: Tensor) -> Change:
    """Of `a` and `b`, (n,) of one dtype."""
    bits = BITS[a.dtype.itemsize]
    moved = a.view(bits) != b.view(bits)
    whole = a.double()
    delta = b[moved].double() - whole[moved]
    return Change(
        elements=len(a),
        elements_changed=len(delta),
        squares=whole.square().sum().item(),
        delta_squares=delta.square().sum().item(),
        largest=delta.abs().max().item() if len(delta) else 0.0,
        not_finite=(int((~a.isfinite()).sum()), int((~b.isfinite()).sum())),
    )


# --- one checkpoint --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """A checkpoint as what it computes: an adapter folded in, in fp32; every other weight as it is stored."""

    checkpoint: Checkpoint
    folded: Checkpoint  # the same, if it has no adapter

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Side":
        """Reads nothing yet."""
        return cls(checkpoint, fold([checkpoint], [1.0], dtype=torch.float32) if checkpoint.lora else checkpoint)

    @property
    def config(self) -> Config:
        """Of the model without an adapter."""
        return self.folded.config

    def read(self, name: str) -> Tensor:
        """The weight `name`; a tied head is the embedding."""
        name = "embed.weight" if name == "head.weight" and self.config.tie_embeddings else name
        lora = self.checkpoint.lora
        adapted = lora is not None and name.removesuffix(".weight") in lora.ranks
        return (self.folded if adapted else self.checkpoint).read(name)

    def describe(self) -> str:
        """Its path, and that an adapter is folded in."""
        lora = self.checkpoint.lora
        return f"{self.checkpoint.path}" + (f" ({lora.describe()}, folded in)" if lora else "")


# --- two of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints of one shape, and what changed from A to B in every weight, in the model's order."""

    a: Side
    b: Side
    changes: Mapping[str, Change]
    config_changes: Sequence[str]  # "rope.theta is 10000.0 in A and 500000.0 in B": one shape, another function
    expected: Optional[Sequence[Part]] = None  # nothing but these was to change

    @cached_property
    def modules(self) -> dict[Part, dict[str, Change]]:
        """Part by part, bottom to top, what changed in each of its modules: {10: {"norm_1": …, "q_proj": …}}."""
        found: dict[Part, dict[str, Change]] = {}
        for name, change in self.changes.items():
            inside, module = found.setdefault(part_of(name), {}), name.split(".")[-2]
            inside[module] = inside.get(module, Change()) + change
        return found

    @cached_property
    def parts(self) -> dict[Part, Change]:
        """What changed in each part."""
        return {part: sum(inside.values(), Change()) for part, inside in self.modules.items()}

    @property
    def whole(self) -> Change:
        """What changed in the model."""
        return sum(self.parts.values(), Change())

    @property
    def changed(self) -> list[Part]:
        """The parts in which something changed."""
        return [part for part, change in self.parts.items() if change.tensors_changed]

    @property
    def unexpected(self) -> str:
        """What changed beside what was to change, in a line; empty if nothing did."""
        if self.expected is None:
            return ""
        told = []
        if others := [part for part in self.changed if part not in self.expected]:
            first = next(n for n, c in self.changes.items() if c.tensors_changed and part_of(n) in others)
            count = sum(self.parts[part].tensors_changed for part in others)
            told.append(f"{_describe(others)} ({_tensors(count)}, such as {first})")
        if self.config_changes:
            told.append(f"the config ({'; '.join(self.config_changes)})")
        return f"changed, and not expected to: {' and '.join(told)}." if told else ""

    def summary(self) -> str:
        """What changed and what did not, in one line, and one for each thing more that a person should know."""
        states = [change.state for change in self.changes.values()]
        same, equal = states.count("identical"), states.count("equal values")
        changed = f"{_describe(self.changed)} changed ({_tensors(self.whole.tensors_changed)})"
        told = [changed if self.changed else "nothing changed"]
        if same:
            told.append(f"{_tensors(same)} {'is' if same == 1 else 'are'} bit-identical")
        if equal:
            pairs = {pair for c in self.changes.values() if c.state == "equal values" for pair in c.dtypes}
            dtypes = ", ".join(f"{a} in A, {b} in B" for a, b in sorted(pairs))
            told.append(f"{_tensors(equal)} {'has' if equal == 1 else 'have'} equal values ({dtypes})")
        lines = ["; ".join(told) + "."]
        if still := [part for part in self.expected or () if part not in self.changed]:
            lines.append(f"expected to change, and did not: {_describe(still)}.")
        if any(counts := self.whole.not_finite):
            first = next(name for name, change in self.changes.items() if any(change.not_finite))
            lines.append(f"NaN or infinite: {counts[0]:,} elements of A, {counts[1]:,} of B, first in {first}.")
        if self.config_changes:
            lines.append(f"the config changed too: {'; '.join(self.config_changes)}.")
        return "\n".join(lines)

    def table(self) -> str:
        """Bottom to top; neighbouring blocks in which nothing changed share a row."""
        runs: list[list[Part]] = []
        for part in self.parts:
            if runs and self._alike(runs[-1][-1], part):
                runs[-1].append(part)
            else:
                runs.append([part])
        head = ("", "changed", "‖ΔW‖/‖W‖", "largest |Δ|", "elements", "by module")
        cells = [head, *(self._row(run) for run in runs)]
        return "\n".join(aligned(cells, "<<>>><"))

    def to_json(self) -> str:
        """Every figure, of the model, of each part and of each tensor. `relative_change` and `largest_change` are null
        where they are NaN or infinite."""
        parts = {_name(part): change.to_dict() for part, change in self.parts.items()}
        for part, inside in self.modules.items():
            parts[_name(part)]["modules"] = {module: change.to_dict() for module, change in inside.items()}
        content = {
            "a": str(self.a.checkpoint.path),
            "b": str(self.b.checkpoint.path),
            "changed": [_name(part) for part in self.changed],
            "expected": None if self.expected is None else [_name(part) for part in self.expected],
            "unexpected": self.unexpected,
            "config_changes": list(self.config_changes),
            "whole": self.whole.to_dict(),
            "parts": parts,
            "tensors": {name: change.to_dict() for name, change in self.changes.items()},
        }
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def _alike(self, low: Part, high: Part) -> bool:
        """Whether two neighbours share a row."""
        blocks = isinstance(low, int) and isinstance(high, int)
        return blocks and self.parts[low].state == self.parts[high].state != "changed"

    def _row(self, run: Sequence[Part]) -> tuple[str, ...]:
        change, label = sum((self.parts[part] for part in run), Change()), str(run[0])
        if isinstance(run[0], int):
            label = f"block {run[0]}" if len(run) == 1 else f"blocks {run[0]}-{run[-1]}"
        elif run[0] == "embed" and self.a.config.tie_embeddings and self.b.config.tie_embeddings:
            label = "embed (also the head)"
        elif run[0] == "head" and self.a.config.tie_embeddings != self.b.config.tie_embeddings:
            label = f"head (embed in {'A' if self.a.config.tie_embeddings else 'B'})"
        if change.state != "changed":
            return label, change.state, "", "", "", ""
        inside = self.modules[run[0]]
        moved = {module: c.relative for module, c in inside.items() if c.tensors_changed}
        most = sorted(moved, key=lambda module: math.inf if math.isnan(moved[module]) else moved[module], reverse=True)
        by_module = ", ".join(f"{module} {_short(moved[module])}" for module in most[:2])
        return (
            label,
            f"{change.tensors_changed} of {change.tensors}",
            _short(change.relative),
            _short(change.largest),
            f"{100 * change.elements_changed / change.elements:.3g} %",
            (by_module + f" and {len(most) - 2} more" * (len(most) > 2)) if len(inside) > 1 else "",
        )


def compare(a: Checkpoint, b: Checkpoint, expect_only: Optional[Spec] = None) -> Comparison:
    """Compares every weight of `a` and `b`, reading one tensor of each at a time.

    `expect_only` names what may have changed, for `Comparison.unexpected`. Raises UsageError for words it does not
    understand and, telling what differs, unless both have one shape. Heads for different classes, or for classes and
    for language, are left out: they are a difference of the configs."""
    side_a, side_b = Side.of(a), Side.of(b)
    tied = side_a.config.tie_embeddings and side_b.config.tie_embeddings
    configs = [replace(side.config, tie_embeddings=tied) for side in (side_a, side_b)]
    differences = _differences(*configs)
    others = {HEAD} if configs[0].labels != configs[1].labels else set()
    shapes = [{n: p.shape for n, p in meta_parameters(config).items() if n not in others} for config in configs]
    if shapes[0] != shapes[1]:
        raise UsageError(f"{a.path} and {b.path} have different shapes: {'; '.join(differences[:3])}.")
    expected = None if expect_only is None else _expected_parts(expect_only, configs[0])
    if others and "head" in (expected or ()):
        expected = [part for part in expected if part != "head"]
        differences = _differences(*(replace(config, labels=()) for config in configs))
    changes = {name: measure(side_a.read(name), side_b.read(name)) for name in shapes[0]}
    return Comparison(side_a, side_b, changes, differences, expected)


def _expected_parts(spec: Spec, config: Config) -> list[Part]:
    """The parts that `spec` names: blocks in the words of `parse_layers`, and among them embed, head, final_norm."""
    words: list[Any] = []
    for item in [spec] if isinstance(spec, str) or not isinstance(spec, Iterable) else spec:
        words += [word.strip() for word in item.split(",")] if isinstance(item, str) else [item]
    extras, layers = [w for w in words if w in EXTRAS], [w for w in words if w not in EXTRAS]
    for word in layers:
        if re.fullmatch("[A-Za-z_]+", str(word)) and word not in WORDS:
            raise UsageError(
                f"--expect_only {word!r} is unknown.{did_you_mean(word, (*WORDS, *EXTRAS))} "
                f"Choose from {', '.join(EXTRAS)} and blocks: {GRAMMAR}."
            )
    if extras and "none" in layers:
        raise UsageError("--expect_only: 'none' stands alone.")
    if config.tie_embeddings and "head" in extras and "embed" not in extras:
        raise UsageError("--expect_only head: in both models the head is the embedding, one tensor. Say embed.")
    blocks = parse_layers(layers if layers or not extras else "none", config.n_layer, "expect_only", config.new_blocks)
    return [*blocks, *(w for w in EXTRAS if w in extras and not (w == "head" and config.tie_embeddings))]


def _differences(a: Any, b: Any, within: str = "") -> list[str]:
    """Field by field, between two configs or what stands in them: "n_layer is 12 in A and 30 in B"."""
    found = []
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if x == y or field.name in NO_MATTER:
            continue
        if is_dataclass(x) and is_dataclass(y):
            found += _differences(x, y, f"{field.name}.")
        elif field.name == "labels" and len(x) != len(y):  # a language model has none
            found.append(f"the head has {len(x) or 'no'} classes in A and {len(y) or 'none'} in B")
        elif isinstance(x, tuple):  # block by block; the first says enough
            pairs = enumerate(zip(x, y, strict=False))
            found += [f"{field.name}[{i}] is {v} in A and {w} in B" for i, (v, w) in pairs if v != w][:1]
        else:
            found.append(f"{within}{field.name} is {str(x)[:40]} in A and {str(y)[:40]} in B")
    return found


def _name(part: Part) -> str:
    """As the weights' names begin."""
    return f"blocks.{part}" if isinstance(part, int) else part


def _describe(parts: Sequence[Part]) -> str:
    """'blocks 10,11 + head'."""
    blocks = [part for part in parts if isinstance(part, int)]
    named = [f"block{'s' * (len(blocks) > 1)} {format_layers(blocks)}"] if blocks else []
    return " + ".join(named + [part for part in parts if isinstance(part, str)])


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count != 1)}"


def _short(x: float) -> str:
    """2.1e-3, inf, nan."""
    return re.sub("e([-+])0", r"e\1", f"{x:.1e}")
