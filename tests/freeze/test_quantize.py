"""Frozen weights in 8 and 4 bits: near what they were, smaller, passed by gradients, and never on disk."""

import csv
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from stops import ctrl_c_in_step

from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import UsageError
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.freeze.args import FrozenArgs, ThawArgs
from litfreeze.freeze.memory import Thrift, estimate_memory
from litfreeze.freeze.plan import FreezePlan
from litfreeze.freeze.quantize import Quantised, _library, check_quantize, quantised_bytes, quantize_frozen
from litfreeze.freeze.words import plan_from_words
from litfreeze.lora import LoRA, fresh_tensors, linear_layers
from litfreeze.model import CAST, linear
from litfreeze.place import PlaceArgs
from litfreeze.precision import PRECISIONS
from litfreeze.train.args import EvalArgs, TrainArgs

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

CPU = torch.device("cpu")
ERRORS = {"int8": 0.01, "nf4": 0.11}  # of normally drawn weights, relative
DEMO = open_checkpoint(MODEL_DIR)
BASE = load_file(MODEL_DIR / "litfreeze.safetensors")
FEW = TrainArgs(lr=1e-3, max_steps=4, global_batch_size=8, micro_batch_size=4, watch_interval=0)
QUICK = EvalArgs(max_samples=16, max_new_tokens=4)
TOKENS = torch.arange(40).view(2, 20)

kinds = pytest.mark.parametrize("kind", ERRORS)


def normal(*shape, seed=0, scale=0.02):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(weight):
    """The weight that a quantised one stands for."""
    return torch.cat([part.to(torch.float32) for part in weight.split(CAST)])


def demo(plan, kind=None, dtype=torch.float32, checkpoint=DEMO):
    """The demo model with `plan` applied, and its frozen weights in `kind`."""
    gpt = load_model(checkpoint, lambda _: dtype)
    plan.apply(gpt)
    if kind is not None:
        quantize_frozen(gpt, plan, kind, CPU)
    return gpt


def adapted(dora=False):
    """The demo with an adapter that is not at its beginning, and its plan."""
    on = ["blocks.6.attn.q_proj", "blocks.8.mlp.up_proj"]
    lora = LoRA(dict.fromkeys(on, 4), dict.fromkeys(on, 8.0), dora=dora)
    tensors = fresh_tensors(lora, linear_layers(DEMO.config), lambda name: DEMO.read(f"{name}.weight").float(), 0)
    tensors = {name: normal(*t.shape) if name.endswith("lora_B") else t for name, t in tensors.items()}
    return DEMO.with_lora(lora, tensors), FreezePlan.adapter(DEMO.config, lora)


@kinds
@pytest.mark.parametrize("shape", [(64, 64), (3, 7), (1, 130), (CAST + 5, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_stays_near_and_is_smaller(kind, shape, dtype):
    weight = normal(*shape).to(dtype)
    kept = Quantised(weight, kind, CPU)
    assert plain(kept).shape == shape
    assert (plain(kept) - weight.float()).norm() < ERRORS[kind] * 1.4 * weight.float().norm()
    for used in (torch.float32, torch.bfloat16, torch.float16):
        assert {part.to(used).dtype for part in kept.split(CAST)} == {used}


@kinds
def test_rows_of_zeros_stay_zeros(kind):
    weight = normal(8, 64)
    weight[3] = 0
    assert not plain(Quantised(weight, kind, CPU))[3].any()


@kinds
@pytest.mark.parametrize("bias", [None, normal(48)])
def test_it_multiplies_and_passes_gradients_as_the_weight_it_stands_for(kind, bias):
    kept = Quantised(normal(48, 32), kind, CPU)
    x = normal(5, 32, seed=1, scale=1.0).requires_grad_()
    y, expected = linear(x, kept, bias), F.linear(x, plain(kept), bias)
    torch.testing.assert_close(y, expected)
    slope = normal(5, 48, seed=2)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, slope)[0] for out in (y, expected)))
    step = normal(5, 32, seed=3, scale=1e-2)  # finite differences are exact up to rounding: the layer is linear
    change = ((linear(x + step, kept, bias) - linear(x - step, kept, bias)) / 2 * slope).sum()
    torch.testing.assert_close(change, (torch.autograd.grad(linear(x, kept, bias), x, slope)[0] * step).sum())


@kinds
def test_under_autocast_it_is_used_in_the_dtype_of_autocast(kind):
    kept, x = Quantised(normal(48, 32), kind, CPU), normal(5, 32, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, kept, normal(48))
        expected = F.linear(x, plain(kept), normal(48))
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=1e-3)
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    torch.testing.assert_close(gradient, plain(kept).sum(0).expand(5, -1), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.03), ("nf4", 0.4)])
def test_only_frozen_linear_weights_from_the_lowest_trained_block_up_change(kind, error):
    plan = plan_from_words(DEMO.config, "4,6", "mlp")
    gpt, before = demo(plan, kind), demo(plan)
    names = [name for name, _ in before.named_parameters()]
    assert [name for name, _ in gpt.named_parameters()] == names
    kept = {name for name, weight in gpt.named_parameters() if isinstance(weight, Quantised)}
    above = [name for name in names if name.startswith(tuple(f"blocks.{i}." for i in range(4, 12)))]
    assert kept == {n for n in above if "_proj" in n and n not in plan.trained} == set(quantised_bytes(plan, kind))
    same = [(weight, before.get_parameter(name)) for name, weight in gpt.named_parameters() if name not in kept]
    assert all(torch.equal(*pair) for pair in same)
    assert (gpt(TOKENS) - before(TOKENS)).norm() < error * before(TOKENS).norm()


@kinds
@pytest.mark.parametrize("dora", [None, False, True])
def test_gradients_are_those_of_the_model_with_the_weights_it_stands_for(kind, dora):
    """Below quantised blocks, between them, and in adapters on quantised weights."""
    checkpoint, plan = (DEMO, plan_from_words(DEMO.config, "4,9")) if dora is None else adapted(dora)
    gpt, twin = demo(plan, kind, checkpoint=checkpoint), demo(plan, checkpoint=checkpoint)
    with torch.no_grad():
        for name, weight in gpt.named_parameters():
            if isinstance(weight, Quantised):
                twin.get_parameter(name).copy_(plain(weight))
    for model in (gpt, twin):
        model(TOKENS).logsumexp(-1).sum().backward()
    for name, weight in gpt.named_parameters():
        expected = twin.get_parameter(name).grad
        assert (weight.grad is not None) == (name in plan.trained), name
        if expected is not None:
            torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-5)


@kinds
def test_the_bytes_are_those_of_the_estimate(kind):
    plan = plan_from_words(DEMO.config, "4")
    gpt = demo(plan, kind)
    expected = quantised_bytes(plan, kind)
    for name, size in expected.items():
        (part,) = gpt.get_parameter(name).split(CAST)
        held = (part.steps, part.step) if kind == "int8" else (part.packed, part.state.absmax)
        assert sum(tensor.nbytes for tensor in held) == size, name
    plain_bytes, less = (
        estimate_memory(plan, PRECISIONS["32-true"], lambda _: torch.float32, 64, 64, Thrift(quantize=q)).weights
        for q in (None, kind)
    )
    assert plain_bytes - less == sum(4 * plan.sizes[name] - size for name, size in expected.items())
    assert sum(expected.values()) < (0.27 if kind == "int8" else 0.13) * sum(4 * plan.sizes[name] for name in expected)


MEASURE = """
import sys, torch
from litfreeze.freeze.quantize import Quantised
from litfreeze.model import linear

def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

Quantised(torch.ones(64, 64), sys.argv[1], torch.device("cpu"))
x = torch.ones(8, 1024, requires_grad=True)
linear(x, torch.ones(4096, 1024)).sum().backward()
before = held()
weights = [Quantised(torch.randn(1024, 1024), sys.argv[1], torch.device("cpu")) for _ in range(32)]
kept = held()
for weight in weights:
    x = linear(x, weight)
print(kept - before, held() - before)
"""


@kinds
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_falls_and_nothing_plain_is_kept_for_backward(kind):
    """32 layers of 4 MiB in fp32, from outside: of 128 MiB a quarter or an eighth stays, before backward too."""
    done = subprocess.run([sys.executable, "-c", MEASURE, kind], capture_output=True, text=True, check=True)
    stored, in_forward = map(float, done.stdout.split())
    most = 32 + 24 if kind == "int8" else 16 + 24
    assert stored < most and in_forward < most, (stored, in_forward)


@kinds
def test_a_run_writes_the_frozen_tensors_of_the_base(kind, tmp_path):
    result = finetune_full(
        out_dir=tmp_path / "run", trainable_layers="4,5", train=FEW, eval=QUICK,
        frozen=FrozenArgs(freeze_quantize=kind, cache="ram"),
    )  # fmt: skip
    after = load_file(result.checkpoint_dir / "litfreeze.safetensors")
    plan = plan_from_words(DEMO.config, "4,5")
    assert {name for name in BASE if not torch.equal(BASE[name], after[name])} == plan.trained
    assert after.keys() == BASE.keys() and all(after[name].dtype == BASE[name].dtype for name in BASE)
    assert result.proof.frozen_that_changed == [] and result.proof.quantised == {kind: 42}
    assert f", 42 of them kept in {kind} while training" in (tmp_path / "run" / "report.md").read_text("utf-8")
    assert result.outcome.after.loss < result.outcome.before.loss


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_an_adapter_trains_over_quantised_weights(precision, tmp_path):
    result = finetune_lora(
        out_dir=tmp_path / "run", trainable_layers="6-11", lora_r=4, train=FEW, eval=QUICK, place=PlaceArgs(precision),
        frozen=FrozenArgs(freeze_quantize="nf4"),
    )  # fmt: skip
    assert result.proof.quantised == {"nf4": 42} and result.proof.frozen_that_changed == []
    assert result.proof.trained_that_did_not == []
    assert result.outcome.after.loss < result.outcome.before.loss


def test_a_resumed_run_is_its_uninterrupted_twin_and_keeps_its_kind(tmp_path):
    words = {"trainable_layers": "4", "eval": QUICK, "frozen": FrozenArgs(freeze_quantize="nf4", cache="off")}
    words["train"] = replace(FEW, save_interval=2)
    whole = finetune_full(out_dir=tmp_path / "whole", **words)
    with ctrl_c_in_step(4), pytest.raises(KeyboardInterrupt):
        finetune_full(out_dir=tmp_path / "cut", **words)
    with pytest.raises(UsageError, match=r"--freeze_quantize int8 stands beside --resume.*made with nf4"):
        finetune_full(resume=tmp_path / "cut", frozen=FrozenArgs(freeze_quantize="int8"))
    resumed = finetune_full(resume=tmp_path / "cut")
    first, second = (load_file(run.checkpoint_dir / "litfreeze.safetensors") for run in (whole, resumed))
    assert resumed.proof.quantised and all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_train_as_one_does(tmp_path):
    losses = []
    for devices in ("1", "2"):
        out = tmp_path / devices
        words = (
            "full --trainable_layers 4 --freeze_quantize nf4 --train.max_steps 2 --accelerator cpu --eval.max_samples 8"
        )
        command = [
            sys.executable,
            "-m",
            "litfreeze",
            "finetune",
            *words.split(),
            "--devices",
            devices,
            "--out_dir",
            out,
        ]
        subprocess.run(command, capture_output=True, timeout=300, check=True)
        rows = list(csv.DictReader((out / "metrics.csv").open(encoding="utf-8")))
        losses.append([float(row[column]) for row in rows for column in ("train_loss", "val_loss") if row[column]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_where_nothing_frozen_stands_above_it_is_refused():
    everything = FreezePlan.everything(DEMO.config)
    for plan, why in ((everything, "nothing is frozen"), (plan_from_words(DEMO.config, "-1"), "lies below")):
        with pytest.raises(UsageError, match=why):
            check_quantize(plan, "int8", CPU)
    check_quantize(plan_from_words(DEMO.config, "10"), "int8", CPU)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    _library.cache_clear()
    with monkeypatch.context() as patch, pytest.raises(UsageError, match=r"pip install 'litfreeze\[bitsandbytes\]'"):
        patch.setitem(sys.modules, "bitsandbytes", None)
        patch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
        check_quantize(plan_from_words(DEMO.config, "0", "mlp"), "nf4", CPU)


def test_a_device_on_which_it_does_not_run_is_refused(monkeypatch):
    monkeypatch.setattr("bitsandbytes.functional.name2qmap", {})  # it keeps a table on the first device it meets
    with pytest.raises(UsageError, match="--freeze_quantize nf4: bitsandbytes does not run on meta here"):
        check_quantize(plan_from_words(DEMO.config, "0", "mlp"), "nf4", torch.device("meta"))


def test_what_may_become_a_prefix_is_not_quantised(tmp_path):
    """Below the first stage lies what is kept for other runs, under the hash of the plain weights."""
    words = {"eval": QUICK, "thaw": ThawArgs(unfreeze="0:9; 2:4"), "train": FEW}

    def run(name: str, cache: str, **more):
        frozen = FrozenArgs(cache="disk", cache_dir=tmp_path / cache, **more)
        return finetune_full(out_dir=tmp_path / name, frozen=frozen, **words)

    quantised = run("quantised", "cache", freeze_quantize="nf4")
    assert quantised.proof.quantised == {"nf4": 14}  # of blocks 10 and 11; 5 to 8 lie below block 9
    after, alone = run("after", "cache"), run("alone", "another cache")
    first, second = (load_file(result.checkpoint_dir / "litfreeze.safetensors") for result in (after, alone))
    assert all(torch.equal(first[name], second[name]) for name in first)
