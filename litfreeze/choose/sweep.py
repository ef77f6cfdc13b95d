"""Short runs of several choices of layers on one budget, side by side."""

import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from litfreeze.aligned import aligned
from litfreeze.errors import RunError, UsageError
from litfreeze.json_file import read_json
from litfreeze.outputs import RESULTS
from litfreeze.picture import save_picture
from litfreeze.sizes import megabytes
from litfreeze.whole import write_text

ALIKE = 0.02  # of what the best candidate gained: nearer than this is as good


@dataclass(frozen=True)
class Candidate:
    """One choice: a method and layers in the words of `--trainable_layers`."""

    words: str
    method: str
    layers: str

    @classmethod
    def parse(cls, words: str) -> "Candidate":
        """'lora:20%-80%' trains an adapter there, '20%-80%' the weights themselves. Raises UsageError if nothing would
        train."""
        if words.removeprefix("lora:").strip() in ("", "none"):
            raise UsageError(f"--candidates {words!r} trains no block. Name some, as in -2: or lora:all.")
        method = "lora" if words.startswith("lora:") else "full"
        return cls(words, method, words.removeprefix("lora:"))

    def folder(self, recipe: str, made_of: str) -> str:
        """A name for its run by all that decides what comes of it: the recipe, and a hash of the model and the data."""
        decides = hashlib.sha256(f"{recipe}\n{made_of}".encode()).hexdigest()
        return f"{re.sub('[^A-Za-z0-9]+', '_', self.words).strip('_')}-{decides[:8]}"


@dataclass(frozen=True)
class Tried:
    """What became of a candidate: `results` as its run wrote them, or why there are none."""

    candidate: Candidate
    run_dir: Path
    results: Optional[Mapping[str, Any]] = None
    failure: str = ""

    @property
    def loss(self) -> float:
        """The lowest validation loss."""
        return self.results["best_loss"]

    @property
    def seconds(self) -> float:
        """Of training alone."""
        return self.results["seconds"]

    def curve(self) -> list[tuple[float, float]]:
        """Validation loss over the seconds of training."""
        with (self.run_dir / "metrics.csv").open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        reached = {"0": 0.0} | {row["step"]: float(row["seconds"]) for row in rows if row["seconds"]}
        return [(reached[row["step"]], float(row["val_loss"])) for row in rows if row["val_loss"]]


def try_candidate(candidate: Candidate, run_dir: Path, recipe: str) -> Tried:
    """The run of `recipe` (YAML) in a process of its own, so that its memory is its own, logged in `run_dir`.log. What
    is finished is taken as it is; what is not begins anew."""
    recipe_file, results = run_dir.with_name(f"{run_dir.name}.yaml"), run_dir / RESULTS
    if results.is_file():
        return Tried(candidate, run_dir, read_json(results))
    shutil.rmtree(run_dir, ignore_errors=True)
    write_text(recipe_file, recipe)
    words = ["finetune", candidate.method, "--config", str(recipe_file), "--out_dir", str(run_dir)]
    with run_dir.with_name(f"{run_dir.name}.log").open("w", encoding="utf-8") as log:
        ended = subprocess.run(
            [sys.executable, "-m", "litfreeze", *words], stdout=log, stderr=subprocess.PIPE, text=True, check=False
        )
        log.write(ended.stderr)
    if ended.returncode or not results.is_file():
        told = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        return Tried(candidate, run_dir, failure=(told or ["ended without a result"])[-1].removeprefix("error: "))
    return Tried(candidate, run_dir, read_json(results))


def hash_of_files(paths: Sequence[Path]) -> str:
    """sha256 over the contents of data files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def table(tried: Sequence[Tried]) -> str:
    """Best first; those that failed below."""
    rows = [("candidate", "blocks", "trains", "val loss", "in seconds", "per step", "peak memory")]
    for one in sorted((one for one in tried if one.results), key=lambda one: one.loss):
        r = one.results
        each = f"{1000 * one.seconds / max(1, r['step']):,.0f} ms"
        share = f"{100 * r['trained_parameters'] / r['parameters']:.2g} %"
        memory = megabytes(r["peak_memory"])
        blocks = f"LoRA on {r['layers']}" if one.candidate.method == "lora" else r["layers"]
        rows.append((one.candidate.words, blocks, share, f"{one.loss:.4f}", f"{one.seconds:,.1f}", each, memory))
    failed = [f"{one.candidate.words}: failed. {one.failure}" for one in tried if not one.results]
    return "\n".join([*aligned(rows, "<<>>>>>"), *failed])


def recommend(tried: Sequence[Tried]) -> tuple[Tried, str]:
    """The cheapest candidate that is as good as the best one, and a sentence with the evidence. Raises RunError if none
    came to an end."""
    done = [one for one in tried if one.results]
    if not done:
        raise RunError(f"No candidate came to an end. The first one: {tried[0].failure}")
    best = min(done, key=lambda one: one.loss)
    began = best.results["before"]["loss"]
    enough = best.loss + ALIKE * max(0.0, began - best.loss)
    taken = min((one for one in done if one.loss <= enough), key=lambda one: one.seconds)
    steps = f"after {taken.results['best_step']} steps" if taken.results["best_step"] else "which is where it began"
    told = f"Take {taken.candidate.words}: validation loss {taken.loss:.4f} {steps}"
    if taken is best:
        others = sorted(one.loss for one in done if one is not best)
        told += f", the lowest (the next has {others[0]:.4f})." if others else "."
    else:
        time = taken.seconds / best.seconds
        memory = taken.results["peak_memory"] / best.results["peak_memory"]
        told += (
            f", as good as the best ({best.candidate.words}, {best.loss:.4f}) within {ALIKE:.0%} of what that gained, "
            f"in {time:.2f} of its time and {memory:.2f} of its memory."
        )
    if began <= best.loss:
        told = f"No candidate got below the loss before training, {began:.4f}: try another --train.lr or more steps."
    return taken, f"{told} One seed each, a short run: small differences may be chance."


def write(out_dir: Path, tried: Sequence[Tried], sentence: str) -> None:
    """sweep.json and sweep.png in `out_dir`."""
    found = [
        {**asdict(one.candidate), "run": one.run_dir.name, "results": one.results, "failure": one.failure or None}
        for one in tried
    ]
    write_text(out_dir / "sweep.json", json.dumps({"candidates": found, "recommendation": sentence}, indent=2) + "\n")
    done = [one for one in tried if one.results]
    if done:
        draw(out_dir / "sweep.png", done)


def draw(path: Path, done: Sequence[Tried]) -> None:
    """Validation loss against the time of training and, at its lowest, against memory: a PNG."""
    from matplotlib.figure import Figure

    figure = Figure((12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for one in done:
        left.plot(*zip(*one.curve(), strict=True), "o-", markersize=4, linewidth=1.2, label=one.candidate.words)
        right.plot(one.results["peak_memory"] / 1e6, one.loss, "o", markersize=8, label=one.candidate.words)
    left.set(xlabel="seconds of training", ylabel="validation loss", yscale="log")
    right.set(xlabel="peak memory, MB", ylabel="lowest validation loss", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    save_picture(figure, path)
