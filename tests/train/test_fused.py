"""Stepping inside backward: the same run to the bit, without all gradients at once."""

import csv
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_optim import OPTIMIZERS, TIED, built

from litfreeze.errors import UsageError
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.freeze.args import FrozenArgs
from litfreeze.freeze.memory import Thrift, estimate_memory
from litfreeze.freeze.words import plan_from_words
from litfreeze.precision import PRECISIONS
from litfreeze.train.args import EvalArgs, TrainArgs
from litfreeze.train.fused import FusedBackward, check_fused_backward

ALONE = TrainArgs(
    lr=1e-2, max_steps=4, global_batch_size=4, micro_batch_size=4, max_norm=None, weight_decay=0.1, watch_interval=0
)
QUICK = EvalArgs(max_samples=8, max_new_tokens=2)
METHODS = {
    "full": (finetune_full, {"trainable_layers": "10,11", "trainable_extra": "embed,final_norm"}),
    "lora": (finetune_lora, {"trainable_layers": "0-9", "full_layers": "11", "lora_dropout": 0.3, "use_dora": True}),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_ordinary_run_to_the_bit(tmp_path, method, optimizer):
    script, words = METHODS[method]
    weights, logs = [], []
    for fused in (False, True):
        out = tmp_path / f"fused-{fused}"
        train = replace(ALONE, optimizer=optimizer)
        script(out_dir=out, train=train, eval=QUICK, frozen=FrozenArgs(cache="off", fused_backward=fused), **words)
        weights.append(load_file(next((out / "final").glob("*.safetensors"))))
        with (out / "metrics.csv").open(encoding="utf-8") as rows:
            timed = ("seconds", "tokens_per_second")
            logs.append([{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(rows)])
    ordinary, fused = weights
    assert set(ordinary) == set(fused) and all(torch.equal(ordinary[name], fused[name]) for name in ordinary)
    assert logs[0] == logs[1] and any(row["grad_norm"] for row in logs[0])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_gradient_waits_for_another(optimizer):
    parameters, made = built(plan_from_words(TIED), TrainArgs(lr=1e-3, optimizer=optimizer))
    waiting = []
    for parameter in parameters.values():
        parameter.register_post_accumulate_grad_hook(
            lambda _: waiting.append(sum(p.grad is not None for p in parameters.values()))
        )
    fused = FusedBackward(made)
    sum(parameter.square().sum() for parameter in parameters.values()).backward()
    assert waiting == [1] * len(parameters) and all(parameter.grad is None for parameter in parameters.values())
    assert fused.norm() > 0


def test_the_estimate_counts_the_gradients_that_live_at_once():
    plan = plan_from_words(TIED, "10,11")
    sizes = [plan.sizes[f"blocks.{i}.mlp.{name}.weight"] for i, name in ((10, "up_proj"), (11, "up_proj"))]
    given = (plan, PRECISIONS["32-true"], lambda name: torch.float32, 8, 8)
    assert estimate_memory(*given).gradients == 4 * plan.n_trained
    assert estimate_memory(*given, Thrift(fused_backward=True)).gradients == 4 * sum(sizes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"max_norm": 1.0}, "Say --train.max_norm null"),
        ({"global_batch_size": 8}, r"--train\.global_batch_size 8 adds up several micro-batches .* Make the two equal"),
    ],
)
def test_what_it_cannot_do_is_told_before_anything_is_written(tmp_path, change, told):
    with pytest.raises(UsageError, match=told):
        finetune_full(out_dir=tmp_path / "run", train=replace(ALONE, **change), frozen=FrozenArgs(fused_backward=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("precision", "world_size", "told"),
    [("16-mixed", 1, "Choose bf16-mixed or 32-true"), ("32-true", 2, "--devices 1")],
)
def test_gradients_that_are_not_final_after_backward_are_told(precision, world_size, told):
    with pytest.raises(UsageError, match=told):
        check_fused_backward(ALONE, precision, world_size)
    check_fused_backward(ALONE, "bf16-mixed", 1)
