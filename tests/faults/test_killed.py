"""A run that is killed at any moment goes on, and ends as the run that nobody touched.

Runs are forked from a process that has imported everything, which makes each of them a second long. Moments are counted
in file operations inside the run's folder: every opening for writing, fsync, rename, removal and new folder, so that a
kill falls between any two of them; others are drawn from the clock."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from multiprocessing import shared_memory
from pathlib import Path

import pytest
from safetensors.torch import load_file

from litfreeze.__main__ import main
from litfreeze.checkpoint.verify import verify
from litfreeze.demo import TRAIN_FILE
from litfreeze.errors import UsageError

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["litfreeze.finetune.full", "litfreeze.train.run", "matplotlib.figure"])
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
WORDS = [
    "--train.max_steps", "5", "--train.global_batch_size", "4", "--train.micro_batch_size", "4", "--train.lr", "2e-3",
    "--train.save_interval", "1", "--train.watch_interval", "2", "--eval.interval", "2", "--eval.max_samples", "4",
    "--eval.max_new_tokens", "1", "--accelerator", "cpu", "--cache", "off", "--resume", "auto",
]  # fmt: skip
RUNS = {
    "full": ["finetune", "full", "--unfreeze", "0:11;3:10"],
    "lora": ["finetune", "lora", "--trainable_layers", "11", "--lora_targets", "q_proj,down_proj"],
}


def in_child(argv: list[str], folder: str, counter: str, at: int, fails: bool) -> None:
    """What a run does, which is killed before its file operation number `at` (0: never) or, with `fails`, is told there
    and from then on that the disk is full."""
    count = 0
    shared = shared_memory.SharedMemory(counter, track=False) if sys.version_info >= (3, 13) else None
    shared = shared or shared_memory.SharedMemory(counter)

    def operation() -> None:
        nonlocal count
        count += 1
        shared.buf[:8] = count.to_bytes(8, "little")
        if at and count == at and not fails:
            os.kill(os.getpid(), signal.SIGKILL)
        if at and count >= at and fails:
            raise OSError(28, "No space left on device")

    def hook(event: str, given: tuple) -> None:
        writes = event == "open" and isinstance(given[1], str) and set(given[1]) & set("wax+")
        if (writes or event in CHANGES) and str(given[0]).startswith(folder) and not (fails and event != "open"):
            operation()

    plain = os.fsync

    def fsync(descriptor: int) -> None:
        operation()
        plain(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)
    with Path(os.devnull).open("w", encoding="utf-8") as nobody, redirect_stdout(nobody), redirect_stderr(nobody):
        sys.exit(main(argv))


class Runs:
    """The run of `words`, in folders of its own."""

    def __init__(self, words: list[str], place: Path) -> None:
        self.words, self.place, self.counter = words, place, shared_memory.SharedMemory(create=True, size=8)
        self.twin = place / "twin"
        self.seconds = time.perf_counter()
        assert self.start(self.twin).exitcode == 0
        self.seconds = time.perf_counter() - self.seconds
        self.operations = int.from_bytes(self.counter.buf[:8], "little")

    def start(self, run_dir: Path, at: int = 0, after: float = 0.0, fails: bool = False):
        """One run, until its end or until it is killed."""
        argv = [*self.words, "--out_dir", str(run_dir)]
        process = FORKED.Process(target=in_child, args=(argv, str(run_dir), self.counter.name, at, fails))
        process.start()
        process.join(after or 120)
        if after:
            process.kill()
            process.join()
        return process

    def check(self, run_dir: Path) -> None:
        """It is as the twin: weights, logs, and what else is there."""
        ours, twins = (load_file(next((place / "final").glob("*.safetensors"))) for place in (run_dir, self.twin))
        assert set(ours) == set(twins) and all(ours[name].equal(twins[name]) for name in twins)
        for name in ("metrics.csv", "blocks.csv"):
            assert rows(run_dir / name) == rows(self.twin / name)
        known = [json.loads((place / "results.json").read_text()) for place in (run_dir, self.twin)]
        assert known[0]["after"] == known[1]["after"] and known[0]["best_loss"] == known[1]["best_loss"]
        names = [{path.name for path in place.iterdir()} - {".lock"} for place in (run_dir, self.twin)]
        # A kill in the very act of taking leave may leave its note, and what was to be removed
        assert names[0] - {".running", ".resume.gone"} == names[1]


def rows(path: Path) -> list[str]:
    """Without the columns of times."""
    lines = [line.split(",") for line in path.read_text().splitlines()]
    timed = [i for i, name in enumerate(lines[0]) if name in ("seconds", "tokens_per_second")]
    return [",".join(cell for i, cell in enumerate(line) if i not in timed) for line in lines]


def nothing_is_half(run_dir: Path) -> None:
    """All that is listed is whole."""
    if run_dir.is_dir():
        with suppress(UsageError):  # nothing was kept yet
            assert not [verdict for verdict in verify(run_dir) if verdict.fault]


@pytest.fixture(scope="module", params=RUNS)
def runs(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(f"killed-{request.param}")
    lines = TRAIN_FILE.read_text(encoding="utf-8").splitlines()[:16]
    (place / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = Runs([*RUNS[request.param], *WORDS, "--data", str(place / "records.jsonl")], place)
    yield found
    found.counter.unlink()


def go_on(runs: Runs, run_dir: Path) -> None:
    """The same command again, until it is done."""
    ended = runs.start(run_dir)
    assert ended.exitcode == 0 or (ended.exitcode == 2 and (run_dir / "final").is_dir())  # 2: it was finished already
    runs.check(run_dir)


def draws(count: int, each: int) -> list:
    """0 … count-1; CI has time for one in `each`, `pytest -m matrix` for the others."""
    return [pytest.param(draw, marks=pytest.mark.matrix if draw % each else ()) for draw in range(count)]


@pytest.mark.parametrize("draw", draws(20, 5))
def test_killed_between_two_file_operations(runs, draw):
    """A moment in each twentieth of the run; every other time the next attempt is killed too."""
    chance, run_dir = random.Random(draw), runs.place / f"between-{draw}"
    killed = runs.start(run_dir, at=1 + int(runs.operations / 20 * (draw + chance.random())))
    assert killed.exitcode == -signal.SIGKILL
    nothing_is_half(run_dir)
    if draw % 2:
        runs.start(run_dir, at=chance.randrange(1, runs.operations))
        nothing_is_half(run_dir)
    go_on(runs, run_dir)
    shutil.rmtree(run_dir)


@pytest.mark.parametrize("draw", draws(6, 3))
def test_killed_by_the_clock(runs, draw):
    run_dir = runs.place / f"clock-{draw}"
    assert runs.start(run_dir, after=runs.seconds * (draw + random.Random(draw).random()) / 6).exitcode in (-9, 0)
    nothing_is_half(run_dir)
    go_on(runs, run_dir)
    shutil.rmtree(run_dir)


@pytest.mark.parametrize("draw", draws(6, 3))
def test_a_disk_that_fills_up(runs, draw):
    """What cannot be kept on the way is told and left; a run without a final checkpoint fails, and can go on."""
    run_dir = runs.place / f"full-{draw}"
    full = runs.start(run_dir, at=1 + int(runs.operations / 6 * (draw + random.Random(draw).random())), fails=True)
    assert full.exitcode in (0, 1)
    nothing_is_half(run_dir)
    go_on(runs, run_dir)
    shutil.rmtree(run_dir)
