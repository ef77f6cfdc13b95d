"""The learning rate at every step of every shape of run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litfreeze.errors import UsageError
from litfreeze.train.args import EvalArgs, TrainArgs, seconds
from litfreeze.train.optim import lr_at, warmup_steps

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
