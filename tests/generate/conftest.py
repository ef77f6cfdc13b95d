"""What stands over the demo model: an adapter, a delta, and both in one, a few large steps old."""

from pathlib import Path

import pytest

from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.train.args import EvalArgs, TrainArgs

FEW = TrainArgs(lr=2e-2, max_steps=4, global_batch_size=8, micro_batch_size=8, watch_interval=0)
QUICK = EvalArgs(max_samples=8, max_new_tokens=2)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("adapters") / "tunes"
    return finetune_lora(out_dir=out_dir, train=FEW, eval=QUICK, trainable_layers="4-7").checkpoint_dir


@pytest.fixture(scope="session")
def delta(tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("deltas") / "tables"
    words = {"trainable_layers": "10,11", "save": "delta", "seed": 5}
    return finetune_full(out_dir=out_dir, train=FEW, eval=QUICK, **words).checkpoint_dir


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("mixed") / "run"
    words = {"trainable_layers": "0-3", "full_layers": "9", "trainable_extra": "final_norm", "use_dora": True}
    return finetune_lora(out_dir=out_dir, train=FEW, eval=QUICK, **words).checkpoint_dir
