"""The loss curve of PEFT in a plain loop, step by step, from the same adapter: LoRA, rsLoRA and DoRA."""

import csv
import json

import pytest
import torch
from peft import PeftModel
from plain_loop import plain_loop
from transformers import AutoModelForCausalLM

from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.checkpoint.write import write_peft
from litfreeze.data.args import DataArgs
from litfreeze.demo import TRAIN_FILE
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.freeze.words import adapter_targets
from litfreeze.lora import LoRA, fresh_tensors, linear_layers
from litfreeze.place import PlaceArgs
from litfreeze.train.args import EvalArgs, TrainArgs

RECORDS, EPOCHS, BATCH, LR, SEED = 32, 3, 4, 1e-3, 7


KINDS = [{}, *(pytest.param({kind: True}, marks=pytest.mark.matrix) for kind in ("use_rslora", "use_dora"))]


@pytest.mark.parametrize("kind", KINDS, ids=["LoRA", "rsLoRA", "DoRA"])
def test_the_losses_are_those_of_peft(smollm2, tmp_path, kind):
    lines = TRAIN_FILE.read_text(encoding="utf-8").splitlines()[:RECORDS]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines), encoding="utf-8")
    words = {"trainable_layers": "20-29", "lora_targets": "q_proj,v_proj,down_proj", "lora_r": 4, **kind}
    result = finetune_lora(
        checkpoint_dir=smollm2,
        out_dir=tmp_path / "run",
        lora_dropout=0.0,
        data=DataArgs(path=data, val_split_fraction=0),
        train=TrainArgs(
            lr=LR, epochs=EPOCHS, global_batch_size=BATCH, micro_batch_size=BATCH, lr_schedule="constant",
            lr_warmup_steps=0, beta2=0.999, max_norm=None,
        ),
        eval=EvalArgs(max_new_tokens=1),
        place=PlaceArgs("32-true"),
        seed=SEED,
        **words,
    )  # fmt: skip
    with (tmp_path / "run/metrics.csv").open() as rows:
        ours = [float(row["train_loss"]) for row in csv.DictReader(rows)]
    # The adapter that the run began with, drawn again from its seed
    base = open_checkpoint(smollm2)
    targets = adapter_targets(base.config, words["trainable_layers"], words["lora_targets"])
    lora = LoRA(
        dict.fromkeys(targets, 4), dict.fromkeys(targets, 16.0), rslora="use_rslora" in kind, dora="use_dora" in kind
    )
    assert open_checkpoint(result.checkpoint_dir).lora == lora
    fresh = fresh_tensors(lora, linear_layers(base.config), lambda module: base.read(f"{module}.weight"), SEED)
    write_peft(tmp_path / "peft", base.with_lora(lora, fresh))
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, tmp_path / "peft", is_trainable=True).train()
    theirs = plain_loop(model, smollm2, [json.loads(line) for line in lines], EPOCHS, BATCH, LR, SEED)
    assert len(ours) == len(theirs) == EPOCHS * RECORDS // BATCH
    assert theirs[-1] < theirs[0] / 3  # it has learned, so the adapter and not the base made these losses
    assert ours == pytest.approx(theirs, rel=1e-3)
