"""Runs on disk: each is the exact `litfreeze …` command in a session of its own, which outlives page and server.

A run has a folder under out/board: run.json (the words, where it writes, its process), log.txt. All else, and how it
stands, is read from its own folder (litfreeze/outputs.py) and from the system."""

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Optional

from litfreeze.errors import UsageError
from litfreeze.outputs import FINAL, RESULTS, RESUME, RUNS, kept_steps
from litfreeze.whole import write_text

STATE = Path("out/board")
State = Literal["running", "stopping", "done", "stopped", "failed"]
_children: list[subprocess.Popen] = []  # those of this server: whoever starts a process has to take leave of it


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: What the board keeps of it.
        words: The command behind `litfreeze` that began it.
        out_dir: Where the run writes, from the root.
        steps: How many it will make.
        layers: Blocks that train, as text.
        n_layer: How many blocks the model has.
        pid, born: The process, and when the system says that it began: a number alone may be another's by now.
        asked: How often it was asked to stop.
    """

    folder: Path
    words: list[str]
    out_dir: str
    steps: Optional[int]
    layers: str
    n_layer: int
    began: float
    pid: int
    born: str
    asked: int = 0

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def root(self) -> Path:
        return self.folder.parents[len(STATE.parts)]

    @property
    def place(self) -> Path:
        """Where it writes."""
        return self.root / self.out_dir

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def alive(self) -> bool:
        return _born(self.pid) == self.born

    @property
    def state(self) -> State:
        """How it stands."""
        if self.alive:
            return "stopping" if self.asked else "running"
        if (self.place / RESULTS).is_file() and (self.place / FINAL).is_dir() and not (self.place / RESUME).is_dir():
            return "done"
        return "stopped" if self.resumable or self.asked else "failed"

    @property
    def resumable(self) -> bool:
        """Whether it left a point to go on from."""
        return bool(kept_steps(self.place / RESUME))

    @property
    def method(self) -> str:
        """finetune full or finetune lora."""
        return " ".join(self.words[:2])

    def write(self) -> None:
        facts = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_text(self.folder / "run.json", json.dumps(facts, indent=2) + "\n")


def all_runs(root: Path) -> list[Run]:
    """Those started from this root, newest first."""
    found = (read_run(folder) for folder in (root / STATE).glob("[0-9]*"))
    return sorted((run for run in found if run is not None), key=lambda run: run.id, reverse=True)


def read_run(folder: Path) -> Optional[Run]:
    """What is known of the run with this folder; None if it is not there yet, or not readable."""
    try:
        return Run(folder=folder, **json.loads((folder / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def next_out_dir(root: Path, method: str) -> str:
    """out/finetune/full-3: the next that nobody has, a run that has not made its folder yet included."""
    taken = {run.out_dir for run in all_runs(root)}
    number = 1
    while True:
        place = RUNS / (method if number == 1 else f"{method}-{number}")
        if not (root / place).exists() and str(place) not in taken:
            return str(place)
        number += 1


def start(root: Path, words: Sequence[str], out_dir: str, steps: Optional[int], layers: str, n_layer: int) -> Run:
    """Starts `litfreeze WORDS`, which write to `out_dir`, in `root`."""
    number = 1 + max((int(run.id) for run in all_runs(root)), default=0)
    while True:
        folder = root / STATE / f"{number:04d}"
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # another has just begun, or never got further
            number += 1
    pid, born = _launch(root, words, folder / "log.txt")
    run = Run(folder, list(words), out_dir, steps, layers, n_layer, time.time(), pid, born)
    run.write()
    return run


def resume(run: Run) -> Run:
    """Goes on with a run that was stopped. Raises UsageError if it runs, or left nothing to go on from."""
    if run.alive:
        raise UsageError(f"{run.out_dir} is still running.")
    if not run.resumable:
        raise UsageError(f"{run.out_dir} has kept no point to go on from. Start it anew.")
    pid, born = _launch(run.root, [*run.words[:2], "--resume", run.out_dir], run.log)
    run = replace(run, pid=pid, born=born, asked=0)
    run.write()
    return run


def stop(run: Run) -> Run:
    """Asks a run to stop, as Ctrl-C does: it ends its step, keeps where it stands and says how to go on. Asked again,
    it leaves at once. Nothing happens to one that has ended."""
    if not run.alive:
        return run
    run = replace(run, asked=run.asked + 1)
    run.write()
    os.killpg(run.pid, signal.SIGINT)
    return run


@dataclass(frozen=True)
class Task:
    """A command that was run on what a run left: merge, diff or export. Its folder is the run's."""

    name: str
    words: list[str]
    pid: int
    born: str

    @property
    def alive(self) -> bool:
        return _born(self.pid) == self.born


def act(run: Run, name: str, words: Sequence[str]) -> None:
    """Runs `litfreeze WORDS` as the task `name`, logged beside the run. Raises UsageError if it is at it already."""
    if any(task.name == name and task.alive for task in tasks(run)):
        raise UsageError(f"{name} is running.")
    log = run.folder / f"{name}.log"
    log.write_bytes(b"")
    (run.folder / f"{name}.png").unlink(missing_ok=True)  # of the last time: diff replaces no file
    task = Task(name, list(words), *_launch(run.root, words, log))
    write_text(run.folder / f"{name}.task", json.dumps(asdict(task)))


def tasks(run: Run) -> list[Task]:
    """What was done with what a run left, the last first."""
    files = sorted(run.folder.glob("*.task"), key=lambda file: file.stat().st_mtime, reverse=True)
    return [Task(**json.loads(file.read_text(encoding="utf-8"))) for file in files]


def environment() -> dict[str, str]:
    """What a process of the board's is given: the command says everything, so no option stands in here, nor a token."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LITFREEZE_")}
    return {**kept, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}  # nothing is imported from where it runs


def command(words: Sequence[str]) -> list[str]:
    """`litfreeze WORDS`, by this Python."""
    return [sys.executable, "-m", "litfreeze", *words]


def _launch(root: Path, words: Sequence[str], log: Path) -> tuple[int, str]:
    with log.open("ab") as out:
        out.write(f"$ {shlex.join(['litfreeze', *words])}\n".encode())
        out.flush()
        child = subprocess.Popen(
            command(words),
            cwd=root,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _children.append(child)
    return child.pid, _born(child.pid)


def _born(pid: int) -> str:
    """When the process `pid` began, in the system's words; empty if there is none, or if it has ended."""
    _children[:] = [child for child in _children if child.poll() is None]
    if platform.system() != "Linux":
        asked = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
        state, _, began = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.partition(" ")
        return "" if state.startswith("Z") else began.strip()
    try:
        state, *facts = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    return "" if state in "ZX" else f"{boot} {facts[18]}"
