"""What a run has written so far, for a page that looks again and again: its tables, and the end of its log.

The run writes at the same time, and may be killed in the middle of a line: only whole lines count."""

import csv
import io
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

POINTS = 600  # of a curve: more than a screen shows
LOG = 200_000  # bytes of a log's end


@dataclass
class Table:
    """A CSV file that grows. `rows` has what stands in it, numbers as numbers; empty cells are left out."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    _columns: list[str] = field(default_factory=list)
    _seen: tuple[int, int] = (0, 0)  # the file's own number, and how far it was read

    def look(self) -> bool:
        """Reads what is new. Whether something was; all of it is, if the file is another one, as after a resume."""
        try:
            with self.path.open("rb") as file:
                facts = os.fstat(file.fileno())
                number, at = self._seen
                if facts.st_ino != number or facts.st_size < at:
                    self.rows, self._columns, at = [], [], 0
                file.seek(at)
                new = file.read()
        except OSError:
            return False
        new = new[: new.rfind(b"\n") + 1]
        self._seen = (facts.st_ino, at + len(new))
        for cells in csv.reader(io.StringIO(new.decode("utf-8", "replace"))):
            if not self._columns:
                self._columns = cells
            elif len(cells) == len(self._columns):
                row = {name: _number(cell) for name, cell in zip(self._columns, cells, strict=True) if cell}
                self.rows.append(row)
        return bool(new)

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a column, thinned out to at most `POINTS`; what is not finite is left out."""
        points = [(row["step"], row[name]) for row in self.rows if _finite(row.get(name)) and _finite(row.get("step"))]
        if len(points) <= POINTS:
            return points
        return [points[round(i * (len(points) - 1) / (POINTS - 1))] for i in range(POINTS)]

    def last(self, name: str) -> Optional[float]:
        """The last value of a column."""
        return next((row[name] for row in reversed(self.rows) if name in row), None)


@dataclass(frozen=True)
class Progress:
    """How far a run is: `step` of `steps` (None: not known), tokens per second, seconds left."""

    step: int
    steps: Optional[int]
    loss: Optional[float]
    val_loss: Optional[float]
    tokens_per_second: Optional[float]
    left: Optional[float]


def progress(metrics: Table, steps: Optional[int]) -> Progress:
    """From what metrics.csv has so far."""
    step, seconds = int(metrics.last("step") or 0), metrics.last("seconds")
    left = seconds / step * (steps - step) if steps and step and seconds is not None else None
    speed = metrics.last("tokens_per_second")
    return Progress(step, steps, metrics.last("train_loss"), metrics.last("val_loss"), speed, left)


def last_looks(blocks: Table) -> dict[str, dict[str, float]]:
    """Of each part of the model the last row of blocks.csv."""
    return {str(row["part"]).removesuffix(".0"): row for row in blocks.rows if "part" in row and "drift" in row}


def end_of(log: Path) -> str:
    """The last `LOG` bytes of a log, from the beginning of a line."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return text if size <= LOG else text.partition("\n")[2]


def error_of(log: str) -> str:
    """What the run told of its failure."""
    lines = log.splitlines()
    at = max((i for i, line in enumerate(lines) if line.startswith("error: ")), default=None)
    return "" if at is None else " ".join(lines[at:]).removeprefix("error: ")


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)
