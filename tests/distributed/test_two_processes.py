"""Two processes on one machine train as one does."""

import csv
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

COMMAND = [
    *(sys.executable, "-m", "litfreeze", "finetune", "full", "--accelerator", "cpu", "--trainable_layers", "10,11"),
    *("--train.max_steps", "4", "--train.global_batch_size", "7", "--train.micro_batch_size", "2"),
    *("--eval.interval", "2", "--eval.max_samples", "9", "--save_dtype", "float32"),
]


def train(path, processes):
    run = subprocess.run(
        [*COMMAND, "--devices", str(processes), "--out_dir", str(path)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = list(csv.DictReader((path / "metrics.csv").open()))
    losses = [float(row[column]) for row in rows for column in ("train_loss", "val_loss") if row[column]]
    return losses, load_file(path / "final/litfreeze.safetensors")


def test_the_same_losses_and_the_same_frozen_tensors(tmp_path):
    """An odd global batch, so that one process runs out of samples while the other has some left."""
    one, weights = train(tmp_path / "one", 1)
    two, others = train(tmp_path / "two", 2)
    assert len(one) == len(two) == 4 + 3
    assert two == pytest.approx(one, rel=1e-4)
    frozen = [name for name in weights if not name.startswith(("blocks.10.", "blocks.11."))]
    assert len(frozen) == 92 and all(torch.equal(weights[name], others[name]) for name in frozen)
