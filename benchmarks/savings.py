"""What each saving saves: python benchmarks/savings.py --smollm2 DIR [--rows last2-snips,last2-gsm8k] [--rounds 3]

litfreeze beside itself: everything off, then one saving after the other switched on, on the work of `peers.py`. Losses
must agree with those of the plain loop. Prints a Markdown table of the seconds of the last epoch, lowest to highest of
the rounds, and of the peak of memory."""

import argparse
import sys
import tempfile
from pathlib import Path

from peers import LOSS_TOLERANCE, ROWS, run_litfreeze, write_records

PLAIN = {"--data.packing": "off", "--cache": "off"}
STEPS = {
    "plain: padded batches, every block in every epoch": PLAIN,
    "no pads, last block on learned rows": {"--data.share_prompts": "false", "--cache": "off"},
    "and shared prompts once per batch": {"--cache": "off"},
    "and the frozen prefix once per record": {"--cache": "disk"},
}
EPOCHS = 2  # in the second one the cache is full


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, required=True, help="SmolLM2-135M-Instruct, a Hugging Face directory")
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--rows", default="last2-snips,last2-gsm8k")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--records", type=int, default=0)
    args = parser.parse_args()
    failed = False
    for name in args.rows.split(","):
        row = ROWS[name]
        seconds: dict[str, list[float]] = {step: [] for step in STEPS}
        peaks = dict.fromkeys(STEPS, 0.0)
        worst = 0.0
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data.jsonl"
            write_records(row, args, data)
            for _ in range(args.rounds):
                plain = None
                for step, options in STEPS.items():
                    with tempfile.TemporaryDirectory() as cache:
                        run = run_litfreeze(row, EPOCHS, data, args.smollm2, Path(cache), options)
                    plain = plain or run.losses
                    pairs = zip(run.losses, plain, strict=True)
                    worst = max(worst, *(abs(a - b) / max(abs(b), 1e-2) for a, b in pairs))
                    seconds[step].append(run.epoch_seconds[-1])
                    peaks[step] = max(peaks[step], run.peak_mb)
        print(f"\n{row.title}: seconds of a later epoch; losses differ by {worst:.0e} at most\n")
        print("| | seconds | times as fast | peak memory |\n|---|---|---|---|")
        first = seconds[next(iter(STEPS))]
        for step, found in seconds.items():
            ratios = sorted(a / b for a, b in zip(first, found, strict=True))
            print(
                f"| {step} | {min(found):.1f}-{max(found):.1f} | {ratios[0]:.1f}-{ratios[-1]:.1f} "
                f"| {peaks[step]:,.0f} MB |",
                flush=True,
            )
        failed |= worst > LOSS_TOLERANCE
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
