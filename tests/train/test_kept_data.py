"""Where the samples are kept changes nothing of a run, not a bit."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from stops import ctrl_c_in_step
from test_resume import EVAL, TRAIN, log

from litfreeze.data import filling
from litfreeze.data.args import DataArgs
from litfreeze.demo import TRAIN_FILE
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.freeze.args import FrozenArgs
from litfreeze.place import PlaceArgs


def train(out_dir: Path, **data) -> None:
    finetune_full(
        out_dir=out_dir, trainable_layers="11", train=replace(TRAIN, max_steps=5), eval=EVAL,
        place=PlaceArgs(accelerator="cpu"),
        data=DataArgs(path=TRAIN_FILE, keep_dir=out_dir.parent / "kept", **data), frozen=FrozenArgs(cache="disk"),
    )  # fmt: skip


def same(one: Path, other: Path) -> None:
    assert log(one) == log(other)
    weights, others = (load_file(next((run / "final").glob("*.safetensors"))) for run in (one, other))
    assert all(weights[name].equal(others[name]) for name in others)


def test_memory_and_disk_train_the_same_and_a_run_goes_on_from_either(tmp_path, monkeypatch):
    train(tmp_path / "memory", keep="memory")
    train(tmp_path / "disk", keep="disk")
    monkeypatch.setattr(filling, "IN_MEMORY", 10_000)
    with ctrl_c_in_step(4), pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", keep="auto")
    finetune_full(resume=tmp_path / "resumed", data=DataArgs(keep="memory"))
    for name in ("disk", "resumed"):
        same(tmp_path / name, tmp_path / "memory")
    assert not list((tmp_path / "kept").iterdir())
