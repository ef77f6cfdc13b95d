"""The loss curve of a plain transformers + torch loop, step by step."""

import csv
import json

import pytest
import torch

from litfreeze.data.args import DataArgs
from litfreeze.data.batches import epoch_order
from litfreeze.demo import TRAIN_FILE
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.train.args import EvalArgs, TrainArgs

RECORDS, EPOCHS, BATCH, LR, SEED = 32, 3, 4, 1e-4, 7


def plain_loop(model_dir, records):
    """How a user of transformers freezes all but blocks 28 and 29 and trains: padded batches, fused AdamW."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("model.layers.28.", "model.layers.29.")))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    samples = []
    for record in records:
        chat = [{"role": "user", "content": record["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        response = tokenizer.encode(record["completion"] + tokenizer.eos_token, add_special_tokens=False)
        samples.append((torch.tensor(prompt + response), torch.tensor([-100] * len(prompt) + response)))
    losses = []
    for epoch in range(EPOCHS):
        order = epoch_order(len(samples), SEED, epoch)
        for i in range(0, len(order), BATCH):
            ids, labels = zip(*(samples[j] for j in order[i : i + BATCH]), strict=True)
            ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


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
        precision="32-true",
        seed=SEED,
    )  # fmt: skip
    with (tmp_path / "run/metrics.csv").open() as rows:
        ours = [float(row["train_loss"]) for row in csv.DictReader(rows)]
    theirs = plain_loop(smollm2, [json.loads(line) for line in lines])
    assert len(ours) == len(theirs) == EPOCHS * RECORDS // BATCH
    assert ours == pytest.approx(theirs, rel=1e-3)
