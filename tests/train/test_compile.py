"""`--compile`: the same run but for rounding, with blocks that torch has compiled for the steps."""

import csv
import shutil
from dataclasses import replace

import pytest
import torch
from families import write_json
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from litfreeze.config import Config
from litfreeze.data.args import DataArgs
from litfreeze.errors import UsageError
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.freeze.args import FrozenArgs, ThawArgs
from litfreeze.place import PlaceArgs
from litfreeze.presets import PRESETS
from litfreeze.scripts.init import setup as init
from litfreeze.train import compiled as compiled_module
from litfreeze.train import prepare as prepare_module
from litfreeze.train import stage as stage_module
from litfreeze.train.args import EvalArgs, TrainArgs
from litfreeze.train.compiled import check_compile

STEPS = TrainArgs(lr=1e-3, max_steps=4, global_batch_size=4, micro_batch_size=2, save_interval=4, watch_interval=0)
QUICK = EvalArgs(max_samples=4, max_new_tokens=2)
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory):
    """Four small blocks, stored in bf16: what is frozen is cast where it is used."""
    folder = tmp_path_factory.mktemp("model")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    write_json(folder / "config.json", {**PRESETS["demo"], **small})
    return init(out_dir=folder / "model", config_file=folder / "config.json", dtype="bfloat16")


@pytest.fixture
def counted():
    """What the compiler counts: graphs that were made, and places where it had to give up."""
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


def rows(out):
    with (out / "metrics.csv").open(encoding="utf-8") as lines:
        wanted = ("step", "train_loss", "grad_norm", "val_loss")
        return [float(row[name]) for row in csv.DictReader(lines) for name in wanted if row[name]]


def losses(path, script, compiled, precision="32-true", **words):
    out = path / f"compiled-{compiled}"
    place = PlaceArgs(precision, compiled, accelerator="cpu")
    script(out_dir=out, place=place, **{"eval": QUICK, "train": STEPS, **words})
    return rows(out)


@needs_compiler
def test_with_torchs_own_code_losses_agree_and_the_kept_prefix_is_the_same_to_the_bit(
    tmp_path, checkpoint_dir, counted
):
    found, kept = [], []
    for compiled in (False, True):
        cache = tmp_path / f"cache-{compiled}"
        frozen = FrozenArgs(cache="disk", cache_dir=cache)
        words = {"checkpoint_dir": checkpoint_dir, "trainable_layers": "3", "frozen": frozen}
        found.append(losses(tmp_path, finetune_full, compiled, **words))
        assert bool(counted["stats"]["unique_graphs"]) == compiled
        kept.append({})
        for part in cache.rglob("*.safetensors"):
            kept[-1] |= load_file(part)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    plain, compiled = kept
    assert set(plain) == set(compiled) and len(plain["rows"]) > 100
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)


def without_code(monkeypatch, backend="aot_eager"):
    """Blocks are traced and taken apart as always, gradients included, but no code is made of them: for that a test
    has no time."""
    plain = compiled_module.compile_blocks
    monkeypatch.setattr(stage_module, "compile_blocks", lambda gpt: plain(gpt, backend))
    monkeypatch.setattr(prepare_module, "check_compile", lambda *_: None)


ONE_BATCH = replace(STEPS, micro_batch_size=4, max_norm=None, activation_checkpointing=True)
WAYS = {
    "everything, recomputed, in a fused backward": (
        finetune_full,
        {"train": ONE_BATCH, "frozen": FrozenArgs(fused_backward=True)},
    ),
    "a padded batch": (finetune_full, {"trainable_layers": "2", "data": DataArgs(packing="off")}),
    "an adapter beside full blocks": (
        finetune_lora,
        {"trainable_layers": "2", "lora_targets": "v_proj", "full_layers": "3", "lora_dropout": 0.3},
    ),
    "DoRA": (finetune_lora, {"trainable_layers": "3", "lora_targets": "down_proj", "use_dora": True}),
}


IN_CI = ("an adapter beside full blocks",)


@pytest.mark.parametrize("way", [pytest.param(way, marks=() if way in IN_CI else pytest.mark.matrix) for way in WAYS])
def test_every_way_of_training_is_the_same_run(tmp_path, monkeypatch, checkpoint_dir, counted, way):
    without_code(monkeypatch)
    script, words = WAYS[way]
    words = {"frozen": FrozenArgs(cache="disk"), "checkpoint_dir": checkpoint_dir, **words}
    plain = losses(tmp_path, script, False, **words)
    assert losses(tmp_path, script, True, **words) == pytest.approx(plain, rel=1e-4)
    assert counted["stats"]["unique_graphs"] >= 2 and not counted["graph_break"]


@pytest.mark.matrix
def test_bf16_mixed_too(tmp_path, monkeypatch, checkpoint_dir, counted):
    without_code(monkeypatch)
    words = {"checkpoint_dir": checkpoint_dir, "trainable_layers": "2,3", "precision": "bf16-mixed"}
    plain = losses(tmp_path, finetune_full, False, **words)
    assert losses(tmp_path, finetune_full, True, **words) == pytest.approx(plain, rel=2e-2)
    assert counted["stats"]["unique_graphs"] >= 2 and not counted["graph_break"]


def test_blocks_that_are_alike_share_their_code_whenever_they_thaw(tmp_path, monkeypatch, checkpoint_dir, counted):
    without_code(monkeypatch, backend="eager")
    thaw = ThawArgs(unfreeze="0:3;1:2;2:1;3:0")
    words = {"checkpoint_dir": checkpoint_dir, "thaw": thaw, "frozen": FrozenArgs(cache="off")}
    plain = losses(tmp_path, finetune_full, False, **words)
    assert losses(tmp_path, finetune_full, True, **words) == pytest.approx(plain, rel=1e-4)
    # Two halves of: what is frozen, the lowest that trains, one above it; and of the last block as either of these
    assert counted["stats"]["unique_graphs"] == 2 * 5 and not counted["graph_break"]


def test_what_it_does_not_go_with_is_told():
    with pytest.raises(UsageError, match="does not go with --freeze_quantize int8"):
        check_compile(FrozenArgs(freeze_quantize="int8"), Config.from_hf(PRESETS["demo"]), torch.device("cpu"))


def test_a_machine_without_a_compiler_is_told_before_anything_is_written(tmp_path, monkeypatch, checkpoint_dir):
    def broken(*_, **__):
        raise RuntimeError("No working C++ compiler found\nin any place")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        UsageError, match=r"cannot compile for cpu here \(No working C\+\+ compiler found in any place\)"
    ):
        losses(tmp_path, finetune_full, True, checkpoint_dir=checkpoint_dir)
    assert not any(tmp_path.iterdir())
