"""A logger beside a run, in a thread of its own: a server that is slow, away or broken can neither hold up the run nor
end it. What stands in metrics.csv and blocks.csv is whole in any case."""

import json
import math
import queue
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

from litfreeze.errors import UsageError
from litfreeze.freeze.layers import format_layers
from litfreeze.json_file import read_json
from litfreeze.outputs import LOGGER
from litfreeze.train.job import Job
from litfreeze.train.loggers import LOGGERS, PATIENCE, Row, Run, short
from litfreeze.whole import write_text

NEEDS = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}


class Aside:
    """A logger in a thread of its own. What goes wrong there is kept for `news`, once, and ends the logger alone."""

    def __init__(self, name: str, run: Run) -> None:
        self.name, self.run, self.logger = name, run, LOGGERS[name]()
        # The step up to which it has what an earlier part of the run told. TensorBoard drops what came behind the point
        # to go on from, MLflow is asked; W&B cannot be, and lacks what a killed process had not written yet
        known = math.inf if name == "wandb" and run.known is not None else -1
        self.has_until = run.resumed_at if name == "tensorboard" else known
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
            self.told.put(f"{self.logger.title} takes no more of this run: {short(error)} metrics.csv has all.")


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
        raise UsageError(f"--logger_name mlflow: its store cannot be used: {short(error)}") from None


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
