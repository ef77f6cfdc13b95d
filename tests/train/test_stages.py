"""Runs in which blocks thaw and freeze: against a loop by hand, interrupted, and what they tell."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stops import ctrl_c_in_step
from test_optim import OPTIMIZERS

from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.data.args import DataArgs
from litfreeze.data.batches import build_batch, epoch_order
from litfreeze.data.prompt import Prompt
from litfreeze.data.samples import load_samples
from litfreeze.demo import MODEL_DIR, TRAIN_FILE
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.freeze.args import FrozenArgs, ThawArgs
from litfreeze.freeze.plan import block_of
from litfreeze.place import PlaceArgs
from litfreeze.prefix import prefix as prefix_module
from litfreeze.train import stage as stage_module
from litfreeze.train.args import EvalArgs, TrainArgs
from litfreeze.train.loss import NextToken

STEPS, SEED = 24, 5
# 24 records in steps of 8: three to an epoch, so that blocks thaw within epochs
TRAIN = TrainArgs(
    lr=1e-3, max_steps=STEPS, global_batch_size=8, micro_batch_size=8, weight_decay=0.1, max_norm=None,
    lr_schedule="constant", lr_warmup_steps=4, watch_interval=0,
)  # fmt: skip
EVAL = EvalArgs(max_new_tokens=1, interval=4, save_best=False)
TIMES = "0:11; 5:9,10; 10:freeze 11; 14:8"
TRAINING = {0: {11}, 5: {9, 10, 11}, 10: {9, 10}, 14: {8, 9, 10}}


@pytest.fixture
def data(tmp_path) -> DataArgs:
    lines = TRAIN_FILE.read_text(encoding="utf-8").splitlines()[:32]
    (tmp_path / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return DataArgs(path=tmp_path / "records.jsonl", val_split_fraction=0.25)


def losses(run_dir: Path) -> list[float]:
    with (run_dir / "metrics.csv").open() as lines:
        return [float(row["train_loss"]) for row in csv.DictReader(lines) if row["train_loss"]]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(next(path.glob("*.safetensors")))


def by_hand(data: DataArgs) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same run with nothing frozen: an AdamW for each block, made when it thaws and thrown away when it freezes."""
    checkpoint = open_checkpoint(MODEL_DIR)
    gpt = load_model(checkpoint, lambda name: torch.float32).requires_grad_(True)
    tokenizer = checkpoint.tokenizer()
    prompt = Prompt.choose(None, checkpoint.prompt, tokenizer, None)
    samples = load_samples(data, tokenizer, prompt, checkpoint.config.block_size).train
    held: dict[int, tuple[int, torch.optim.Optimizer]] = {}
    found = []
    for step in range(STEPS):
        training = TRAINING[max(s for s in TRAINING if s <= step)]
        for i in training - set(held):
            own = dict(gpt.blocks[i].named_parameters())
            groups = [
                {"params": [p for p in own.values() if p.ndim >= 2], "weight_decay": 0.1},
                {"params": [p for p in own.values() if p.ndim < 2], "weight_decay": 0.0},
            ]
            held[i] = step, torch.optim.AdamW(groups, lr=1.0, betas=(TRAIN.beta1, TRAIN.beta2))
        held = {i: pair for i, pair in held.items() if i in training}
        order = epoch_order(len(samples), SEED, step // 3)
        batch = build_batch(samples, order[8 * (step % 3) : 8 * (step % 3) + 8], packed=False)
        scored = NextToken(gpt)(batch)
        (scored.loss / scored.targets).backward()
        found.append((scored.loss / scored.targets).item())
        for thawed, optimizer in held.values():
            # Four warmup steps of the run; what thaws later has as many, but at most a fifth of its first stage
            warm = {0: (step + 1) / 4, 5: step + 1 - 5, 14: (step + 1 - 14) / 2}[thawed]
            for group in optimizer.param_groups:
                group["lr"] = TRAIN.lr * min(1.0, warm)
            optimizer.step()
        gpt.zero_grad()
    return found, {name: p.detach() for name, p in gpt.named_parameters()}


SAVINGS = {
    "plain": ({"packing": "off", "share_prompts": False}, {"cache": "off"}),
    "every": ({}, {"cache": "disk"}),
    "streamed": ({}, {"cache": "disk", "stream_frozen": True}),
}


@pytest.mark.parametrize("savings", SAVINGS)
def test_it_is_what_a_loop_by_hand_does(tmp_path, data, savings, monkeypatch):
    stops = []
    plain = stage_module.choose_reuse

    def choose(*args, **more):
        reuse = plain(*args, **more)
        stops.append(reuse.prefix and reuse.prefix.stop)
        return reuse

    monkeypatch.setattr(stage_module, "choose_reuse", choose)
    expected = by_hand(data)
    batches, frozen = SAVINGS[savings]
    finetune_full(
        out_dir=tmp_path / "run", data=replace(data, **batches), train=TRAIN, eval=EVAL, place=PlaceArgs("32-true"),
        thaw=ThawArgs(unfreeze=TIMES), frozen=FrozenArgs(**frozen), seed=SEED, save_dtype="float32",
    )  # fmt: skip
    assert stops == ([None] * 3 if savings == "plain" else [11, 9, 8])  # block 11 froze again, but had trained
    assert losses(tmp_path / "run") == pytest.approx(expected[0], rel=1e-5)
    after, before = weights(tmp_path / "run/final"), open_checkpoint(MODEL_DIR)
    for name, weight in expected[1].items():
        if block_of(name) in (8, 9, 10, 11):
            assert (after[name] - weight).norm() <= 1e-5 * weight.norm(), name
        else:
            assert torch.equal(after[name], before.read(name).float()), name


def check_twin(tmp_path, monkeypatch, script, at: int, cache: str = "disk", fused: bool = False, **words) -> None:
    """A run that a Ctrl-C ends in step `at` goes on and ends as its twin that had none, and another cache."""
    monkeypatch.setattr(prefix_module, "AT_ONCE", 150)  # in several goes

    def frozen(folder: str) -> FrozenArgs:
        return FrozenArgs(cache=cache, cache_dir=tmp_path / folder, fused_backward=fused)

    script(out_dir=tmp_path / "whole", frozen=frozen("cache of the twin"), **words)
    with ctrl_c_in_step(at), pytest.raises(KeyboardInterrupt):
        script(out_dir=tmp_path / "cut", frozen=frozen("cache"), **words)
    script(resume=tmp_path / "cut")
    ours, twins = (weights(tmp_path / name / "final") for name in ("cut", "whole"))
    assert set(ours) == set(twins) and all(torch.equal(ours[name], twins[name]) for name in twins)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


# Points to go on from are kept after steps 5 and 10, at which blocks thaw and freeze, or in between
MATRIX = pytest.mark.matrix  # more of the same


@pytest.mark.parametrize(
    ("script", "interval", "at", "cache"),
    [
        (finetune_full, 5, 9, "disk"),
        (finetune_lora, 5, 12, "ram"),
        pytest.param(finetune_full, 4, 15, "ram", marks=MATRIX),
        pytest.param(finetune_lora, 5, 9, "disk", marks=MATRIX),
        pytest.param(finetune_full, 5, 12, "ram", marks=MATRIX),
        pytest.param(finetune_lora, 4, 15, "ram", marks=MATRIX),
    ],
)
def test_a_resumed_run_is_its_twin_to_the_bit(tmp_path, data, monkeypatch, script, interval, at, cache):
    more = {} if script is finetune_full else {"lora_dropout": 0.3}
    check_twin(
        tmp_path, monkeypatch, script, at, cache, data=data, eval=EVAL, train=replace(TRAIN, save_interval=interval),
        thaw=ThawArgs(unfreeze=TIMES), **more,
    )  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=MATRIX)])
def test_so_it_is_with_lisa_and_every_optimizer(tmp_path, data, monkeypatch, optimizer, fused):
    check_twin(
        tmp_path, monkeypatch, finetune_full, 12, fused=fused, data=data, eval=EVAL,
        train=replace(TRAIN, save_interval=5, optimizer=optimizer), thaw=ThawArgs(lisa_layers=2, lisa_interval=4),
    )  # fmt: skip


def test_what_never_thawed_is_frozen_in_the_proof(tmp_path, data, capsys):
    """A run that ends early has trained only what had thawed by then."""
    train, thaw = replace(TRAIN, max_time="0.001s"), ThawArgs(unfreeze="0:11; 5:10; 50%:9")
    result = finetune_full(out_dir=tmp_path / "run", data=data, train=train, eval=EVAL, thaw=thaw)
    told = capsys.readouterr().out
    assert result.outcome.step == 1 and "Thaws at 0:11; 5:10; 50%:9" in told
    assert not result.proof.frozen_that_changed and not result.proof.trained_that_did_not
    assert json.loads((tmp_path / "run/final/litfreeze.json").read_text())["training"]["layers"] == "11"


def test_the_person_is_told_what_thaws_and_what_becomes_of_the_cache(tmp_path, data, capsys):
    thaw = ThawArgs(unfreeze="0:11; 4:freeze 11; 4:0,10")
    finetune_full(
        out_dir=tmp_path / "run", data=data, train=TRAIN, eval=EVAL, thaw=thaw, frozen=FrozenArgs(cache="ram")
    )
    told = capsys.readouterr().out
    assert "Cache     blocks 0-10 and what is below run once per record" in told
    assert "Step 4: thaws 0,10, freezes 11; " in told
    assert "Cache     off: block 0 trains, so nothing below it is frozen." in told
    assert "thaw" not in (tmp_path / "run/recipe.yaml").read_text().replace("unfreeze", "")
    assert "unfreeze: 0:11; 4:freeze 11; 4:0,10" in (tmp_path / "run/recipe.yaml").read_text()


def test_lisa_trains_blocks_alone_unless_more_is_asked_for(tmp_path, data):
    words = {"data": data, "train": replace(TRAIN, max_steps=6), "eval": EVAL}
    finetune_full(out_dir=tmp_path / "blocks", thaw=ThawArgs(lisa_layers=3, lisa_interval=2), **words)
    trained = json.loads((tmp_path / "blocks/final/litfreeze.json").read_text())["training"]["trained"]
    assert {block_of(name) for name in trained} <= set(range(12)) and len({block_of(n) for n in trained}) > 3
    thaw = ThawArgs(lisa_layers=1, lisa_interval=2)
    extra = {"trainable_layers": "8-11", "trainable_extra": "embed,head"}
    finetune_full(out_dir=tmp_path / "more", thaw=thaw, **extra, **words)
    trained = json.loads((tmp_path / "more/final/litfreeze.json").read_text())["training"]["trained"]
    assert {block_of(name) for name in trained} <= {None, 8, 9, 10, 11} and "embed.weight" in trained


def test_what_trains_in_full_beside_an_adapter_thaws_too(tmp_path, data):
    words = {"data": data, "train": replace(TRAIN, max_steps=6), "eval": EVAL}
    finetune_lora(out_dir=tmp_path / "run", thaw=ThawArgs(unfreeze="0:11; 3:9"), full_layers="9", **words)
    trained = json.loads((tmp_path / "run/final/litfreeze.json").read_text())["training"]["trained"]
    assert {n.endswith(("lora_A", "lora_B")) for n in trained if block_of(n) == 11} == {True}
    assert {n.endswith(("lora_A", "lora_B")) for n in trained if block_of(n) == 9} == {False}
    # and so it does when it goes on
    thaw = ThawArgs(unfreeze="0:9; 3:11")
    result = finetune_lora(checkpoint_dir=tmp_path / "run/final", out_dir=tmp_path / "on", thaw=thaw, **words)
    assert not result.proof.trained_that_did_not and not result.proof.frozen_that_changed


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_it_runs_in_every_precision(tmp_path, data, precision):
    train, thaw = replace(TRAIN, max_steps=12, lr=2e-3), ThawArgs(unfreeze="0:11; 3:10; 6:freeze 11; 9:11")
    result = finetune_full(
        out_dir=tmp_path / "run", data=data, train=train, eval=EVAL, thaw=thaw, place=PlaceArgs(precision)
    )
    assert result.outcome.after.loss < 0.9 * result.outcome.before.loss and not result.proof.frozen_that_changed
