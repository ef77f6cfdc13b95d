"""Training the top of a model that does not fit in memory: python benchmarks/larger_than_memory.py

Makes a Llama-shaped bf16 checkpoint of random weights (3.1 billion parameters, 6.2 GB, unless told otherwise), trains
its last two blocks with --stream_frozen within a limit of memory, and again without either, and compares the losses.

The limit is the kernel's where this may make a control group (root, Linux): a process that goes over it is killed, and
pages of files count. Elsewhere resident memory is sampled from outside, and exceeding the limit fails the run."""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")  # version 1, version 2


def make(place: Path, width: int, wide: int, n_layer: int) -> int:
    """Writes the checkpoint, one tensor in memory at a time; the bytes of its weights."""
    import torch

    from litfreeze.checkpoint.write import write_checkpoint
    from litfreeze.config import Config
    from litfreeze.demo import MODEL_DIR
    from litfreeze.model import meta_parameters

    fields = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": width,
        "intermediate_size": wide,
        "num_hidden_layers": n_layer,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 256,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    shapes = {name: tuple(p.shape) for name, p in meta_parameters(Config.from_hf(fields)).items()}
    generator = torch.Generator().manual_seed(0)

    def read(name: str) -> torch.Tensor:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name])
        scale = (2 * n_layer) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        return torch.empty(shapes[name]).normal_(0, 0.02 * scale, generator=generator)

    layout = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    write_checkpoint(place, fields, layout, read, {"kind": "init"}, MODEL_DIR)
    return sum(file.stat().st_size for file in place.glob("*.safetensors"))


@contextmanager
def limited(megabytes: int):
    """A control group with a limit on its memory, and where to read the most it held; None if it may not be made."""
    root = next((group for group in GROUPS if os.access(group, os.W_OK)), None)
    version_1 = (root / "memory.limit_in_bytes").exists() if root else False
    if root is None or not (version_1 or "memory" in (root / "cgroup.controllers").read_text().split()):
        yield None
        return
    group = root / f"litfreeze-{os.getpid()}"
    group.mkdir()
    try:
        names = ("memory.limit_in_bytes", "memory.max_usage_in_bytes") if version_1 else ("memory.max", "memory.peak")
        limit, peak = names
        (group / limit).write_text(str(megabytes * 10**6))
        if not version_1:
            (group / "memory.swap.max").write_text("0")
        yield group / "cgroup.procs", group / peak
    finally:
        for _ in range(50):  # a process that ended a moment ago may still be counted
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def train(checkpoint: Path, out: Path, words: list[str], group) -> tuple[list[float], float, int]:
    """Losses, seconds and the most resident memory, in bytes, of one run."""
    enter = None if group is None else lambda: group[0].write_text(str(os.getpid()))
    command = [
        sys.executable, "-m", "litfreeze", "finetune", "full", "--checkpoint_dir", str(checkpoint),
        "--out_dir", str(out), "--trainable_layers=-2:", "--precision", "32-true", "--save", "delta",
        "--accelerator", "cpu", "--train.max_steps", "8", "--train.global_batch_size", "4",
        "--train.micro_batch_size", "4", "--train.lr", "1e-4", "--train.max_norm", "null", "--eval.max_samples", "8",
        "--eval.interval", "4", "--eval.save_best", "false", "--eval.max_new_tokens", "1", *words,
    ]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(command, preexec_fn=enter, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}: killed for its memory, or failed.")
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    losses = [float(row[name]) for row in rows for name in ("train_loss", "val_loss") if row[name]]
    return losses, time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--wide", type=int, default=8192)
    parser.add_argument("--n_layer", type=int, default=50)
    parser.add_argument("--limit_mb", type=int, default=3000)
    parser.add_argument("--folder", type=Path, help="where to put the checkpoint; by default a temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there, and use it if it is there")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder)) if not args.keep else args.folder
    try:
        checkpoint = folder / "model"
        if not checkpoint.exists():
            make(checkpoint, args.width, args.wide, args.n_layer)
        size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        print(f"{checkpoint}: {size / 2e9:.2f} billion parameters, {size / 1e9:.2f} GB", flush=True)
        stream = ["--stream_frozen", "--fused_backward", "--cache_dir", str(folder / "cache")]
        with limited(args.limit_mb) as group:
            within, seconds, peak = train(checkpoint, folder / "within", stream, group)
            most = None if group is None else int(group[1].read_text())
        how = "resident, as sampled" if most is None else "the kernel's limit"
        print(f"within {args.limit_mb} MB ({how}): {seconds:.0f} s, resident at most {peak / 1e6:.0f} MB", flush=True)
        plain, seconds, peak = train(checkpoint, folder / "plain", ["--cache", "off"], None)
        print(f"without a limit, --cache off: {seconds:.0f} s, resident at most {peak / 1e6:.0f} MB")
        worst = max(abs(a - b) / abs(b) for a, b in zip(within, plain, strict=True))
        print(f"{len(plain)} losses, the largest relative difference {worst:.1e}")
        if worst > 1e-4 or (most is None and peak > args.limit_mb * 1e6):
            raise SystemExit("FAILED")
    finally:
        for part in ("within", "plain", "cache"):
            shutil.rmtree(folder / part, ignore_errors=True)
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
