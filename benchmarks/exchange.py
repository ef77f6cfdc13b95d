"""What two processes tell each other in a step: python benchmarks/exchange.py [--smollm2 DIR]

Counts the bytes that go through the loopback device while a run trains, and those of a run of fewer steps; what lies
between them is of the steps alone. Whatever else goes through that device meanwhile counts too. Linux."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

PLANS = {"everything": [], "last 2": ["--trainable_layers", "-2:"], "LoRA": None}
FEW, MORE = 1, 4


def sent() -> int:
    """Bytes through the loopback device since the machine began."""
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    raise SystemExit("There is no loopback device here.")


def bytes_of(words: list[str], steps: int, folder: str) -> int:
    before = sent()
    done = subprocess.run(
        [sys.executable, "-m", "litfreeze", "finetune", *words, "--devices", "2", "--accelerator", "cpu",
         "--train.max_steps", str(steps), "--train.global_batch_size", "4", "--train.micro_batch_size", "2",
         "--train.watch_interval", "0", "--eval.initial_validation", "false", "--eval.interval", "1000",
         "--eval.max_samples", "2", "--eval.max_new_tokens", "1", "--out_dir", f"{folder}/{steps}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return sent() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, help="another model than the embedded one")
    args = parser.parse_args()
    model = [] if args.smollm2 is None else ["--checkpoint_dir", str(args.smollm2)]
    print("| | ddp, bytes a step | fsdp | fsdp1 |\n| --- | ---: | ---: | ---: |")
    for name, own in PLANS.items():
        cells = []
        for strategy in ("ddp", "fsdp", "fsdp1"):
            words = [*(["lora"] if own is None else ["full", *own]), *model, "--strategy", strategy]
            with tempfile.TemporaryDirectory() as folder:
                few, more = (bytes_of(words, steps, folder) for steps in (FEW, MORE))
            cells.append(f"{(more - few) / (MORE - FEW):,.0f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
