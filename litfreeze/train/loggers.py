"""Where the figures of a run go beside its CSV files: TensorBoard, Weights & Biases, MLflow.

Each is asked from a thread of its own (`Aside`): a server that is slow, away or broken can neither hold up a run nor
end it. What stands in metrics.csv and blocks.csv is whole in any case."""

import json
import math
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional, Protocol

from litfreeze.checkpoint.tensors import write_text
from litfreeze.errors import UsageError
from litfreeze.freeze.layers import format_layers
from litfreeze.json_file import read_json
from litfreeze.outputs import LOGGER
from litfreeze.train.args import LogArgs
from litfreeze.train.job import Job

PATIENCE = 30.0  # seconds that a finished run waits for what a logger has still to take
AWAY = 20.0  # seconds after which W&B's server is taken to be away
PROJECT = "litfreeze"
MOST = 1000  # metrics that MLflow takes at once
NEEDS = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}


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

        self.last = run.resumed_at
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
            told = f"W&B: {_short(error)} What it would get is kept: wandb sync {Path(self.run.dir).parent} sends it."
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
        if run.known:
            try:
                self.id = self.client.get_run(run.known).info.run_id
                self.client.update_run(self.id, status="RUNNING")
                return self.id, ""
            except MlflowException as error:
                told = f"MLflow: the run before is not there, so a new one goes on. ({_short(error)})"
        name = run.log.project or PROJECT
        experiment = self.client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment is not None else self.client.create_experiment(name)
        self.id = self.client.create_run(where, run_name=run.name).info.run_id
        self.client.log_batch(self.id, params=[Param(name, str(value)) for name, value in run.settings.items()])
        return self.id, told if run.known else ""

    def log(self, rows: Sequence[Row]) -> None:
        found = [self.metric(n, v, int(row.time * 1000), row.step) for row in rows for n, v in row.values.items()]
        for first in range(0, len(found), MOST):
            self.client.log_batch(self.id, metrics=found[first : first + MOST])
        self.last = rows[-1].step

    def close(self, summary: Mapping[str, float], failed: bool) -> None:
        if summary:
            self.log([Row(self.last, summary, time.time())])
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


class Aside:
    """A logger in a thread of its own. What goes wrong there is kept for `news`, once, and ends the logger alone."""

    def __init__(self, name: str, run: Run) -> None:
        self.name, self.run, self.logger = name, run, LOGGERS[name]()
        self.purges = name == "tensorboard"  # what it was told of later steps
        self.known = self.purges or run.known is not None  # it has what an earlier part told
        self.waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.told: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="litfreeze-log", daemon=True)
        self.thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step, all numbers."""
        self.waiting.put(Row(step, values, time.time()))

    def news(self) -> list[str]:
        """What the person has not been told yet."""
        found = []
        while not self.told.empty():
            found.append(self.told.get())
        return found

    def close(self, summary: Mapping[str, float], failed: bool, patience: float = PATIENCE) -> list[str]:
        """Waits, for so many seconds, until all is taken and closed. The last news."""
        self.waiting.put((summary, failed))
        self.thread.join(patience)
        late = f"{self.logger.title} has not taken all within {patience:g} s, and is left. metrics.csv has all."
        return [*self.news(), *([late] if self.thread.is_alive() else [])]

    def _work(self) -> None:
        try:
            known, told = self.logger.begin(self.run)
            if told:
                self.told.put(told)
            if known is not None:
                write_text(self.run.out_dir / LOGGER, json.dumps({"logger": self.name, "id": known}) + "\n")
            while True:
                rows = [self.waiting.get()]
                while not self.waiting.empty():
                    rows.append(self.waiting.get())
                end = None if isinstance(rows[-1], Row) else rows.pop()
                if rows:
                    self.logger.log(rows)
                if end is not None:
                    self.logger.close(*end)
                    return
        except Exception as error:
            self.told.put(f"{self.logger.title} takes no more of this run: {_short(error)} metrics.csv has all.")


def check_logger(job: Job) -> None:
    """Raises UsageError for options that do not go together, a package that is missing, nobody logged in."""
    name, log = job.logger_name, job.log
    given = [f"--log.{option} {value}" for option, value in vars(log).items() if value is not None]
    if given and name not in ("wandb", "mlflow") and not job.resume:  # which may name another logger than before
        raise UsageError(f"{given[0]} is for --logger_name wandb or mlflow. Name one, or leave it out.")
    if name == "mlflow" and log.group is not None and not job.resume:
        raise UsageError(f"--log.group {log.group}: MLflow has no groups; --log.project is its experiment.")
    if name in NEEDS and not all(map(find_spec, NEEDS[name])):
        raise UsageError(f"--logger_name {name} needs more packages: pip install 'litfreeze[{name}]'")
    if name == "wandb":
        _check_login()
    if name == "mlflow":
        _check_store()


def _check_login() -> None:
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    try:
        if wandb.login(prompt=False):
            return
    except wandb.errors.Error:  # nobody answers, or the key is refused: `begin` goes on without the network
        return
    raise UsageError(
        "--logger_name wandb: nobody is logged in to W&B. Run `wandb login`, set WANDB_API_KEY, or say "
        "WANDB_MODE=offline to keep the run in files."
    )


def _check_store() -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = mlflow.get_tracking_uri()
    if uri.startswith(("http://", "https://", "databricks")):
        return  # what is wrong there may be right again later
    try:
        mlflow.tracking.MlflowClient().search_experiments(max_results=1)
    except MlflowException as error:
        raise UsageError(f"--logger_name mlflow: its store cannot be used: {_short(error)}") from None


def open_logger(job: Job, out_dir: Path, resumed_at: int) -> Optional[Aside]:
    """The logger that a run asks for, if it asks for one; `auto` is TensorBoard where that is installed."""
    name = job.logger_name
    if name == "auto":
        name = "tensorboard" if find_spec("tensorboard") else "csv"
    if name not in LOGGERS:
        return None
    kept = out_dir / LOGGER
    before = read_json(kept) if resumed_at and kept.is_file() else {}
    known = before.get("id") if before.get("logger") == name else None
    facts = {"method": job.method, "layers": format_layers(job.plan.layers), "trained_parameters": job.plan.n_trained}
    return Aside(name, Run(out_dir, job.log, {**job.settings, **facts}, resumed_at, known))


def numbers(values: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """The finite numbers in `values`, those of mappings in it as `after/loss`."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{before}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            found[f"{before}{name}"] = value
    return found


def _short(error: Exception) -> str:
    """The first line of what it says, without the places that it names."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return text if text.endswith((".", "!")) else f"{text}."
