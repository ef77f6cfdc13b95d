"""Two processes on one machine train as one does."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from litfreeze.demo import MODEL_DIR

# An odd global batch, so that one process runs out of samples while the other has some left
STEPS = (
    "--accelerator cpu --train.max_steps 4 --train.global_batch_size 7 --train.micro_batch_size 2 --eval.max_samples 9"
)
METHODS = {
    "full": "full --trainable_layers 10,11 --save_dtype float32 --eval.interval 2 --train.lr 2e-3",
    "thawing": "full --unfreeze 0:11;2:10 --save_dtype float32 --eval.interval 2 --train.lr 2e-3",
    "classifier": "full --task classification --trainable_layers 11 --save_dtype float32 --train.lr 2e-3",
    "lora": "lora --trainable_layers 0,1 --full_layers 11 --lora_dropout 0 --eval.interval 1 --train.lr 2e-3",
}


def train(path, method, processes):
    words = [*METHODS[method].split(), *STEPS.split(), "--devices", str(processes), "--out_dir", str(path)]
    run = subprocess.run(
        [sys.executable, "-m", "litfreeze", "finetune", *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    rows = list(csv.DictReader((path / "metrics.csv").open()))
    losses = [float(row[column]) for row in rows for column in ("train_loss", "val_loss") if row[column]]
    return losses, load_file(next((path / "final").glob("*.safetensors")))


@pytest.mark.parametrize(("method", "validations"), [("full", 3), ("thawing", 3), ("lora", 5)])
def test_the_same_losses_and_the_same_weights(tmp_path, method, validations):
    one, weights = train(tmp_path / "one", method, 1)
    two, others = train(tmp_path / "two", method, 2)
    assert len(one) == len(two) == 4 + validations
    assert two == pytest.approx(one, rel=1e-4)
    assert set(weights) == set(others)
    for (
        name,
        weight,
    ) in weights.items():  # AdamW's first steps are signs: where a gradient is near zero, they may differ
        assert (others[name].float() - weight.float()).norm() < 2e-2 * weight.float().norm() + 1e-3
    if method != "lora":
        base = load_file(MODEL_DIR / "litfreeze.safetensors")
        frozen = [name for name in weights if not name.startswith(("blocks.10.", "blocks.11."))]
        assert len(frozen) == 92
        for saved in (weights, others):
            assert all(torch.equal(saved[name], base[name].float()) for name in frozen)


def test_a_classifier_is_measured_over_all_of_them(tmp_path):
    told = []
    for processes in (1, 2):
        losses, _ = train(tmp_path / str(processes), "classifier", processes)
        outcome = json.loads((tmp_path / str(processes) / "results.json").read_text(encoding="utf-8"))
        told.append((outcome["after"]["confusion"], outcome["after"]["macro_f1"], losses))
    assert told[0][:2] == told[1][:2] and sum(map(sum, told[0][0])) == 9
    assert told[1][2] == pytest.approx(told[0][2], rel=1e-4)
