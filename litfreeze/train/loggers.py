"""Where the figures of a run go beside its CSV files: TensorBoard, Weights & Biases, MLflow."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Protocol

from litfreeze.train.args import LogArgs

PATIENCE = 30.0  # seconds that a finished run waits for what a logger has still to take
AWAY = 20.0  # seconds after which W&B's server is taken to be away
PROJECT = "litfreeze"
MOST = 1000  # metrics that MLflow takes at once


@dataclass(frozen=True)
class Run:
    """What a logger is told of a run before its first step.

    Attributes:
        settings: The options that were given, `{"train.lr": 1e-4}`, and some facts.
        resumed_at: The step after which it goes on, 0 if it begins.
        known: By which the logger knows the run from its first part, if it does.
    """

    out_dir: Path
    log: LogArgs
    settings: Mapping[str, Any]
    resumed_at: int
    known: Optional[str]

    @property
    def name(self) -> str:
        return self.log.run or self.out_dir.resolve().name


@dataclass(frozen=True)
class Row:
    """Figures of one step, and when they came, in seconds since 1970."""

    step: int
    values: Mapping[str, float]
    time: float


class Logger(Protocol):
    """What all of them can do; any method may raise anything. `title` is what a person calls it."""

    title: str

    def begin(self, run: Run) -> tuple[Optional[str], str]:
        """Opens the run. An id by which it can go on, and what to tell the person, which may be nothing."""

    def log(self, rows: Sequence[Row]) -> None:
        """Takes figures, in the order in which they came."""

    def close(self, summary: Mapping[str, float], failed: bool) -> None:
        """The run has ended, with these figures in the end if it did not fail."""


class TensorBoard:
    """Event files in the run's folder."""

    title = "TensorBoard"

    def begin(self, run: Run) -> tuple[Optional[str], str]:
        from torch.utils.tensorboard import SummaryWriter

        purge = run.resumed_at + 1 if run.resumed_at else None  # of later steps what an earlier part had written
        self.writer = SummaryWriter(str(run.out_dir / "tensorboard"), purge_step=purge)
        return None, ""

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            for name, value in row.values.items():
                self.writer.add_scalar(name, value, row.step, row.time)

    def close(self, summary: Mapping[str, float], failed: bool) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases: online or, if WANDB_MODE says so or nobody answers, in files that `wandb sync` sends.

    Rows have a `step` of their own, which is the axis of all charts: W&B's takes no earlier step, and a run that goes
    on may have one to tell."""

    title = "W&B"

    def begin(self, run: Run) -> tuple[Optional[str], str]:
        import wandb

        # Nothing of the machine but what is measured: no paths, command lines, packages, nor what is printed
        quiet = wandb.Settings(
            console="off", x_disable_meta=True, x_save_requirements=False, disable_git=True, disable_code=True,
            init_timeout=AWAY, finish_timeout=PATIENCE,
        )  # fmt: skip
        options = {
            "project": run.log.project or PROJECT, "name": run.name, "group": run.log.group, "dir": str(run.out_dir),
            "config": dict(run.settings), "settings": quiet, "reinit": "create_new",
        }  # fmt: skip
        if run.known:
            options |= {"id": run.known, "resume": "allow"}
        told = ""
        try:
            self.run = wandb.init(**options)
        except wandb.errors.Error as error:
            self.run = wandb.init(**options, mode="offline")
            told = f"W&B: {short(error)} What it would get is kept: wandb sync {Path(self.run.dir).parent} sends it."
        self.run.define_metric("*", step_metric="step")
        return self.run.id, told

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.run.log({"step": row.step, **row.values})

    def close(self, summary: Mapping[str, float], failed: bool) -> None:
        self.run.summary.update(dict(summary))
        self.run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or, without one, in mlflow.db where the command was typed."""

    title = "MLflow"

    def begin(self, run: Run) -> tuple[Optional[str], str]:
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self.client, self.metric, self.last = MlflowClient(), Metric, run.resumed_at
        self.had: dict[str, set[int]] = {}  # by metric: the steps told by an earlier part, which may have been killed
        self.resumed = False
        if run.known:
            try:
                self.id = self.client.get_run(run.known).info.run_id
                self.client.update_run(self.id, status="RUNNING")
                self.resumed = True
                return self.id, ""
            except MlflowException as error:
                told = f"MLflow: the run before is not there, so a new one goes on. ({short(error)})"
        name = run.log.project or PROJECT
        experiment = self.client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment is not None else self.client.create_experiment(name)
        self.id = self.client.create_run(where, run_name=run.name).info.run_id
        self.client.log_batch(self.id, params=[Param(name, str(value)) for name, value in run.settings.items()])
        return self.id, told if run.known else ""

    def log(self, rows: Sequence[Row]) -> None:
        told = [
            (name, value, row) for row in rows for name, value in row.values.items() if self._is_new(name, row.step)
        ]
        found = [self.metric(name, value, int(row.time * 1000), row.step) for name, value, row in told]
        for first in range(0, len(found), MOST):
            self.client.log_batch(self.id, metrics=found[first : first + MOST])
        self.last = rows[-1].step

    def _is_new(self, name: str, step: int) -> bool:
        if self.resumed and name not in self.had:
            self.had[name] = {one.step for one in self.client.get_metric_history(self.id, name)}
        return step not in self.had.get(name, ())

    def close(self, summary: Mapping[str, float], failed: bool) -> None:
        if summary:
            self.log([Row(self.last, summary, time.time())])
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def numbers(values: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """The finite numbers in `values`, those of mappings in it as `after/loss`."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{before}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            found[f"{before}{name}"] = value
    return found


def short(error: Exception) -> str:
    """The first line of what it says, without the places that it names."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return text if text.endswith((".", "!")) else f"{text}."
