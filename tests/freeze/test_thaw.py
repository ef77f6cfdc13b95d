"""When blocks train: the words for it, the stages they make, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litfreeze.config import Config
from litfreeze.errors import UsageError
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.freeze.args import FactoryArgs, ThawArgs
from litfreeze.freeze.plan import FreezePlan, block_of
from litfreeze.freeze.thaw import Lisa, Unfreezing, stages
from litfreeze.presets import PRESETS
from litfreeze.train.args import TrainArgs

N = 12
CONFIG = Config.from_hf(PRESETS["demo"])


def planned(text: str, max_steps: int = 100, per_epoch: int = 25, warmup: int = 10, extra: tuple = ()):
    unfreezing = Unfreezing.parse(text, N)
    plan = FreezePlan.choose(CONFIG, sorted(unfreezing.blocks), extra=extra)
    return stages(plan, unfreezing, max_steps, per_epoch, warmup)


def test_the_demo_model_has_twelve_blocks():
    assert CONFIG.n_layer == N


@pytest.mark.parametrize(
    ("text", "starts", "layers"),
    [
        ("0:10,11; 40:8-9", [0, 40], [[10, 11], [8, 9, 10, 11]]),
        ("0:-2:; 1e:8,9", [0, 25], [[10, 11], [8, 9, 10, 11]]),
        ("0:11;1.5e:10;50%:9", [0, 37, 50], [[11], [10, 11], [9, 10, 11]]),
        ("0:11; 20:10; 20:9", [0, 20], [[11], [9, 10, 11]]),
        ("0:11; 30:10; 60:freeze 11; 80:11", [0, 30, 60, 80], [[11], [10, 11], [10], [10, 11]]),
        ("gradual:4", [0, 25, 50, 75], [[11], [10, 11], [9, 10, 11], [8, 9, 10, 11]]),
        ("0:8,10:", [0], [[8, 10, 11]]),
        ("0%:11; 99.9%:10", [0, 99], [[11], [10, 11]]),
    ],
)
def test_words_and_the_stages_they_make(text, starts, layers):
    found = planned(text)
    assert [stage.start for stage in found] == starts
    assert [stage.plan.layers for stage in found] == layers
    assert [stage.stop for stage in found] == [*starts[1:], 100]


def test_nothing_that_trained_is_taken_for_untouched():
    found = planned("0:8; 30:11; 60:freeze 8; 80:5")
    assert [stage.plan.lowest for stage in found] == [8, 8, 11, 5]
    assert [stage.untouched for stage in found] == [8, 8, 8, 5]
    assert [stage.so_far.layers for stage in found] == [[8], [8, 11], [8, 11], [5, 8, 11]]


def test_what_stands_outside_of_the_blocks_trains_all_the_time():
    found = planned("40:11", extra=["final_norm"])
    assert [sorted(stage.plan.trained)[-1] for stage in found] == ["final_norm.weight"] * 2
    assert [stage.plan.layers for stage in found] == [[], [11]]


def test_a_block_that_thaws_warms_up_and_does_so_again_when_it_thaws_again():
    found = planned("0:11; 20:10; 50:freeze 10; 70:10")
    # as long as the run's own warmup, and no more than a fifth of the stage in which it thaws
    assert [stage.rises for stage in found] == [{}, {10: (20, 6)}, {}, {10: (70, 6)}]
    assert planned("0:11; 20:10; 30:9")[2].rises == {10: (20, 2), 9: (30, 10)}
    assert planned("0:11; 20:10", warmup=0)[1].rises == {10: (20, 0)}


@given(st.data())
def test_stages_are_a_simulation_step_by_step(data):
    """Whatever changes are drawn, as long as they are allowed: at every step those blocks train that a plain walk
    through the changes says."""
    max_steps = data.draw(st.integers(2, 60))
    steps = sorted(data.draw(st.sets(st.integers(0, max_steps - 1), min_size=1, max_size=6)) | {0})
    training: set[int] = set()
    parts, expected = [], {}
    for step in steps:
        held = sorted(training)
        if len(held) > 1 and data.draw(st.booleans()):
            blocks = data.draw(st.sets(st.sampled_from(held), min_size=1, max_size=len(held) - 1))
            parts.append(f"{step}:freeze {','.join(map(str, sorted(blocks)))}")
            training -= blocks
        elif len(training) < N:
            others = sorted(set(range(N)) - training)
            blocks = data.draw(st.sets(st.sampled_from(others), min_size=1))
            parts.append(f"{step}: {','.join(map(str, sorted(blocks)))}")
            training |= blocks
        else:
            continue
        expected[step] = sorted(training)
    found = planned(" ; ".join(parts), max_steps)
    ever: set[int] = set()
    for stage in found:
        assert stage.start < stage.stop
        latest = max(step for step in expected if step <= stage.start)
        ever |= set(expected[latest])
        assert stage.plan.layers == expected[latest] and stage.so_far.layers == sorted(ever)
        assert all(block_of(name) in expected[latest] for name in stage.plan.trained)
        assert set(stage.rises) <= set(expected[latest])
    assert [stage.start for stage in found] == list(expected)
    assert found[-1].stop == max_steps


def test_lisa_draws_anew_at_every_interval_and_the_same_for_a_seed():
    plan = FreezePlan.choose(CONFIG, "4-11")
    found = stages(plan, Lisa(2, 15, seed=3), 100, 25)
    assert [stage.start for stage in found] == list(range(0, 100, 15)) and found[-1].stop == 100
    assert all(len(stage.plan.layers) == 2 and set(stage.plan.layers) <= set(range(4, 12)) for stage in found)
    drawn = [stage.plan.layers for stage in found]
    assert len({tuple(layers) for layers in drawn}) > 2
    assert drawn == [stage.plan.layers for stage in stages(plan, Lisa(2, 15, seed=3), 100, 25)]
    assert drawn != [stage.plan.layers for stage in stages(plan, Lisa(2, 15, seed=4), 100, 25)]
    once = stages(FreezePlan.choose(CONFIG, "4,5"), Lisa(2, 15, seed=3), 100, 25)
    assert [(stage.start, stage.stop) for stage in once] == [(0, 100)]  # the same blocks are no other stage
    with pytest.raises(UsageError, match=r"--lisa_layers 9: only 8 blocks may train"):
        stages(plan, Lisa(9, 15, seed=3), 100, 25)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is no change"),
        ("0:", "is no change"),
        ("200", "Write time:blocks, as in"),
        ("0:11,200:10", "a semicolon stands between changes"),
        ("0:11; soon:10", "'soon' is no time. Write a step"),
        ("0:11; -5:10", "'-5' is no time"),
        ("0:11; 100%:10", "100%: shares of the run are below 100%"),
        ("0:11; 250%:10", "250%: shares of the run are below 100%"),
        ("0:11; 20:12", "this model has 12 blocks, ids 0 to 11"),
        ("0:11; 20:none", "names no block"),
        ("0:11; 20:freeze", "--unfreeze '' has an empty part"),
        ("gradual:13", "gradual:13: this model has 12 blocks"),
        ("gradual:0", "gradual:0: this model has 12 blocks"),
        ("0:10-11; 20:9-10", "20:9,10: block 10 trains already at step 20"),
        ("0:11; 20:freeze 10; 30:10", "20:freeze 10: block 10 does not train at step 20"),
        ("0:11; 100:10", "100:10: that is step 100, and the run has 100"),
        ("0:11; 4e:10", "4e:10: that is step 100, and the run has 100"),
        ("0:11; 50%:10; 20:9", "20:9 is step 20, but 50%:10 before it is step 50"),
        ("20:11", "nothing trains from step 0 on"),
        ("0:11; 20:10; 40:freeze 10,11", "nothing trains from step 40 on"),
    ],
)
def test_what_is_refused(text, told):
    with pytest.raises(UsageError) as error:
        planned(text)
    assert told in str(error.value) and str(error.value).startswith(("--unfreeze", "Layers"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"unfreeze": "0:1", "lisa_layers": 2}, "--unfreeze and --lisa_layers both say"),
        ({"lisa_interval": 5}, "--lisa_interval needs --lisa_layers"),
        ({"lisa_layers": 0}, "--lisa_layers 0 must be at least 1"),
        ({"lisa_layers": 2, "lisa_interval": 0}, "--lisa_interval 0 must be at least 1"),
    ],
)
def test_options_that_contradict_each_other(words, told):
    with pytest.raises(UsageError, match=told):
        ThawArgs(**words)


@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        (finetune_full, {"trainable_layers": "10"}, "--trainable_layers and --unfreeze say the same thing"),
        (finetune_full, {"factory": FactoryArgs(2)}, "--freeze_trainable_layers and --unfreeze say the same"),
        (finetune_lora, {"trainable_layers": "10"}, "--unfreeze and --trainable_layers both say which blocks train"),
        (finetune_lora, {"full_layers": "9"}, "block 9 is to train, and never thaws"),
        (finetune_full, {"train_steps": 3}, "20:10: that is step 20, and the run has 3"),
    ],
)
def test_the_commands_refuse_and_leave_nothing_behind(tmp_path, script, words, told):
    steps = words.pop("train_steps", 30)
    with pytest.raises(UsageError) as error:
        script(
            out_dir=tmp_path / "run", thaw=ThawArgs(unfreeze="0:11; 20:10"), train=TrainArgs(max_steps=steps), **words
        )
    assert told in str(error.value) and not (tmp_path / "run").exists()
