"""What a run is told it will cost, beside what it costs: python benchmarks/estimates.py MODEL_DIR

A process trains the embedded model first, so that all is imported and warm; what MODEL_DIR then adds to its memory is
compared with the estimate that the run prints, and the time of its steps with what it was told to be. Linux."""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from litfreeze.sizes import parse_size

PLANS = {
    "everything": "full",
    "last 2": "full --trainable_layers -2:",
    "last half": "full --trainable_layers 50%-100%",
    "last half, activations again": "full --trainable_layers 50%-100% --train.activation_checkpointing true",
    "head and final norm": "full --trainable_layers none --trainable_extra head,final_norm --untie_embeddings",
    "LoRA": "lora --lora_dropout 0",
}
STEPS, BATCH, WORDS = 6, 4, 180


def records(path: Path) -> Path:
    """Records of one length, so that every micro-batch is the longest."""
    draw = random.Random(0)
    words = re.findall(r"\w+", "the of and to in is that it was for on are with as his they at be this from")
    with path.open("w", encoding="utf-8") as lines:
        for _ in range(STEPS * BATCH):
            text = " ".join(draw.choice(words) for _ in range(WORDS))
            lines.write(json.dumps({"prompt": "", "completion": f" {text}"}) + "\n")
    return path


def kilobytes(what: str) -> int:
    told = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{what}:\s+(\d+) kB", told)[1])


def measure(words: list[str]) -> None:
    """Runs in a process of its own: the command `words`, after a small one, and the memory that it adds."""
    from litfreeze.__main__ import main
    from litfreeze.heap import return_freed_blocks

    with tempfile.TemporaryDirectory() as folder:
        common = "--train.max_steps 2 --eval.max_new_tokens 1 --eval.max_samples 2 --accelerator cpu --cache off"
        assert main(["finetune", words[0], *common.split(), "--out_dir", f"{folder}/warm"]) == 0
        return_freed_blocks()
        before = kilobytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
        assert main(["finetune", *words, "--out_dir", f"{folder}/run"]) == 0
        results = json.loads(Path(folder, "run/results.json").read_text(encoding="utf-8"))
    print("MEASURED", json.dumps({"bytes": 1024 * (kilobytes("VmHWM") - before), "seconds": results["seconds"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--plans", nargs="*", default=list(PLANS))
    args = parser.parse_args()
    print("| | memory, estimated | measured | | seconds, estimated | measured | |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        data = records(Path(folder, "records.jsonl"))
        for name in args.plans:
            words = [*PLANS[name].split(), "--checkpoint_dir", str(args.model), "--data", str(data)]
            words += f"--precision {args.precision} --accelerator cpu --train.max_steps {STEPS} --cache off".split()
            words += f"--train.global_batch_size {BATCH} --train.micro_batch_size {BATCH} --train.lr 1e-5".split()
            words += ["--eval.max_new_tokens", "1", "--data.prompt_style", "plain", "--train.watch_interval", "0"]
            words += ["--train.save_in_background", "false"]  # which copies what trains, where memory is free for it
            run = [sys.executable, __file__, "--measure", *words]
            done = subprocess.run(run, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            told, found = done.stdout.rpartition("Model     ")[2], json.loads(done.stdout.rpartition("MEASURED")[2])
            memory = parse_size(re.search(r"this plan: weights.* = (.+)", told)[1])
            seconds = float(re.search(r"this plan +[\d.,]+ [MG] +([\d.,]+)", told)[1].replace(",", ""))
            print(
                f"| {name} | {memory / 1e6:,.0f} MB | {found['bytes'] / 1e6:,.0f} MB | {memory / found['bytes']:.2f} "
                f"| {seconds:.1f} | {found['seconds']:.1f} | {seconds / found['seconds']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2:])
    else:
        main()
