"""What is told of each block while a run trains: true, and without touching the run."""

import csv
from dataclasses import replace
from math import hypot
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume import EVAL, TRAIN, interrupt, records  # noqa: F401

from litfreeze.checkpoint.compare import compare
from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.merge import fold, write_merged
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.data.args import DataArgs
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import RunError, UsageError
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.freeze.args import FrozenArgs, ThawArgs
from litfreeze.freeze.words import plan_from_words
from litfreeze.scripts.expand import setup as expand
from litfreeze.train.args import EvalArgs, TrainArgs
from litfreeze.train.monitor import over_fitting
from litfreeze.train.watch import Watch

EACH = TrainArgs(lr=2e-3, max_steps=4, global_batch_size=8, micro_batch_size=4, watch_interval=1)
QUICK = EvalArgs(max_samples=8, max_new_tokens=2)


def looks(run_dir: Path) -> list[dict]:
    with (run_dir / "blocks.csv").open() as rows:
        return [{k: v if k == "part" else float(v) for k, v in row.items()} for row in csv.DictReader(rows)]


def norms(run_dir: Path) -> dict[int, float]:
    """Of the whole gradient, step by step."""
    with (run_dir / "metrics.csv").open() as rows:
        return {int(row["step"]): float(row["grad_norm"]) for row in csv.DictReader(rows) if row["grad_norm"]}


WAYS = {
    "full": (finetune_full, {"trainable_layers": "8,11", "trainable_extra": "embed"}, {}),
    "clipped hard": (finetune_full, {"trainable_layers": "8,11"}, {"max_norm": 0.01}),
    "fused": (
        finetune_full,
        {"trainable_layers": "8,11", "frozen": FrozenArgs(fused_backward=True)},
        {"max_norm": None, "micro_batch_size": 8},
    ),
    "lora": (finetune_lora, {"trainable_layers": "8,11", "lora_dropout": 0.0}, {}),
    "lora on a tied head": (finetune_lora, {"trainable_layers": "8,11", "lora_targets": "all,head"}, {}),
    "dora and full": (finetune_lora, {"trainable_layers": "8", "full_layers": "11", "use_dora": True}, {}),
}


@pytest.mark.painted
@pytest.mark.parametrize("way", WAYS)
def test_norms_add_up_and_drift_is_that_between_the_checkpoints(tmp_path, way):
    script, words, train = WAYS[way]
    run = tmp_path / "run"
    result = script(out_dir=run, train=replace(EACH, **train), eval=QUICK, **words)
    seen = looks(run)
    outside = {"embed"} & {words.get("trainable_extra")} | (
        {"head"} if "head" in words.get("lora_targets", "") else set()
    )
    parts = {"8", "11"} | outside
    assert {row["part"] for row in seen} == parts and {row["step"] for row in seen} == {1, 2, 3, 4}
    for step, norm in norms(run).items():
        of_parts = [row["grad_norm"] for row in seen if row["step"] == step]
        assert hypot(*of_parts) == pytest.approx(norm, rel=1e-4)
    told = {row["part"]: row for row in seen if row["step"] == 4}
    if script is finetune_lora:
        write_merged(tmp_path / "merged", fold([open_checkpoint(result.checkpoint_dir)], dtype=torch.float32))
        after = open_checkpoint(tmp_path / "merged")
    else:
        after = open_checkpoint(result.checkpoint_dir)
    changes = compare(open_checkpoint(MODEL_DIR), after).parts
    for part in parts - outside:  # of the embedding sixteen rows say little: most words were not in any record
        trained = changes[int(part)]
        # LoRA leaves norms alone, which are in the whole block's length; they hardly weigh
        assert told[part]["drift"] == pytest.approx(trained.relative, rel=0.25)
        first = next(row for row in seen if row["part"] == part)
        assert first["update_ratio"] == pytest.approx(first["drift"], rel=1e-3)  # the first step's is all there is
        assert 0 < told[part]["update_ratio"] < told[part]["drift"]
    assert (run / "blocks.png").read_bytes().startswith(b"\x89PNG")
    assert "| block 11 |" in (run / "report.md").read_text()


@pytest.mark.parametrize("method", [finetune_full, finetune_lora])
def test_watching_changes_nothing(tmp_path, method):
    for interval in (0, 1):
        method(
            out_dir=tmp_path / str(interval), train=replace(EACH, watch_interval=interval), eval=QUICK,
            trainable_layers="10,11",
        )  # fmt: skip
    plain, watched = (load_file(next((tmp_path / i / "final").glob("*.safetensors"))) for i in ("0", "1"))
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert looks(tmp_path / "0") == [] and not (tmp_path / "0/blocks.png").exists()


def test_a_run_is_looked_at_when_a_block_begins_and_at_its_end_and_between(tmp_path):
    finetune_full(
        out_dir=tmp_path / "run", train=replace(EACH, max_steps=13, watch_interval=5), eval=QUICK,
        thaw=ThawArgs(unfreeze="0:11; 7:10; 11:freeze 11"),
    )  # fmt: skip
    steps = {part: [row["step"] for row in looks(tmp_path / "run") if row["part"] == part] for part in ("10", "11")}
    assert steps == {"11": [1, 5, 8, 10], "10": [8, 10, 13]}


def test_a_resumed_run_saw_what_its_twin_saw(tmp_path, records):  # noqa: F811
    train = replace(TRAIN, watch_interval=3)
    words = {"train": train, "trainable_layers": "9-11", "trainable_extra": None}
    finetune_full(out_dir=tmp_path / "whole", eval=EVAL, data=DataArgs(path=records), **words)
    interrupt("full", tmp_path / "cut", records, **words)
    finetune_full(resume=tmp_path / "cut")
    assert looks(tmp_path / "cut") == looks(tmp_path / "whole")


def test_a_new_block_that_cannot_learn_is_refused_before_the_run(tmp_path):
    expand(out_dir=tmp_path / "deep", new_blocks=2)
    words = {"checkpoint_dir": tmp_path / "deep", "train": EACH, "eval": QUICK, "trainable_layers": "new"}
    with pytest.raises(UsageError, match="new block 6 would never learn: its o_proj and down_proj"):
        finetune_full(out_dir=tmp_path / "never", trainable_modules="q_proj,norm", **words)
    with pytest.raises(UsageError, match="would never learn"):
        finetune_lora(out_dir=tmp_path / "never", lora_targets="q_proj", **words)
    with pytest.raises(UsageError, match="DoRA stretches what is there"):
        finetune_lora(out_dir=tmp_path / "never", use_dora=True, **words)
    assert not (tmp_path / "never").exists()
    trained = finetune_lora(out_dir=tmp_path / "adapter", lora_targets="q_proj,o_proj", **words)
    assert not trained.proof.trained_that_did_not
    fine = finetune_full(out_dir=tmp_path / "fine", **words)
    # What has learned is no longer zero: now any part of it can train
    finetune_full(
        out_dir=tmp_path / "norms", trainable_modules="norm", **{**words, "checkpoint_dir": fine.checkpoint_dir}
    )
    assert "| block 6 (new) |" in (tmp_path / "fine/report.md").read_text()
    assert {row["part"] for row in looks(tmp_path / "fine")} == {"6", "13"}


def rows(train: list[float], val: dict[int, float]) -> list[dict]:
    losses = [{"step": step, "train_loss": loss} for step, loss in enumerate(train, 1)]
    return losses + [{"step": step, "val_loss": loss} for step, loss in val.items()]


def test_a_block_without_a_gradient_ends_the_run(tmp_path):
    """Nothing flows back through a final norm of zeros."""
    expand(out_dir=tmp_path / "deep", new_blocks=2)
    deep = open_checkpoint(tmp_path / "deep")
    gpt = load_model(deep, deep.dtype)
    plan = plan_from_words(deep.config, "new")
    plan.apply(gpt)
    watch = Watch(deep, deep.dtype, interval=1, last=1)
    watch.begin(gpt, plan, first=1)
    watch.before()
    gpt.final_norm.weight.data.zero_()
    gpt(torch.arange(5)[None]).sum().backward()
    watch.gradients()
    with pytest.raises(RunError, match="The new block 6 gets no gradient in step 1"):
        watch.after(1)


def test_a_new_block_that_stays_where_it_was_ends_the_run(tmp_path):
    deep = expand(out_dir=tmp_path / "deep", new_blocks=2)
    words = {"checkpoint_dir": deep, "out_dir": tmp_path / "run", "trainable_layers": "new", "eval": QUICK}
    with pytest.raises(RunError, match="The new block 6 does not move in step 1"):
        finetune_full(train=replace(EACH, lr=1e-30), **words)


FALLING = [2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 0.8, 0.6, 0.4]


@pytest.mark.parametrize(
    ("train", "val", "told"),
    [
        (FALLING, {0: 3.0, 3: 1.5, 6: 1.6, 9: 1.8}, True),
        (FALLING, {0: 3.0, 3: 1.5, 6: 1.6}, False),  # once may be chance, but of three values two are above
        (FALLING, {0: 3.0, 3: 1.5, 6: 1.6, 9: 1.505}, False),
        (FALLING, {0: 3.0, 3: 1.5, 6: 1.3, 9: 1.1}, False),
        (FALLING, {0: 3.0, 3: 3.5, 6: 3.6, 9: 3.8}, False),  # worse than before training: something else
        (FALLING[::-1], {0: 3.0, 3: 1.5, 6: 1.6, 9: 1.8}, False),  # both rise: not that
        ([*FALLING[::-1][:8], float("nan")], {0: 3.0, 3: 1.5, 6: 1.6, 9: 1.8}, False),  # the same, a step skipped
        ([*FALLING[:8], float("nan")], {0: 3.0, 3: 1.5, 6: 1.6, 9: 1.8}, True),
        (FALLING[:3], {0: 3.0, 3: 1.5, 6: 1.6, 9: 1.8}, False),  # nothing was logged since
    ],
)
def test_over_fitting_is_two_validations_worse_while_training_goes_on_better(train, val, told):
    notice = over_fitting(rows(train, val))
    assert (notice is not None) == told
    if told:
        assert "since step 3" in notice and "1.5000 to 1.8000" in notice
