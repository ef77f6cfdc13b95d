"""Preparing a set and reading it in an epoch's order, with its samples in memory and on disk:
python benchmarks/larger_data.py [--data FILE.jsonl] [--checkpoint_dir DIR] [--times 1,10]

Each line is a process of its own over the records, `times` over: records prepared per second, peak memory once they
are, microseconds to read one in a micro-batch of 4 of a shuffled epoch, and peak memory then. Linux: it asks /proc."""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def peak() -> float:
    """The most resident MB of this process so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def measure(data: str, checkpoint_dir: str, keep: str, folder: str) -> None:
    """Prints a row of figures."""
    from litfreeze.data.args import DataArgs
    from litfreeze.data.batches import build_batch, epoch_order
    from litfreeze.data.prompt import Prompt
    from litfreeze.data.samples import load_samples
    from litfreeze.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_dir(checkpoint_dir)
    prompt = Prompt.choose(None, None, tokenizer)
    before, start = peak(), time.perf_counter()
    samples = load_samples(DataArgs(path=Path(data), keep=keep, keep_dir=Path(folder)), tokenizer, prompt, 1024)
    samples.unname()
    prepared, after = time.perf_counter() - start, peak()
    count, train = len(samples.train) + len(samples.val), samples.train
    order, start = epoch_order(len(train), 0, 0), time.perf_counter()
    for at in range(0, len(order), 4):
        build_batch(train, list(order[at : at + 4]))
    read = time.perf_counter() - start
    figures = count / prepared, after - before, 1e6 * read / len(train), peak() - before
    print(f"{count:>10,}  {keep:>6}  " + "  ".join(f"{figure:>12,.0f}" for figure in figures), flush=True)


def main() -> None:
    from litfreeze.demo import MODEL_DIR, TRAIN_FILE

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=str(TRAIN_FILE), help="a .jsonl file")
    parser.add_argument("--checkpoint_dir", default=str(MODEL_DIR))
    parser.add_argument("--times", default="100,1000")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.data, args.checkpoint_dir, *args.measure)
        return
    heads = ("records/s", "MB prepared", "us/read", "MB at its end")
    print(f"{'records':>10}  {'keep':>6}  " + "  ".join(f"{head:>12}" for head in heads), flush=True)
    text = Path(args.data).read_text(encoding="utf-8").rstrip("\n") + "\n"
    for times in map(int, args.times.split(",")):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            data = Path(folder) / "records.jsonl"
            with data.open("w", encoding="utf-8") as out:
                for _ in range(times):
                    out.write(text)
            for keep in ("memory", "disk"):
                own = ["--data", data, "--checkpoint_dir", args.checkpoint_dir, "--measure", keep, folder]
                subprocess.run([sys.executable, __file__, *map(str, own)], check=True)


if __name__ == "__main__":
    main()
