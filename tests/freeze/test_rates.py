"""Learning rates by layer: the words, the factors in the plan, and what the optimizer makes of them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litfreeze.__main__ import main
from litfreeze.config import Config
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import UsageError
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.freeze.args import RateArgs
from litfreeze.freeze.plan import FreezePlan, part_of
from litfreeze.freeze.rates import with_rates
from litfreeze.freeze.words import adapter_targets, plan_from_words
from litfreeze.lora import LoRA
from litfreeze.model import GPT
from litfreeze.train.args import EvalArgs, TrainArgs
from litfreeze.train.optim import build_optimizer
from litfreeze.train.schedule import set_lr

TIED = Config.from_file(MODEL_DIR / "config.json")
UNTIED = replace(TIED, tie_embeddings=False)
LR = 5e-5


def rates(plan: FreezePlan) -> dict:
    """The rates of each part."""
    found: dict = {}
    for name in plan.trained:
        found.setdefault(part_of(name), set()).add(float(f"{LR * plan.lr_scale(name):.6g}"))
    return found


def by_words(plan: FreezePlan, text: str) -> dict:
    return rates(with_rates(plan, RateArgs(layer_lr=text), LR))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4:1e-6", {4: 1e-6}),
        ("4,6-8:1e-6, head:1e-3", {4: 1e-6, 6: 1e-6, 7: 1e-6, 8: 1e-6, "head": 1e-3}),
        ("last:2:1e-4", {10: 1e-4, 11: 1e-4}),
        ("-2::1e-4,first:5:0.002", {10: 1e-4, 11: 1e-4, 4: 0.002}),
        ("every:4,5,final_norm:1e-6", {7: 1e-6, 11: 1e-6, 5: 1e-6, "final_norm": 1e-6}),
        ("embed:1e-7", {"embed": 1e-7}),
    ],
)
def test_named_rates_hold_and_the_rest_learns_at_the_runs_rate(text, expected):
    layers = "0-11" if "first" in text or "every" in text else "4-11"
    plan = plan_from_words(UNTIED, layers, trainable_extra="embed,head,final_norm")
    if "first:5" in text:
        expected = {**expected, **dict.fromkeys(range(4), 0.002)}
    if "every:4" in text:
        expected = {**expected, 3: 1e-6}
    whole = dict.fromkeys(map(part_of, plan.trained), LR) | expected
    assert by_words(plan, text) == {part: {rate} for part, rate in whole.items()}


@given(st.dictionaries(st.integers(0, 11), st.sampled_from([1e-6, 3e-5, 0.5]), min_size=1))
def test_any_division_of_blocks_can_be_said(wanted):
    text = ",".join(f"{block}:{rate}" for block, rate in wanted.items())
    found = by_words(plan_from_words(UNTIED, "all"), text)
    assert found == {block: {wanted.get(block, LR)} for block in range(12)}


def test_rates_fall_with_the_depth_from_the_highest_block_that_trains():
    plan = plan_from_words(TIED, "2,8,9", trainable_extra="embed,final_norm")
    plan = with_rates(plan, RateArgs(lr_decay_by_depth=0.5), LR)
    scales = {part_of(name): plan.lr_scale(name) for name in plan.trained}
    assert scales == {9: 1, 8: 0.5, 2: 0.5**7, "embed": 0.5**10, "final_norm": 1}


def test_loraplus_and_weights_in_full_keep_their_ratios():
    targets = adapter_targets(UNTIED, "0-9", "q_proj")
    lora = LoRA(dict.fromkeys(targets, 4), dict.fromkeys(targets, 8.0))
    full = plan_from_words(UNTIED, "10,11").trained
    plan = FreezePlan.adapter(UNTIED, lora, full, lora_plus_ratio=16, full_lr_ratio=0.1)
    decayed = with_rates(plan, RateArgs(lr_decay_by_depth=0.5), LR)
    assert decayed.lr_scale("blocks.10.mlp.up_proj.weight") == pytest.approx(0.1 * 0.5)
    assert decayed.lr_scale("blocks.9.attn.q_proj.lora_B") == pytest.approx(16 * 0.25)
    assert decayed.lr_scale("blocks.9.attn.q_proj.lora_A") == pytest.approx(0.25)
    named = with_rates(plan, RateArgs(layer_lr="9:1e-5,11:1e-6"), LR)  # as it is said: without full_lr_ratio
    assert named.lr_scale("blocks.9.attn.q_proj.lora_B") * LR == pytest.approx(16e-5)
    assert named.lr_scale("blocks.11.mlp.up_proj.weight") * LR == pytest.approx(1e-6)
    assert named.lr_scale("blocks.10.mlp.up_proj.weight") == pytest.approx(0.1)


def test_the_schedule_scales_each_group_and_norms_do_not_decay():
    plan = with_rates(plan_from_words(UNTIED, "10,11"), RateArgs(layer_lr="10:1e-6"), LR)
    model = GPT(UNTIED)
    plan.apply(model)
    optimizer = build_optimizer(model, plan, TrainArgs(lr=LR, weight_decay=0.1))
    set_lr(optimizer, LR / 2)
    by_id = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = by_id[id(p)]
            assert group["lr"] == pytest.approx(5e-7 if ".10." in name else LR / 2)
            assert group["weight_decay"] == (0.0 if "norm" in name else 0.1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("4", "no learning rate"),
        ("4:2", "no learning rate"),
        ("4:1e-5,", "no learning rate"),
        ("", "no learning rate"),
        (":1e-5", "no learning rate"),
        ("4:1e-5,4-6:1e-6", "block 4 has two rates, 1e-05 and 1e-06"),
        ("head:1e-5,head:1e-6", "head has two rates"),
        ("3:1e-5", "block 3 has a rate and does not train; what trains: 4-11, final_norm"),
        ("head:1e-5", "head has a rate"),
        ("12:1e-5", "ids 0 to 11"),
        ("haed:1e-5", "not understood"),
        ("none:1e-5", "1e-05 is the rate of no block"),
    ],
)
def test_what_is_no_rate_is_told(text, told):
    plan = plan_from_words(TIED, "4-11", trainable_extra="final_norm")
    with pytest.raises(UsageError) as error:
        with_rates(plan, RateArgs(layer_lr=text), LR)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_tied_head_has_the_embeddings_rate():
    plan = plan_from_words(TIED, "11", trainable_extra="embed")
    with pytest.raises(UsageError, match="Give embed a rate"):
        with_rates(plan, RateArgs(layer_lr="head:1e-5"), LR)


def test_a_named_rate_wins_over_the_decay():
    plan = plan_from_words(UNTIED, "9-11", trainable_extra="head")
    plan = with_rates(plan, RateArgs(layer_lr="head:5e-3,10:1e-6", lr_decay_by_depth=0.5), LR)
    assert rates(plan) == {11: {LR}, 10: {1e-6}, 9: {LR / 4}, "head": {5e-3}}


@pytest.mark.parametrize("words", [["--lr_decay_by_depth", "1.5"], ["--layer_lr", "-2:1e-5"]])
def test_the_command_line_refuses_what_means_nothing(words, capsys):
    assert main(["finetune", "full", "--trainable_layers", "10,11", *words]) == 2
    assert words[0].strip("-") in capsys.readouterr().err


@pytest.mark.parametrize("script", [finetune_full, finetune_lora])
def test_a_block_moves_by_its_own_rate(tmp_path, script, capsys):
    """AdamW's first step is as long as the rate, in every element."""
    script(
        out_dir=tmp_path / "run", trainable_layers="9-11", rates=RateArgs(layer_lr="9:1e-5,10:1e-3"),
        train=TrainArgs(lr=1e-4, max_steps=1, global_batch_size=4, max_norm=None, lr_warmup_steps=0),
        eval=EvalArgs(max_samples=4, max_new_tokens=1),
    )  # fmt: skip
    told = capsys.readouterr().out
    assert all(f"lr {rate}" in told for rate in ("1e-05", "0.0001", "0.001"))
    resume = [line.split(",") for line in (tmp_path / "run/blocks.csv").read_text().splitlines()[1:]]
    drift = {int(part): float(value) for _, part, _, _, value in resume}
    assert drift[10] / drift[11] == pytest.approx(10, rel=0.2) and drift[11] / drift[9] == pytest.approx(10, rel=0.2)
