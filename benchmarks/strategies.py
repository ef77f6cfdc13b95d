"""Ways to choose layers, side by side on one model and one labelled set: python benchmarks/strategies.py --smollm2 DIR

Each is one run of the command line for every seed, with the same records, steps and rate; a seed orders the records
and draws LISA's blocks. Blocks are written for a model of 30. Prints a Markdown table: the median of the seeds with
the lowest and highest, and the seconds of the whole command in the quietest. What is in --folder is not run again."""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
LAST = ["--trainable_layers", "-2:"]
RUNS = {
    "last two blocks": LAST,
    "last two, rates decaying by depth (0.5)": [*LAST, "--lr_decay_by_depth", "0.5"],
    "last four blocks": ["--trainable_layers", "last:4"],
    "… thawing one after another (gradual:4)": ["--unfreeze", "gradual:4"],
    "LISA, 2 blocks at a time": ["--lisa_layers", "2", "--lisa_interval", "10"],
    "5 new blocks (LLaMA-Pro)": ["--trainable_layers", "new"],
    "every sixth block, no new ones": ["--trainable_layers", "every:6"],
    "middle, 20%-80%": ["--trainable_layers", "20%-80%"],
    "rank:gradient:4": ["--trainable_layers", "rank:gradient:4"],
    "rank:spectrum:4": ["--trainable_layers", "rank:spectrum:4"],
    "rank:angular:4": ["--trainable_layers", "rank:angular:4"],
    "rank:random:4": ["--trainable_layers", "rank:random:4"],
    "LoRA on all blocks": ["lora", "--train.lr", "1e-3"],
    "classifier, head alone": ["--task", "classification", "--trainable_layers", "none", "--train.lr", "5e-3"],
    "classifier, head and last two blocks": ["--task", "classification", *LAST, "--train.lr", "1e-3"],
    "classifier, head and LoRA": ["lora", "--task", "classification", "--layer_lr", "head:5e-3", "--train.lr", "2e-4"],
}


def litfreeze(*words: object) -> None:
    command = [sys.executable, "-m", "litfreeze", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")


def write_records(source: Path, folder: Path, train: int, val: int, seed: int) -> None:
    """So many records for training, and other ones for validation, drawn from SNIPS."""
    lines = source.read_text(encoding="utf-8").splitlines()
    drawn = random.Random(seed).sample(lines, train + val)
    for name, part in (("train", drawn[:train]), ("val", drawn[train:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, required=True, help="SmolLM2-135M-Instruct, a Hugging Face directory")
    parser.add_argument("--shared", type=Path, default=HERE.parents[1] / "shared", help="the folder of data")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--only", nargs="*", help="the beginnings of the names of some")
    parser.add_argument("--train", type=int, default=480)
    parser.add_argument("--val", type=int, default=140)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", default="3e-4")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    write_records(args.shared / "data/snips/train.jsonl", args.folder, args.train, args.val, seed=0)
    deeper = args.folder / "deeper"
    if not deeper.exists():
        litfreeze("expand", "--checkpoint_dir", args.smollm2, "--out_dir", deeper, "--new_blocks", 5)
    chosen = [name for name in RUNS if not args.only or any(name.startswith(only) for only in args.only)]
    for seed in range(args.seeds):
        for name in chosen:
            if not (out_dir(args.folder, name, seed) / "took.json").exists():
                began = time.perf_counter()
                run(args, name, seed)
                took = time.perf_counter() - began
                (out_dir(args.folder, name, seed) / "took.json").write_text(json.dumps(took), encoding="utf-8")
                print(f"{name}, seed {seed}: {took:.0f} s", file=sys.stderr, flush=True)
    print("| | blocks | parameters | val loss | right, % | seconds | peak memory |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in chosen:
        print(row(name, [out_dir(args.folder, name, seed) for seed in range(args.seeds)]))


def out_dir(folder: Path, name: str, seed: int) -> Path:
    return folder / f"run-{list(RUNS).index(name)}-{seed}"


def run(args: argparse.Namespace, name: str, seed: int) -> None:
    words = RUNS[name]
    method, words = ("lora", words[1:]) if words[0] == "lora" else ("full", words)
    out = out_dir(args.folder, name, seed)
    own_rate = [] if "--train.lr" in words else ["--train.lr", args.lr]
    litfreeze(
        "finetune", method, "--checkpoint_dir", args.folder / "deeper" if "new" in words else args.smollm2,
        "--out_dir", out, "--precision", "32-true",
        "--data", args.folder / "train.jsonl", "--data.val_path", args.folder / "val.jsonl",
        "--train.epochs", args.epochs, "--train.micro_batch_size", 8, "--eval.interval", 15,
        "--eval.save_best", "false", "--cache_dir", out.with_name(f"cache-{out.name}"), "--seed", seed,
        *(["--save", "delta"] if method == "full" else []), *own_rate, *words,
    )  # fmt: skip


def row(name: str, outs: list[Path]) -> str:
    told = [json.loads((out / "results.json").read_text(encoding="utf-8")) for out in outs]
    after = [each["after"] for each in told]
    right = [100 * (each["accuracy"] if each.get("exact_match") is None else each["exact_match"]) for each in after]
    seconds = min(json.loads((out / "took.json").read_text(encoding="utf-8")) for out in outs)
    cells = [
        name,
        told[0]["layers"],
        f"{told[0]['trained_parameters'] / 1e6:.2f} M",
        spread([each["loss"] for each in after], ".3f"),
        spread(right, ".1f"),
        f"{seconds:.0f}",
        f"{statistics.median(each['peak_memory'] for each in told) / 1e6:,.0f} MB",
    ]
    return f"| {' | '.join(cells)} |"


def spread(values: list[float], digits: str) -> str:
    """'0.127 (0.110-0.131)': the median, with the lowest and the highest where there are several."""
    middle = f"{statistics.median(values):{digits}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{digits}}-{max(values):{digits}})"


if __name__ == "__main__":
    main()
