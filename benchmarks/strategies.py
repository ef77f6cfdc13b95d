"""Ways to choose layers, side by side on one model and one labelled set: python benchmarks/strategies.py --smollm2 DIR

Each is one run of the command line with the same records, order, steps and rate; blocks are written for a model of 30.
Prints a Markdown table of what every run came to. What is done in --folder is not done again."""

import argparse
import json
import random
import subprocess
import sys
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
    "classifier, head alone": ["--task", "classification", "--trainable_layers", "none", "--train.lr", "1e-3"],
    "classifier, head and last two blocks": ["--task", "classification", *LAST],
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
    parser.add_argument("--lr", default="1e-4")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    write_records(args.shared / "data/snips/train.jsonl", args.folder, args.train, args.val, args.seed)
    deeper = args.folder / "deeper"
    if not deeper.exists():
        litfreeze("expand", "--checkpoint_dir", args.smollm2, "--out_dir", deeper, "--new_blocks", 5)
    chosen = {
        name: words for name, words in RUNS.items() if not args.only or any(name.startswith(o) for o in args.only)
    }
    print("| | blocks | parameters | val loss | right | seconds | peak memory |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for number, (name, words) in enumerate(RUNS.items()):
        if name not in chosen:
            continue
        method, words = ("lora", words[1:]) if words[0] == "lora" else ("full", words)
        run = args.folder / f"run-{number}"
        if not (run / "results.json").exists():
            base = deeper if "new" in words else args.smollm2
            own_rate = [] if "--train.lr" in words else ["--train.lr", args.lr]
            litfreeze(
                "finetune", method, "--checkpoint_dir", base, "--out_dir", run, "--precision", "32-true",
                "--data", args.folder / "train.jsonl", "--data.val_path", args.folder / "val.jsonl",
                "--train.epochs", args.epochs, "--train.micro_batch_size", 8, "--eval.interval", 15,
                "--eval.save_best", "false", "--cache_dir", run.with_name(f"cache-{number}"), "--seed", args.seed,
                *(["--save", "delta"] if method == "full" else []), *own_rate, *words,
            )  # fmt: skip
        told = json.loads((run / "results.json").read_text(encoding="utf-8"))
        after = told["after"]
        right = after["exact_match"] if after.get("exact_match") is not None else after["accuracy"]
        print(
            f"| {name} | {told['layers']} | {told['trained_parameters'] / 1e6:.2f} M | {after['loss']:.3f} "
            f"| {100 * right:.1f} % | {told['seconds']:.0f} | {told['peak_memory'] / 1e6:,.0f} MB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
