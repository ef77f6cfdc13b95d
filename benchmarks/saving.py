"""What a save on the way costs the step that it comes after: python benchmarks/saving.py --smollm2 DIR --data FILE

Runs the same steps with saving in the background and without, and sets the time from one step's end to the next, where
a save lies between, beside the median of the others. Also the step after that, while the background still writes."""

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from litfreeze.data.args import DataArgs
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.place import PlaceArgs
from litfreeze.train.args import EvalArgs, TrainArgs
from litfreeze.train.monitor import Monitor

PLANS = {
    "last two blocks": ("-2:", 18),
    "20%-80%": ("20%-80%", 6),
    "everything": (None, 6),
}  # and steps from save to save


def ends_of_steps(plan: str, background: bool, args: argparse.Namespace) -> list[float]:
    """Seconds at which each step of a run had ended."""
    (layers, every), ends, plain = PLANS[plan], [], Monitor.stepped

    def stepped(*given):
        plain(*given)
        ends.append(time.perf_counter())

    Monitor.stepped = stepped
    try:
        with tempfile.TemporaryDirectory() as folder:
            finetune_full(
                checkpoint_dir=args.smollm2,
                out_dir=Path(folder) / "run",
                data=DataArgs(path=args.data, val_split_fraction=0),
                train=TrainArgs(
                    max_steps=5 * every + 2, global_batch_size=8, micro_batch_size=8, save_interval=every,
                    save_in_background=background, watch_interval=0,
                ),
                eval=EvalArgs(save_best=False, max_new_tokens=1),
                place=PlaceArgs("32-true"),
                trainable_layers=layers,
            )  # fmt: skip
    finally:
        Monitor.stepped = plain
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, required=True, help="SmolLM2-135M-Instruct, a Hugging Face directory")
    parser.add_argument("--data", type=Path, required=True, help="records, at least 64")
    args = parser.parse_args()
    table = ["| | a step | with a save, foreground | with a save, background | and the step after it | ratio |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for name, (_, every) in PLANS.items():
        found = {}
        for background in (False, True):
            ends = ends_of_steps(name, background, args)
            took = [after - before for before, after in pairwise(ends)]  # of step 2, 3, ...
            saving = [took[i] for i in range(every - 1, len(took), every)]  # a save comes before step 7, 13, ...
            after = [took[i + 1] for i in range(every - 1, len(took) - 1, every)]
            others = [t for i, t in enumerate(took) if i % every in range(1, every - 2)]
            found[background] = [statistics.median(times) for times in (others, saving, after)]
        step = found[False][0]
        foreground, beside, behind = found[False][1] - step, found[True][1] - step, found[True][2] - step
        table.append(
            f"| {name} | {1000 * step:.0f} ms | + {1000 * foreground:.0f} ms | + {1000 * beside:.0f} ms "
            f"| + {1000 * behind:.0f} ms | {beside / foreground:.2f} |"
        )
    print("\n".join(table))


if __name__ == "__main__":
    main()
