"""litfreeze beside transformers, litgpt and PEFT on the same work, in turn: python benchmarks/peers.py --smollm2 DIR

Each contestant trains the same records in the same order from the same weights, each time in a process of its own:
the peers by ../shared/peers/run_peer.py, litfreeze by its command. The losses of every step must agree, or the row
fails. Prints a Markdown table of ratios, lowest to highest of the rounds, and writes everything measured to a JSON
file. Exits 1 if losses did not agree. README.md in this folder says what the columns mean."""

import argparse
import csv
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Optional

HERE = Path(__file__).resolve().parent
BATCH, LENGTH, LR, SEED, LORA_R = 4, 512, 1e-4, 0, 8
DATA = {"snips": ("snips/train.jsonl", 96), "gsm8k": ("gsm8k/train.jsonl", 48)}  # file, records
LOSS_TOLERANCE = 1e-4  # relative, in the first epoch; run_peer.py rounds to 6 digits behind the point
LATER_TOLERANCE = 1e-3  # when what rounding made of AdamW's first steps has grown, and records are known by heart
MEMORY_RATIO, FLOOR_SHARE = 0.6, 0.65  # what every row should reach


@dataclass(frozen=True)
class Row:
    """One piece of work, and what is asked of it: so many times the speed of the faster peer.

    Attributes:
        blocks: What trains; empty for the whole model.
        faster: Required ratio of seconds by number of epochs.
        second_faster: The same for a run whose cache an earlier run has filled; None where none is asked for.
    """

    title: str
    data: str
    blocks: tuple[int, ...]
    peers: tuple[str, ...]
    faster: dict[int, float]
    second_faster: Optional[float] = None
    lora: bool = False

    @property
    def layers(self) -> str:
        return ",".join(map(str, self.blocks))


BOTH = ("transformers", "litgpt")
ROWS = {
    "last2-snips": Row("last 2 blocks, SNIPS", "snips", (28, 29), BOTH, {3: 4.0, 5: 6.0}, 10.0),
    "last2-gsm8k": Row("last 2 blocks, GSM8K", "gsm8k", (28, 29), BOTH, {3: 3.0, 5: 3.5}, 4.5),
    "mid": Row("blocks 6-23 (20%-80%), GSM8K", "gsm8k", tuple(range(6, 24)), BOTH, {3: 1.5}),
    "blocks14-15": Row("blocks 14,15, GSM8K", "gsm8k", (14, 15), BOTH, {3: 1.7}),
    "lora": Row("LoRA on all blocks, GSM8K", "gsm8k", tuple(range(30)), ("peft",), {3: 1.5}, lora=True),
    # Not litgpt: it would train head and embedding, which this model ties, as two tensors
    "full": Row("full fine-tuning, GSM8K", "gsm8k", (), ("transformers",), {3: 1.3}),
}


@dataclass
class Run:
    """What one contestant did in one round. `epoch_seconds` are of training alone, `wall_seconds` of the process."""

    epoch_seconds: list[float]
    losses: list[float]
    peak_mb: float
    wall_seconds: float

    def seconds(self, epochs: int) -> float:
        return sum(self.epoch_seconds[:epochs])


@dataclass
class Measured:
    """All rounds of one row: runs by contestant, and of each round the floor of the last epoch and the largest relative
    difference of a loss. `disagreement` says where that is too large."""

    runs: dict[str, list[Run]]
    floors: list[dict] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    disagreement: Optional[str] = None


# --- the contestants, each in a process of its own -------------------------------------------------------------------


def child(words: Sequence[object]) -> tuple[str, float, float]:
    """Runs a command: what it printed, the peak of its resident memory in MB, its seconds. Exits if it fails.

    The peak is the kernel's own, mapped pages of files included. A child inherits the mark of who forked it, which is
    why this process imports nothing large."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen([str(word) for word in words], stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), errors.seek(0)
        if process.returncode:
            told = (out.read() + errors.read()).decode("utf-8", "replace").strip()[-2000:]
            sys.exit(f"{' '.join(map(str, words))}\nended with {process.returncode}:\n{told}")
        peak = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)  # KiB; bytes on macOS
        return out.read().decode("utf-8"), peak, seconds


def run_peer(peer: str, python: Path, row: Row, epochs: int, data: Path, args: argparse.Namespace) -> Run:
    words = [python, args.shared / "peers/run_peer.py", "--peer", peer, "--model", args.smollm2, "--data", data]
    words += ["--layers", row.layers, "--records", 10**9, "--epochs", epochs, "--seed", SEED]
    words += ["--micro_batch_size", BATCH, "--max_seq_length", LENGTH, "--lr", LR, *(["--lora"] if row.lora else [])]
    printed, peak, wall = child(words)
    told = json.loads(printed.splitlines()[-1])
    return Run(told["epoch_seconds"], told["losses"], peak, wall)


def run_litfreeze(
    row: Row, epochs: int, data: Path, model: Path, cache: Path, more: Optional[dict[str, object]] = None
) -> Run:
    """`model` is the checkpoint, or for LoRA the adapter that PEFT starts from too. `cache` may be filled already.
    `more` options win."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        options = {
            "--checkpoint_dir": model, "--data": data, "--data.val_split_fraction": 0, "--data.max_seq_length": LENGTH,
            "--train.lr": LR, "--train.epochs": epochs, "--train.global_batch_size": BATCH,
            "--train.micro_batch_size": BATCH, "--train.lr_schedule": "constant", "--train.lr_warmup_steps": 0,
            "--train.beta2": 0.999, "--train.max_norm": "null", "--precision": "32-true", "--seed": SEED,
            "--eval.max_new_tokens": 1, "--out_dir": out,
        }  # fmt: skip
        if row.lora:
            options["--lora_dropout"] = 0
        elif row.blocks:
            options["--trainable_layers"] = row.layers
        options["--cache_dir"] = cache
        options |= more or {}
        words = [word for option in options.items() for word in option]
        method = "lora" if row.lora else "full"
        _, peak, wall = child([sys.executable, "-m", "litfreeze", "finetune", method, *words])
        with (out / "metrics.csv").open(newline="", encoding="utf-8") as lines:
            steps = [line for line in csv.DictReader(lines) if line["train_loss"]]
    ends = [0.0, *(float(steps[len(steps) * done // epochs - 1]["seconds"]) for done in range(1, epochs + 1))]
    return Run([b - a for a, b in pairwise(ends)], [float(step["train_loss"]) for step in steps], peak, wall)


def start_adapter(model: Path, out: Path) -> None:
    """Saves the adapter that `run_peer.py --peer peft --lora` begins with: the same draws after the same seed."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = LoraConfig(r=LORA_R, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(out)


def floor(row: Row, epochs: int, data: Path, model: Path) -> dict:
    """FLOPs that the last epoch needs and this machine's rate just now, from floor.py."""
    words = [sys.executable, HERE / "floor.py", "--model", model, "--data", data, "--epoch", epochs - 1]
    words += ["--batch_size", BATCH, "--max_seq_length", LENGTH, "--seed", SEED]
    words += ["--blocks", row.layers] if row.blocks else ["--whole"]
    words += ["--lora_r", LORA_R] if row.lora else []
    return json.loads(child(words)[0])


# --- the rounds ------------------------------------------------------------------------------------------------------


def write_records(row: Row, args: argparse.Namespace, out: Path) -> None:
    """The first records of the row's data as prompt and completion."""
    name, records = DATA[row.data]
    with (args.shared / "data" / name).open(encoding="utf-8") as source, out.open("w", encoding="utf-8") as lines:
        for _, line in zip(range(args.records or records), source, strict=False):
            record = json.loads(line)
            pair = {
                "prompt": record.get("prompt", record.get("question")),
                "completion": record.get("completion", record.get("answer")),
            }
            lines.write(json.dumps(pair, ensure_ascii=False) + "\n")


def measure(name: str, row: Row, epochs: int, args: argparse.Namespace, folder: Path) -> Measured:
    """All rounds of one row; stops at the first whose losses do not agree."""
    data, cache, model = folder / f"{row.data}.jsonl", folder / "cache", args.smollm2
    write_records(row, args, data)
    if row.lora:
        model = folder / "adapter"
        child([sys.executable, __file__, "--start_adapter", args.smollm2, model])
    pythons = {"transformers": sys.executable, "peft": sys.executable, "litgpt": args.litgpt_python}
    turns = {
        peer: lambda peer=peer: run_peer(peer, pythons[peer], row, epochs, data, args)
        for peer in row.peers
        if pythons[peer]
    }
    turns["litfreeze"] = lambda: run_litfreeze(row, epochs, data, model, cache)
    if row.second_faster:
        turns["litfreeze, second run"] = turns["litfreeze"]
    measured = Measured({contestant: [] for contestant in turns})
    for number in range(1, args.rounds + 1):
        shutil.rmtree(cache, ignore_errors=True)
        measured.floors.append(floor(row, epochs, data, args.smollm2))
        for contestant, turn in turns.items():
            run = turn()
            measured.runs[contestant].append(run)
            per_epoch = " ".join(f"{seconds:.1f}" for seconds in run.epoch_seconds)
            told = f"{name}, round {number}, {contestant}: {run.seconds(epochs):.1f} s ({per_epoch})"
            print(f"{told}, {run.peak_mb:,.0f} MB", file=sys.stderr)
        losses = {who: runs[-1].losses for who, runs in measured.runs.items()}
        difference, where = largest_difference(losses)
        first, where_first = largest_difference({who: each[: len(each) // epochs] for who, each in losses.items()})
        measured.differences.append(difference)
        if not first <= LOSS_TOLERANCE:
            difference, where = math.inf, where_first
        if not difference <= LATER_TOLERANCE:
            measured.disagreement = where
            print(f"{name}: LOSSES DIFFER: {where}", file=sys.stderr)
            break
    return measured


def largest_difference(losses: dict[str, list[float]]) -> tuple[float, str]:
    """How far, relatively, a loss is from the first contestant's in the same step, at the worst, and which it is.
    Up to 1e-6, which rounding to 6 digits can make, they count as the same."""
    (first, expected), *others = losses.items()
    worst = (0.0, "nowhere")
    for who, found in others:
        if len(found) != len(expected):
            return math.inf, f"{first} took {len(expected)} steps, {who} {len(found)}"
        for step, (theirs, ours) in enumerate(zip(expected, found, strict=True), start=1):
            apart = abs(theirs - ours)
            difference = apart / max(abs(theirs), 1e-6) if apart > 1e-6 else 0.0
            if not math.isfinite(theirs + ours):
                difference = math.inf
            if difference > worst[0]:
                worst = (difference, f"at step {step} of {len(found)}, {first} has {theirs:.6f} and {who} {ours:.6f}")
    return worst


# --- the table -------------------------------------------------------------------------------------------------------

HEADINGS = (
    "work", "epochs", "peers, s", "litfreeze, s", "ratio", "required", "peak of peers, MB", "of litfreeze, MB",
    f"ratio (≤ {MEMORY_RATIO})", f"floor, last epoch (≥ {FLOOR_SHARE:.0%})", "losses within",
)  # fmt: skip


def table_lines(row: Row, epochs: Sequence[int], measured: Measured) -> list[dict]:
    """One line for each number of epochs, and one more for each with the cache filled."""
    if measured.disagreement:
        return [{**dict.fromkeys(HEADINGS, ""), "work": row.title, "ratio": f"LOSSES DIFFER: {measured.disagreement}"}]
    runs = dict(measured.runs)
    first, second = runs.pop("litfreeze"), runs.pop("litfreeze, second run", None)
    peaks = {peer: max(run.peak_mb for run in of_peer) for peer, of_peer in runs.items()}
    fastest = max(rates["rate"] for rates in measured.floors)
    lines = []
    for ours, required, suffix in ((first, row.faster, ""), (second, row.second_faster, ", second run")):
        for n in epochs if ours else ():
            faster_peer = [min(run.seconds(n) for run in turn) for turn in zip(*runs.values(), strict=True)]
            peak = max(run.peak_mb for run in ours)
            asked = required.get(n) if isinstance(required, dict) else required
            ratios = [peer / run.seconds(n) for peer, run in zip(faster_peer, ours, strict=True)]
            shares = [measured.floors[0]["flops"] / fastest / run.epoch_seconds[-1] for run in ours]
            peers = (f"{peer} {span([run.seconds(n) for run in of_peer], 1)}" for peer, of_peer in runs.items())
            values = (
                row.title + suffix, n, ", ".join(peers), span([run.seconds(n) for run in ours], 1), span(ratios, 2),
                f"{asked:g}" if asked else "-", ", ".join(f"{peer} {mb:,.0f}" for peer, mb in peaks.items()),
                f"{peak:,.0f}", f"{peak / min(peaks.values()):.2f}", f"{span([100 * share for share in shares], 0)} %",
                f"{max(measured.differences):.0e}" if any(measured.differences) else "rounding",
            )  # fmt: skip
            lines.append(dict(zip(HEADINGS, values, strict=True)))
    return lines


def span(values: Sequence[float], digits: int) -> str:
    """Lowest to highest; the median before it where there are more than two."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    if low == high:
        return low
    return f"{low}-{high}" if len(values) == 2 else f"{statistics.median(values):.{digits}f} ({low}-{high})"


def markdown(lines: Sequence[dict]) -> str:
    rows = [HEADINGS, ["---"] * len(HEADINGS), *(line.values() for line in lines)]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, required=True, help="SmolLM2-135M-Instruct, a Hugging Face directory")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"which of {','.join(ROWS)}")
    parser.add_argument("--epochs", help="such as 3 or 3,5; by default those that each row has a requirement for")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--records", type=int, help="of each data set; by default 96 of SNIPS and 48 of GSM8K")
    parser.add_argument("--litgpt_python", type=Path, help="the python of an environment with litgpt and transformers")
    parser.add_argument("--shared", type=Path, default=HERE.parents[1] / "shared", help="the folder of data and peers")
    parser.add_argument("--out", type=Path, default=Path("results.json"), help="everything measured, as JSON")
    args = parser.parse_args()
    args.smollm2, args.shared = args.smollm2.resolve(), args.shared.resolve()
    chosen = args.rows.split(",")
    if unknown := set(chosen) - set(ROWS):
        parser.error(f"--rows {','.join(unknown)}: there are {', '.join(ROWS)}")

    results, lines, failed = {}, [], False
    for name in chosen:
        row = ROWS[name]
        epochs = [int(n) for n in args.epochs.split(",")] if args.epochs else list(row.faster)
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(name, row, max(epochs), args, Path(folder))
        failed = failed or bool(measured.disagreement)
        lines += table_lines(row, epochs, measured)
        results[name] = {"row": asdict(row), **asdict(measured)}
        machine = {"platform": platform.platform(), "python": sys.version.split()[0], "cpus": os.cpu_count()}
        told = {"machine": machine, "arguments": {k: str(v) for k, v in vars(args).items()}, "table": lines}
        beside = args.out.with_name(f".{args.out.name}")
        beside.write_text(json.dumps({**told, "rows": results}, indent=1), encoding="utf-8")
        beside.replace(args.out)
    print(markdown(lines))
    if any("litgpt" in ROWS[name].peers for name in chosen) and not args.litgpt_python:
        print("\nlitgpt was left out: no --litgpt_python was given.")
    return int(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--start_adapter"]:
        start_adapter(*map(Path, sys.argv[2:]))
    else:
        sys.exit(main())
