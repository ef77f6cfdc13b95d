"""What a run is told it will take: the arithmetic adds up, and every plan has a speed. How near the estimate is to what
a run takes shows benchmarks/estimates.py."""

import math

import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st

from litfreeze.config import Config
from litfreeze.freeze.plan import FreezePlan
from litfreeze.freeze.savings import Pass, Rows, Speed, work
from litfreeze.lora import LoRA, linear_layers
from litfreeze.precision import PRECISIONS
from litfreeze.presets import PRESETS
from litfreeze.train.speed import measure_speed

CPU = torch.device("cpu")


@st.composite
def plans(draw) -> FreezePlan:
    """Of any family: everything, an adapter, or some blocks, with the head or without any block."""
    config = Config.from_hf(draw(st.one_of(FAMILIES.values())), "drawn")
    kind = draw(st.sampled_from(["everything", "lora", "blocks", "final_norm"]))
    if kind == "everything":
        return FreezePlan.everything(config)
    blocks = draw(st.sets(st.integers(0, config.n_layer - 1), min_size=1))
    if kind == "lora":
        modules = [name for name in linear_layers(config) if name.startswith(tuple(f"blocks.{i}." for i in blocks))]
        return FreezePlan.adapter(config, LoRA(dict.fromkeys(modules, 2), dict.fromkeys(modules, 4.0)))
    if kind == "final_norm":
        return FreezePlan.choose(config, "none", extra=["final_norm"])
    return FreezePlan.choose(config, sorted(blocks))


@given(plans(), st.integers(1, 5), st.integers(1, 40))
def test_the_work_of_all_is_that_of_its_blocks_and_the_head(plan, records, length):
    """Where every token is learned; else the last block and the head have less to do."""
    rows = Rows.full(records, length)
    whole, parts = work(plan, rows), [work(plan, rows, i) for i in range(plan.n_layer)]
    for kind in ("prefix", "forward", "backward"):
        assert getattr(whole, kind) == sum(getattr(part, kind) for part in parts)
    assert whole.head > 0 == sum(part.head for part in parts)
    assert whole.total == whole.prefix + whole.above
    assert (whole.prefix > 0) == (plan.lowest > 0)
    assert (whole.backward > 0) == (plan.lowest < plan.n_layer)


@settings(max_examples=25)
@given(plans(), st.sampled_from(["32-true", "bf16-mixed", "bf16-true"]), st.booleans())
def test_every_plan_has_a_speed(plan, precision, recompute):
    stored = dict.fromkeys(plan.sizes, torch.bfloat16)
    speed = measure_speed(plan, PRECISIONS[precision], stored.__getitem__, CPU, 2, 8, recompute)
    known = measure_speed(plan, PRECISIONS[precision], stored.__getitem__, CPU, 2, 8, recompute)
    assert known == speed  # it is not measured twice
    epoch = Pass.of(plan, Rows.full(4, 8), speed, steps=2)
    assert 0 < epoch.cached <= epoch.seconds < math.inf
    assert (epoch.cached < epoch.seconds) == (plan.lowest > 0)


@pytest.mark.parametrize("rate", [1.0, 1e9])
def test_seconds_are_flops_by_their_rates(rate):
    config = Config.from_hf(PRESETS["demo"], "demo")
    done = work(FreezePlan.everything(config), Rows.full(1, 8))
    assert Speed(rate, rate, rate, rate).seconds(done) == pytest.approx(done.total / rate)
