"""What a person watches while a run trains: a line or a bar, metrics.csv, TensorBoard."""

import csv
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Optional

from tqdm import tqdm

from litfreeze.train.outcome import Scores

COLUMNS = (
    "step", "epoch", "lr", "train_loss", "grad_norm", "tokens", "tokens_per_second", "seconds",
    "val_loss", "val_accuracy", "val_exact_match",
)  # fmt: skip


class Monitor:
    """Writes `metrics.csv` in `out_dir` (each row reaches the disk's cache at once), TensorBoard events where it is
    installed, and either a progress bar (on a terminal) or about twenty plain lines. Silent on ranks other than 0.

    A run that goes on after `resumed_at` steps keeps the rows up to there and writes on below them."""

    def __init__(self, out_dir: Path, max_steps: int, log_interval: int, rank: int, resumed_at: int = 0) -> None:
        self.rows: list[dict[str, Any]] = _rows_until(out_dir / "metrics.csv", resumed_at) if resumed_at else []
        self.active = rank == 0
        self.max_steps = max_steps
        self.log_interval = log_interval
        self.line_interval = max(log_interval, -(-max_steps // 20))
        self.bar: Optional[tqdm] = None
        self.has_bar = sys.stderr.isatty() and shutil.get_terminal_size((0, 0)).columns > 20
        self.csv = self.events = None
        if self.active:
            self.csv = (out_dir / "metrics.csv").open("w", newline="", encoding="utf-8")
            csv.DictWriter(self.csv, COLUMNS).writeheader()
            csv.DictWriter(self.csv, COLUMNS).writerows(self.rows)
            self.events = _tensorboard(out_dir, resumed_at)

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
        self._record(step=step, val_loss=scores.loss, val_accuracy=scores.accuracy, val_exact_match=scores.exact_match)
        self.say(f"step {step}: {scores.describe()}")

    def say(self, text: str) -> None:
        """A line to the person, above the bar if there is one. On rank 0 only."""
        if not self.active:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.csv is not None:
            self.csv.flush()
            os.fsync(self.csv.fileno())
            self.csv.close()
            self.csv = None
        if self.events is not None:
            self.events.close()
            self.events = None

    def _record(self, **row: Any) -> None:
        self.rows.append(row)
        csv.DictWriter(self.csv, COLUMNS).writerow(row)
        self.csv.flush()
        if self.events is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self.events.add_scalar(name, value, row["step"])


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of an earlier part of this run, numbers as numbers."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as lines:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]
    whole = ("step", "epoch", "tokens")
    rows = [{name: int(value) if name in whole else value for name, value in row.items()} for row in rows]
    return [row for row in rows if row["step"] <= step]


def _tensorboard(out_dir: Path, resumed_at: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out_dir / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
