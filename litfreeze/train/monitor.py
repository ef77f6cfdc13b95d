"""What a person watches while a run trains: a line or a bar, metrics.csv, blocks.csv, and what a logger shows."""

import csv
import io
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Optional, Union

from tqdm import tqdm

from litfreeze.train.aside import Aside
from litfreeze.train.loggers import PATIENCE, numbers
from litfreeze.train.outcome import Scores
from litfreeze.train.watch import Seen
from litfreeze.whole import write_text

COLUMNS = (
    "step", "epoch", "lr", "train_loss", "grad_norm", "tokens", "tokens_per_second", "seconds",
    "val_loss", "val_accuracy", "val_exact_match", "val_macro_f1",
)  # fmt: skip


BLOCK_COLUMNS = tuple(field.name for field in fields(Seen))


class Table:
    """A CSV file of these columns that begins with `rows`."""

    def __init__(self, path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
        first = io.StringIO(newline="")
        table = csv.DictWriter(first, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(path, first.getvalue())  # at no moment is an earlier part's table gone
        self.file = path.open("a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, columns, lineterminator="\n")

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Rows that reach the disk's cache at once."""
        self.writer.writerows(rows)
        self.file.flush()

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


class Monitor:
    """Writes `metrics.csv` and `blocks.csv` in `out_dir` (each row reaches the disk's cache at once) and either a
    progress bar (on a terminal) or about twenty plain lines; and tells the `logger`, if there is one. Silent on ranks
    other than 0.

    A run that goes on after `resumed_at` steps, with that step's validation or with it still to come, keeps the rows
    up to there and writes on below them. A logger that had rows behind them before does not get them twice."""

    def __init__(
        self,
        out_dir: Path,
        max_steps: int,
        log_interval: int,
        rank: int,
        resumed_at: int = 0,
        validated: bool = True,
        logger: Optional[Aside] = None,
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self.seen: list[Seen] = []
        self.logger = logger
        self.logged: set[tuple[int, str]] = set()  # what the logger has from before
        self.summary: Mapping[str, Any] = {}
        if resumed_at:
            rows, looks = _rows_of(out_dir / "metrics.csv"), _rows_of(out_dir / "blocks.csv")
            if logger is not None:
                self.logged = {(row["step"], _kind(row)) for row in rows + looks if row["step"] <= logger.has_until}
            rows = [row for row in rows if row["step"] <= resumed_at]
            self.rows = [row for row in rows if validated or row["step"] < resumed_at or "val_loss" not in row]
            whole = (row for row in looks if row["step"] <= resumed_at and len(row) == len(BLOCK_COLUMNS))
            self.seen = [_as_seen(row) for row in whole]
        self.active = rank == 0
        self.max_steps = max_steps
        self.log_interval = log_interval
        self.line_interval = max(log_interval, -(-max_steps // 20))
        self.bar: Optional[tqdm] = None
        self.has_bar = sys.stderr.isatty() and shutil.get_terminal_size((0, 0)).columns > 20
        self.warned = over_fitting(self.rows) is not None
        self.metrics_csv = self.blocks_csv = None
        if self.active:
            self.metrics_csv = Table(out_dir / "metrics.csv", COLUMNS, self.rows)
            self.blocks_csv = Table(out_dir / "blocks.csv", BLOCK_COLUMNS, map(asdict, self.seen))

    def stepped(
        self, step: int, epoch: int, lr: float, loss: float, grad_norm: float, tokens: int, seconds: float
    ) -> None:
        """One optimizer step is done: `tokens` and `seconds` are totals."""
        speed = tokens / max(seconds, 1e-9)
        if not self.active:
            return
        if step % self.log_interval == 0 or step == self.max_steps:
            self._record(
                step=step, epoch=epoch, lr=lr, train_loss=loss, grad_norm=grad_norm, tokens=tokens,
                tokens_per_second=round(speed, 1), seconds=round(seconds, 3),
            )  # fmt: skip
        if self.has_bar:
            if self.bar is None:
                self.bar = tqdm(total=self.max_steps, initial=step - 1, unit="step", dynamic_ncols=True, leave=False)
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            self.bar.update(step - self.bar.n)
        elif step % self.line_interval == 0 or step == self.max_steps:
            left = _clock(seconds / step * (self.max_steps - step))
            self.say(
                f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}  loss {loss:.4f}  lr {lr:.2e}  "
                f"{speed:,.0f} tokens/s  {left} left"
            )

    def validated(self, step: int, scores: Scores) -> None:
        """A validation after `step` steps is done."""
        if not self.active:
            return
        self._record(
            step=step, val_loss=scores.loss, val_accuracy=scores.accuracy, val_exact_match=scores.exact_match,
            val_macro_f1=scores.macro_f1,
        )  # fmt: skip
        self.say(f"step {step}: {scores.describe()}")
        if not self.warned and (notice := over_fitting(self.rows)):
            self.warned = True
            self.say(notice)

    def watched(self, seen: list[Seen]) -> None:
        """What was seen of the parts of the model in one step."""
        if not self.active:
            return
        self.seen += seen
        self.blocks_csv.write(map(asdict, seen))
        places = {one: f"blocks/{one.part}" if isinstance(one.part, int) else one.part for one in seen}
        found = {f"{name}/{place}": getattr(one, name) for one, place in places.items() for name in BLOCK_COLUMNS[2:]}
        if seen:
            self._tell(seen[0].step, "blocks", found)

    def flush(self) -> None:
        """What was written so far is on the disk: a point to go on from is worth no more than the rows before it."""
        for table in (self.metrics_csv, self.blocks_csv):
            if table is not None:
                os.fsync(table.file.fileno())

    def say(self, text: str) -> None:
        """A line to the person, above the bar if there is one. On rank 0 only."""
        if not self.active:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self, failed: bool = False, patience: float = PATIENCE) -> None:
        """Ends the bar, the files and the logger, which gets `summary` and so many seconds to take it all."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        for file in (self.metrics_csv, self.blocks_csv):
            if file is not None:
                file.close()
        self.metrics_csv = self.blocks_csv = None
        if self.logger is not None:
            self._say_all(self.logger.close(numbers(self.summary), failed, patience))
            self.logger = None

    def _record(self, **row: Any) -> None:
        self.rows.append(row)
        self.metrics_csv.write([row])
        self._tell(row["step"], _kind(row), {name: value for name, value in row.items() if name != "step"})

    def _tell(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Figures for the logger, unless it has them, and what there is to tell of it."""
        if self.logger is not None:
            if (step, kind) not in self.logged:
                self.logger.log(step, {name: value for name, value in values.items() if value is not None})
            self._say_all(self.logger.news())

    def _say_all(self, news: Iterable[str]) -> None:
        for told in news:
            self.say(f"Note      {told}")


def over_fitting(rows: Sequence[dict[str, Any]]) -> Optional[str]:
    """Whether the last two validations came out more than 1 % above the best one while the training loss went on
    falling, from the rows of metrics.csv: a notice, or None."""
    validated = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    trained = [(row["step"], row["train_loss"]) for row in rows if math.isfinite(row.get("train_loss", math.nan))]
    best_step, best = min(validated, key=lambda point: point[1], default=(0, 0.0))
    if best_step == 0 or len(validated) < 3 or min(loss for _, loss in validated[-2:]) <= 1.01 * best:
        return None
    since = [loss for step, loss in trained if step > best_step]
    until = [loss for step, loss in trained if step <= best_step][-len(since) :]
    if not since or not until or sum(since) / len(since) >= sum(until) / len(until):
        return None
    return (
        f"Over-fitting: since step {best_step} the training loss falls on, and the validation loss rose from "
        f"{best:.4f} to {validated[-1][1]:.4f}. --eval.patience ends such a run, --eval.save_best keeps its best."
    )


def _kind(row: Mapping[str, Any]) -> str:
    """Of what a row of one of the tables tells: a step may have one of each."""
    if "part" in row:
        return "blocks"
    return "validation" if row.get("val_loss") is not None else "training"


def _rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier part of this run, numbers as numbers."""
    if not path.is_file():
        return []
    whole_lines = path.read_text(encoding="utf-8").rpartition("\n")[0]  # a kill may have cut the last one short
    with io.StringIO(whole_lines) as lines:
        rows = [{name: _number(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]
    whole = ("step", "epoch", "tokens")
    return [{name: int(value) if name in whole else value for name, value in row.items()} for row in rows]


def _number(text: str) -> Union[float, str]:
    try:
        return float(text)
    except ValueError:
        return text


def _as_seen(row: dict[str, Any]) -> Seen:
    part = row["part"]
    return Seen(**{**row, "part": part if isinstance(part, str) else int(part)})


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
