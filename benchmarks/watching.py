"""What watching the blocks costs: python benchmarks/watching.py --smollm2 DIR

Runs a few plans with the interval that is on by default and sets the time of its looks, spread over all steps, beside
that of the median step: a difference of two whole runs would drown in noise. SNIPS has the shortest steps there are."""

import argparse
import statistics
import tempfile
import time
from functools import wraps
from pathlib import Path

from litfreeze.data.args import DataArgs
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.place import PlaceArgs
from litfreeze.train.args import EvalArgs, TrainArgs
from litfreeze.train.loop import Loop
from litfreeze.train.watch import Watch

PLANS = {
    "last two blocks": (finetune_full, {"trainable_layers": "-2:"}),
    "20%-80%": (finetune_full, {"trainable_layers": "20%-80%"}),
    "LoRA on all blocks": (finetune_lora, {}),
    "everything": (finetune_full, {}),
}


def timed(owner: object, name: str, spent: list[float]) -> None:
    """From now on `owner.name` adds the seconds that it takes to `spent`."""
    plain = getattr(owner, name)

    @wraps(plain)
    def measured(*given, **words):
        began = time.perf_counter()
        try:
            return plain(*given, **words)
        finally:
            spent.append(time.perf_counter() - began)

    setattr(owner, name, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, required=True, help="SmolLM2-135M-Instruct, a Hugging Face directory")
    parser.add_argument("--data", type=Path, required=True, help="records, at least 64")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    steps, looks = [], []
    timed(Loop, "_step", steps)
    for name in ("before", "gradients", "after"):
        timed(Watch, name, looks)
    table = ["| | a step | a look | share of the time |", "| --- | --- | --- | --- |"]
    for name, (finetune, words) in PLANS.items():
        steps.clear(), looks.clear()
        with tempfile.TemporaryDirectory() as folder:
            finetune(
                checkpoint_dir=args.smollm2,
                out_dir=Path(folder) / "run",
                data=DataArgs(path=args.data, val_split_fraction=0.1),
                train=TrainArgs(max_steps=args.steps, global_batch_size=16, micro_batch_size=8),
                eval=EvalArgs(max_samples=1, save_best=False, max_new_tokens=1, initial_validation=False),
                place=PlaceArgs("32-true"),
                **words,
            )
        step, each = statistics.median(steps), sum(looks) / len(steps)
        table.append(
            f"| {name} | {1000 * step:.0f} ms | {3000 * sum(looks) / len(looks):.1f} ms | {100 * each / step:.2f} % |"
        )
    print("\n".join(table))


if __name__ == "__main__":
    main()
