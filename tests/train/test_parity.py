"""The loss curve of a plain transformers + torch loop, step by step."""

import csv
import json

import pytest
import torch
from plain_loop import plain_loop
from transformers import AutoModelForCausalLM

from litfreeze.data.args import DataArgs
from litfreeze.demo import TRAIN_FILE
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.place import PlaceArgs
from litfreeze.train.args import EvalArgs, TrainArgs

RECORDS, EPOCHS, BATCH, LR, SEED = 32, 3, 4, 1e-4, 7


def test_three_epochs_of_two_blocks(smollm2, tmp_path):
    lines = TRAIN_FILE.read_text(encoding="utf-8").splitlines()[:RECORDS]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines), encoding="utf-8")
    finetune_full(
        checkpoint_dir=smollm2,
        out_dir=tmp_path / "run",
        trainable_layers="28,29",
        data=DataArgs(path=data, val_split_fraction=0),
        train=TrainArgs(
            lr=LR, epochs=EPOCHS, global_batch_size=BATCH, micro_batch_size=BATCH, lr_schedule="constant",
            lr_warmup_steps=0, beta2=0.999, max_norm=None,
        ),
        eval=EvalArgs(max_new_tokens=1),
        place=PlaceArgs("32-true"),
        seed=SEED,
    )  # fmt: skip
    with (tmp_path / "run/metrics.csv").open() as rows:
        ours = [float(row["train_loss"]) for row in csv.DictReader(rows)]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("model.layers.28.", "model.layers.29.")))
    theirs = plain_loop(model, smollm2, [json.loads(line) for line in lines], EPOCHS, BATCH, LR, SEED)
    assert len(ours) == len(theirs) == EPOCHS * RECORDS // BATCH
    assert ours == pytest.approx(theirs, rel=1e-3)
