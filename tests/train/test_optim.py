"""The optimizers: who steps what, and what that needs; the learning rate at every step of every shape of run."""

import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litfreeze.config import Config
from litfreeze.errors import UsageError
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.freeze.memory import Thrift, estimate_memory
from litfreeze.freeze.plan import FreezePlan
from litfreeze.freeze.words import adapter_targets, plan_from_words
from litfreeze.lora import LoRA, add_lora, is_lora
from litfreeze.model import GPT
from litfreeze.precision import PRECISIONS
from litfreeze.presets import PRESETS
from litfreeze.train.args import EvalArgs, TrainArgs, seconds
from litfreeze.train.optim import Several, build_optimizer
from litfreeze.train.schedule import lr_at, set_lr, warmup_steps

TIED = Config.from_hf(PRESETS["demo"])
HAS_8BIT = importlib.util.find_spec("bitsandbytes") is not None
needs_8bit = pytest.mark.skipif(not HAS_8BIT, reason="bitsandbytes is not installed")
OPTIMIZERS = ["adamw", "muon", pytest.param("adamw8bit", marks=needs_8bit)]


def adapter_beside_full_blocks() -> FreezePlan:
    named = adapter_targets(TIED, "9", "all")
    lora = LoRA(dict.fromkeys(named, 8), dict.fromkeys(named, 16.0))
    return FreezePlan.adapter(TIED, lora, plan_from_words(TIED, "10,11", None, "embed").trained, 16.0, 0.1)


def built(plan: FreezePlan, train: TrainArgs) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    """A random model in which `plan` trains, by name, and the optimizer over it."""
    model = GPT(TIED)
    model.init_weights(0)
    if plan.lora is not None:
        add_lora(model, plan.lora)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if is_lora(name):
                torch.nn.init.normal_(parameter)
    plan.apply(model)
    return {n: p for n, p in model.named_parameters() if p.requires_grad}, build_optimizer(model, plan, train)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns(tmp_path, optimizer):
    train = TrainArgs(lr=1e-2, max_steps=12, optimizer=optimizer, global_batch_size=8)
    quick = EvalArgs(max_samples=24, max_new_tokens=2)
    reached = finetune_full(out_dir=tmp_path / "run", trainable_layers="10,11", train=train, eval=quick).outcome
    assert reached.after.loss < 0.75 * reached.before.loss
    assert f"optimizer: {optimizer}" in (tmp_path / "run/recipe.yaml").read_text() or optimizer == "adamw"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_parameter_has_the_state_of_its_optimizer(optimizer):
    plan = adapter_beside_full_blocks()
    parameters, made = built(plan, TrainArgs(lr=1e-3, optimizer=optimizer))
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    made.step()
    assert set(made.state) == set(parameters.values())
    by_muon = {name for name, parameter in parameters.items() if "momentum_buffer" in made.state[parameter]}
    in_8bit = {name for name, p in parameters.items() if "state1" in made.state[p]}
    matrices = {name for name, parameter in parameters.items() if parameter.ndim == 2}
    full = {name for name in matrices if name.startswith(("blocks.10.", "blocks.11."))}
    large = {name for name in matrices if parameters[name].numel() >= 4096} - {"embed.weight"}
    assert by_muon == (full if optimizer == "muon" else set())
    assert in_8bit == (large if optimizer == "adamw8bit" else set())
    assert full and large and all(made.state[parameters[name]]["state1"].dtype == torch.uint8 for name in in_8bit)
    assert {n for n, p in parameters.items() if "exp_avg_sq" in made.state[p]} == set(parameters) - by_muon - in_8bit
    held = [value for state in made.state.values() for name, value in state.items() if "qmap" not in name]
    taken = sum(value.nbytes for value in held if torch.is_tensor(value) and value.ndim)
    expected = estimate_memory(
        plan, PRECISIONS["32-true"], lambda name: torch.float32, 8, 8, Thrift(optimizer)
    ).optimizer
    assert taken == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_matrices_decay_and_nothing_else_by_the_rate_of_their_group(optimizer):
    parameters, made = built(adapter_beside_full_blocks(), TrainArgs(lr=1.0, optimizer=optimizer, weight_decay=0.5))
    set_lr(made, 1e-2)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    for name, parameter in parameters.items():
        scale = 16.0 if name.endswith("lora_B") else 1.0 if is_lora(name) else 0.1  # of the learning rate
        kept = 1 - 1e-2 * scale * 0.5 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), kept * before[name])


@given(st.sampled_from([1e-4, 3e-3]), st.sampled_from([1e-6, 1.0, 1e4]))
def test_a_step_of_muon_has_the_size_of_adamws_whatever_the_gradient(lr, size):
    parameters, made = built(plan_from_words(TIED, "10"), TrainArgs(lr=lr, optimizer="muon"))
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    torch.manual_seed(1)
    for parameter in parameters.values():
        parameter.grad = size * torch.randn_like(parameter)
    made.step()
    for name, parameter in parameters.items():
        if parameter.ndim == 2:
            moved = (parameter.detach() - before[name]).square().mean().sqrt().item()
            assert moved == pytest.approx(0.2 * lr, rel=0.3), name


def test_several_optimizers_are_one():
    _, made = built(plan_from_words(TIED, "10"), TrainArgs(lr=1e-3, optimizer="muon"))
    assert isinstance(made, Several) and len(made.parts) == 2
    set_lr(made, 0.25)
    assert [group["lr"] for part in made.parts for group in part.param_groups] == [0.25, 0.25]
    assert all(part.state is made.state for part in made.parts)


@pytest.mark.parametrize(
    ("script", "words", "optimizer", "told"),
    [
        (finetune_full, {"trainable_layers": "3", "trainable_modules": "norm"}, "muon", "trains none. Choose adamw"),
        (finetune_full, {"trainable_layers": "none", "trainable_extra": "embed"}, "muon", "whole matrices of blocks"),
        (finetune_lora, {"trainable_layers": "3"}, "muon", "whole matrices of blocks"),
        (finetune_full, {"trainable_layers": "none", "trainable_extra": "embed"}, "adamw8bit", "embeddings aside"),
        pytest.param(
            finetune_full,
            {"trainable_layers": "3"},
            "adamw8bit",
            r"pip install 'litfreeze\[bitsandbytes\]'",
            marks=pytest.mark.skipif(HAS_8BIT, reason="bitsandbytes is installed"),
        ),
    ],
)
def test_an_optimizer_that_would_do_nothing_or_cannot_run_is_refused(tmp_path, script, words, optimizer, told):
    with pytest.raises(UsageError, match=told):
        script(out_dir=tmp_path / "run", train=TrainArgs(max_steps=1, optimizer=optimizer), **words)
    assert not (tmp_path / "run").exists()


@needs_8bit
def test_a_library_that_does_not_run_here_is_told(tmp_path, monkeypatch):
    from bitsandbytes.optim import AdamW8bit

    def step(self):
        raise RuntimeError("All tensors must be\non the same GPU")

    monkeypatch.setattr(AdamW8bit, "step", step)
    with pytest.raises(UsageError, match=r"not run on cpu here \(All tensors must be on the same GPU\)\. Choose"):
        finetune_full(out_dir=tmp_path / "run", train=TrainArgs(max_steps=1, optimizer="adamw8bit"))
    assert not (tmp_path / "run").exists()


def test_a_torch_without_muon_is_told(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UsageError, match=r"muon needs torch 2\.9 or newer"):
        finetune_full(out_dir=tmp_path / "run", train=TrainArgs(max_steps=1, optimizer="muon"))


runs = st.integers(1, 200).flatmap(lambda steps: st.tuples(st.just(steps), st.integers(0, steps)))


@given(runs, st.sampled_from(["cosine", "linear", "constant"]), st.sampled_from([0.0, 1e-5]))
def test_it_rises_to_lr_and_falls_to_min_lr(run, schedule, floor):
    steps, warmup = run
    args = TrainArgs(lr=1e-3, lr_schedule=schedule, min_lr=floor)
    rates = [lr_at(step, steps, warmup, args) for step in range(steps)]
    assert all(0 < rate <= 1e-3 for rate in rates) and all(rate > floor for rate in rates[warmup:])
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert max(rates) == pytest.approx(1e-3)
    if schedule != "constant" and warmup < steps:
        assert lr_at(steps, steps, warmup, args) == pytest.approx(floor)


def test_the_warmup_is_three_percent_unless_said():
    assert warmup_steps(TrainArgs(), 1000) == 30
    assert warmup_steps(TrainArgs(), 1) == 1
    assert warmup_steps(TrainArgs(lr_warmup_steps=0), 1000) == 0
    assert warmup_steps(TrainArgs(lr_warmup_steps=7), 7) == 7
    with pytest.raises(UsageError, match="longer than the run of 7"):
        warmup_steps(TrainArgs(lr_warmup_steps=8), 7)


@pytest.mark.parametrize(("text", "expected"), [("90", 90), (1.5, 1.5), ("90s", 90), ("30m", 1800), ("1h30m", 5400)])
def test_times(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0}, {"lr": float("nan")}, {"lr": float("inf")}, {"epochs": 0}, {"max_steps": -1}, {"beta1": 1.0},
        {"micro_batch_size": 0}, {"max_norm": 0.0}, {"max_time": "soon"}, {"max_time": ""}, {"weight_decay": -0.1},
        {"keep_last": 0}, {"lr_warmup_steps": -1},
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused_at_once(wrong):
    with pytest.raises(UsageError) as error:
        TrainArgs(**wrong)
    assert f"--train.{next(iter(wrong))}" in str(error.value)


def test_evaluation_too():
    with pytest.raises(UsageError, match=r"--eval\.patience"):
        EvalArgs(patience=0)
