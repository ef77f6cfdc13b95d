"""Whole runs on the embedded demo: what is trained, what is left alone, what is written, when it stops."""

import csv
import json
import math
from dataclasses import replace
from functools import partialmethod

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.cli import read_yaml
from litfreeze.data.args import DataArgs
from litfreeze.demo import MODEL_DIR, TRAIN_FILE, VAL_FILE
from litfreeze.errors import RunError, UsageError
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.recipe import recipe_yaml
from litfreeze.freeze.args import FrozenArgs
from litfreeze.freeze.words import plan_from_words
from litfreeze.place import PlaceArgs
from litfreeze.precision import PRECISIONS
from litfreeze.train.args import EvalArgs, TrainArgs

FEW = TrainArgs(lr=1e-3, max_steps=4, global_batch_size=8, micro_batch_size=4)
QUICK = EvalArgs(max_samples=16, max_new_tokens=4)
BASE = load_file(MODEL_DIR / "litfreeze.safetensors")


def run(out_dir, train=FEW, eval=QUICK, **words):
    return finetune_full(out_dir=out_dir, train=train, eval=eval, **words)


def saved(result):
    return load_file(result.checkpoint_dir / "litfreeze.safetensors")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_exactly_the_chosen_tensors_change_on_disk(tmp_path, precision):
    result = run(tmp_path / "run", trainable_layers="1,-1", trainable_modules="mlp,norm", place=PlaceArgs(precision))
    plan = plan_from_words(open_checkpoint(MODEL_DIR).config, "1,11", "mlp,norm")
    after = saved(result)
    assert set(after) == set(BASE)
    changed = {name for name in BASE if not torch.equal(BASE[name], after[name])}
    # bf16 norms near 1 may round back to where they were, and the run says so; nothing frozen may move
    assert changed <= plan.trained
    assert plan.trained - changed == {*result.proof.rounded_back, *result.proof.trained_that_did_not}
    assert all("norm" in name for name in plan.trained - changed)
    assert {after[name].dtype for name in after} == {torch.bfloat16}
    assert result.proof.frozen == len(BASE) - len(plan.trained) and result.proof.frozen_that_changed == []


def test_a_run_without_words_trains_everything(tmp_path):
    result = run(tmp_path / "run")
    assert result.proof.frozen == 0 and result.proof.trained == len(BASE) and not result.proof.trained_that_did_not


def test_frozen_weights_exist_once_and_masters_only_for_what_trains():
    checkpoint = open_checkpoint(MODEL_DIR)
    plan = plan_from_words(checkpoint.config, "10,11")
    for name, kept in PRECISIONS.items():
        model = load_model(checkpoint, lambda n, kept=kept: kept.kept(n in plan.trained, checkpoint.dtype(n)))
        plan.apply(model)
        for parameter_name, p in model.named_parameters():
            frozen = torch.bfloat16 if name == "32-true" else kept.frozen  # stays as it is stored
            assert p.dtype == (kept.trained if parameter_name in plan.trained else frozen), name
            assert p.requires_grad == (parameter_name in plan.trained)
        assert model.head.weight is model.embed.weight


@pytest.mark.painted
def test_the_report_and_the_manifest_say_what_happened(tmp_path):
    result = run(tmp_path / "run", trainable_layers="10,11")
    manifest = json.loads((result.checkpoint_dir / "litfreeze.json").read_text())
    assert manifest["kind"] == "full" and manifest["training"]["layers"] == "10,11"
    assert manifest["base"]["weights_hash"] == open_checkpoint(MODEL_DIR).weights_hash
    frozen = [name for name in BASE if name not in manifest["training"]["trained"]]
    base_hashes = json.loads((MODEL_DIR / "litfreeze.json").read_text())["tensors"]
    assert all(manifest["tensors"][name] == base_hashes[name] for name in frozen)
    report = (tmp_path / "run/report.md").read_text()
    assert f"{len(frozen)} of {len(frozen)} frozen tensors are bit-identical" in report
    assert f"{result.outcome.after.loss:.4f}" in report
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "run/metrics.csv").open()))
    assert [row["step"] for row in rows if row["train_loss"]] == ["1", "2", "3", "4"]


def test_the_recipe_repeats_the_run(tmp_path, monkeypatch):
    from litfreeze.__main__ import main

    train = replace(FEW, max_norm=None)  # a null that is not the default has to come through
    run(tmp_path / "a", train, trainable_layers=[10, "11"], seed=5)
    recipe = yaml.safe_load((tmp_path / "a/recipe.yaml").read_text())
    assert recipe["trainable_layers"] == [10, "11"]
    assert recipe["train"] == {"lr": 1e-3, "max_steps": 4, "global_batch_size": 8, "max_norm": None}
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", "full", "--config", "a/recipe.yaml"]) == 0
    a, b = (json.loads((tmp_path / r / "final/litfreeze.json").read_text()) for r in ("a", "out/finetune/full"))
    assert a["weights_hash"] == b["weights_hash"]


def test_a_recipe_can_be_read_where_two_options_are_one_list():
    names = ["final_norm", "head"]
    text = recipe_yaml(finetune_full, {"trainable_modules": names, "trainable_extra": names})
    assert read_yaml(text, "recipe.yaml") == {"trainable_modules": names, "trainable_extra": names}


def test_the_step_is_the_same_however_the_batch_is_cut(tmp_path):
    """Loss and gradient are means over the tokens of the global batch, not means of micro-batch means."""

    def curve(size):
        run(tmp_path / str(size), replace(FEW, micro_batch_size=size), trainable_layers="11")
        rows = csv.DictReader((tmp_path / str(size) / "metrics.csv").open())
        return [float(row[column]) for row in rows if row["train_loss"] for column in ("train_loss", "grad_norm")]

    whole = curve(8)
    assert len(whole) == 8
    assert curve(1) == pytest.approx(whole, rel=1e-4) and curve(3) == pytest.approx(whole, rel=1e-4)


def test_save_dtype_keeps_the_masters(tmp_path):
    result = run(tmp_path / "run", trainable_layers="11", save_dtype="float32")
    after = saved(result)
    assert {t.dtype for t in after.values()} == {torch.float32}
    assert not torch.equal(
        after["blocks.11.mlp.up_proj.weight"].bfloat16().float(), after["blocks.11.mlp.up_proj.weight"]
    )
    assert torch.equal(after["embed.weight"], BASE["embed.weight"].float())
    assert json.loads((result.checkpoint_dir / "config.json").read_text())["torch_dtype"] == "float32"


def test_untying_saves_both_and_says_so(tmp_path):
    result = run(tmp_path / "run", trainable_layers="none", trainable_extra="head", untie_embeddings=True)
    after = saved(result)
    assert torch.equal(after["embed.weight"], BASE["embed.weight"])
    assert not torch.equal(after["head.weight"], BASE["embed.weight"])
    assert json.loads((result.checkpoint_dir / "config.json").read_text())["tie_word_embeddings"] is False
    again = open_checkpoint(result.checkpoint_dir)
    model = load_model(again, again.dtype)
    assert model.head.weight is not model.embed.weight


def test_checkpoints_along_the_way(tmp_path):
    train = replace(FEW, max_steps=7, save_interval=2, keep_last=2)
    result = run(tmp_path / "run", train, replace(QUICK, interval=2), trainable_layers="11")
    kept = sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir() and p.name != "tensorboard")
    improving = result.outcome.best_step == 7  # then the final one is the best, and no worse one goes by that name
    assert kept == ([] if improving else ["best"]) + ["final", "step-000004", "step-000006"]
    steps = {name: open_checkpoint(tmp_path / "run" / name).manifest["training"]["step"] for name in kept}
    assert steps.pop("best", result.outcome.best_step) == result.outcome.best_step
    assert steps == {"final": 7, "step-000004": 4, "step-000006": 6}


def test_the_best_is_kept_when_the_last_is_worse(tmp_path):
    wrong = [json.loads(line) for line in TRAIN_FILE.read_text(encoding="utf-8").splitlines()[:8]]
    answers = [record["completion"] for record in wrong]
    records = [{**r, "completion": answer} for r, answer in zip(wrong, answers[1:] + answers[:1], strict=True)]
    (tmp_path / "wrong.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = DataArgs(path=tmp_path / "wrong.jsonl", val_path=VAL_FILE)
    train = replace(FEW, lr=2e-3, max_steps=40)
    result = run(tmp_path / "run", train, replace(QUICK, interval=4), data=data, trainable_layers="10,11")
    assert 0 < result.outcome.best_step < 40
    report = (tmp_path / "run/report.md").read_text()
    assert f"at step {result.outcome.best_step}, kept in best/" in report
    best = open_checkpoint(tmp_path / "run/best").manifest["training"]
    assert best["step"] == result.outcome.best_step and best["after"]["loss"] == result.outcome.best_loss


def test_it_stops_early_when_validation_gets_worse(tmp_path):
    train = replace(FEW, lr=5.0, max_steps=20, lr_warmup_steps=0, lr_schedule="constant")
    result = run(tmp_path / "run", train, replace(QUICK, interval=1, patience=2), trainable_layers="11")
    assert result.outcome.step < 20 and "in a row" in result.outcome.stopped
    assert (tmp_path / "run/final").is_dir()


def test_a_run_that_goes_wrong_fails_and_leaves_no_final(tmp_path):
    with pytest.raises(RunError, match=r"became (nan|inf).*Lower --train\.lr"):
        run(tmp_path / "run", replace(FEW, lr=1e30, max_steps=2), trainable_layers="11")
    assert not (tmp_path / "run/final").exists()


def test_a_fused_projection_trains_as_its_parts_do(tmp_path, tokenizer_dir):
    """GPT-2 read from a Hugging Face directory, where q, k and v are views of one tensor, and its converted copy."""
    from litfreeze.scripts.convert import from_hf

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=5, n_positions=64, n_embd=32, n_head=4, n_layer=2))
    gpt2.save_pretrained(tmp_path / "hf")
    for file in tokenizer_dir.iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "data.jsonl").write_text('{"prompt": "naïve", "completion": "café naïve"}\n' * 20, encoding="utf-8")
    from_hf(tmp_path / "hf", tmp_path / "ours")
    data = DataArgs(path=tmp_path / "data.jsonl", prompt_style="plain")
    first, second = (
        saved(run(tmp_path / f"run-{name}", checkpoint_dir=tmp_path / name, data=data, trainable_layers="1"))
        for name in ("hf", "ours")
    )
    assert all(torch.equal(first[name], second[name]) for name in second)
    moved = (
        first["blocks.1.attn.q_proj.weight"]
        != load_file(tmp_path / "ours/litfreeze.safetensors")["blocks.1.attn.q_proj.weight"]
    )
    assert moved.float().mean() > 0.99


def test_loss_scaling_learns_what_goes_without(tmp_path):
    words = {"trainable_layers": "11"}
    scaled, plain = (
        run(tmp_path / p, place=PlaceArgs(p, accelerator="cpu"), **words).outcome for p in ("16-mixed", "32-true")
    )
    learned = plain.before.loss - plain.after.loss
    assert learned > 0.3 and scaled.before.loss - scaled.after.loss == pytest.approx(learned, rel=0.02)


def test_a_step_that_overflows_is_left_out(tmp_path, monkeypatch):
    """16-mixed: of a scale that is too large the first step is, and the next ones learn what they would have."""
    begun = partialmethod(torch.amp.GradScaler.__init__, init_scale=2.0**20)
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", begun)
    run(tmp_path / "run", replace(FEW, lr=1e-3), trainable_layers="11", place=PlaceArgs("16-mixed", accelerator="cpu"))
    with (tmp_path / "run/metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    norms = [float(row["grad_norm"]) for row in rows if row["grad_norm"]]
    losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert not math.isfinite(norms[0]) and all(map(math.isfinite, norms[-2:])), norms
    assert losses[-1] < losses[0]


def test_activation_checkpointing_changes_nothing(tmp_path):
    plain, again = (
        run(tmp_path / str(flag), replace(FEW, activation_checkpointing=flag), trainable_layers="3,7")
        for flag in (False, True)
    )
    assert plain.outcome.after == again.outcome.after
    assert all(torch.equal(saved(plain)[name], saved(again)[name]) for name in BASE)


def test_a_second_run_finds_what_the_first_one_kept(tmp_path, capsys):
    frozen = FrozenArgs(cache="disk", cache_dir=tmp_path / "cache")
    for name, known in (("first", False), ("second", True)):
        run(tmp_path / name, replace(FEW, lr=2e-3), trainable_layers="11", frozen=frozen)
        assert ("records known" in capsys.readouterr().out) == known


def test_seconds_are_told_of_epochs_whose_ends_were_logged(tmp_path, capsys):
    data = DataArgs(path=TRAIN_FILE, val_split_fraction=0)
    few = replace(FEW, max_steps=None, epochs=3, global_batch_size=60, micro_batch_size=20)  # 5 steps each
    told = {}
    for interval in (1, 10):
        run(tmp_path / str(interval), replace(few, log_interval=interval), trainable_layers="11", data=data)
        lines = capsys.readouterr().out.splitlines()
        told[interval] = [line.count(", ") + 1 for line in lines if line.startswith("Epochs")]
    # Steps 10 and 15 are logged: of the third epoch both ends, of the first and the second only one
    assert told == {1: [3], 10: [1]}


def test_it_stops_when_the_time_is_up(tmp_path):
    result = run(tmp_path / "run", replace(FEW, max_steps=100000, max_time="1s"), trainable_layers="11")
    assert 0 < result.outcome.step < 100000 and "max_time" in result.outcome.stopped


def test_epochs_and_steps(tmp_path):
    data = DataArgs(path=TRAIN_FILE, val_split_fraction=0)
    result = run(
        tmp_path / "run", TrainArgs(lr=1e-3, epochs=1, global_batch_size=128), data=data, trainable_layers="11"
    )
    assert result.outcome.step == 3 and result.outcome.before is None  # 300 records, no validation


def test_a_used_out_dir_is_refused_and_the_default_is_always_new(tmp_path, monkeypatch):
    run(tmp_path / "run", trainable_layers="11")
    with pytest.raises(UsageError, match="already holds something"):
        run(tmp_path / "run", trainable_layers="11")
    monkeypatch.chdir(tmp_path)
    results = [run(None, trainable_layers="11") for _ in range(2)]
    assert run("named", trainable_layers="11").checkpoint_dir.is_dir()  # a plain string is a path too
    assert [str(r.out_dir) for r in results] == ["out/finetune/full", "out/finetune/full-2"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"trainable_layers": "12"}, "ids 0 to 11"),
        ({"checkpoint_dir": "nowhere"}, "is no directory"),
        ({"place": PlaceArgs(accelerator="tpu")}, "cannot be used here"),
        ({"place": PlaceArgs(devices=0)}, "cannot be used here"),
        ({"place": PlaceArgs(devices="x")}, "cannot be used here"),
        ({"untie_embeddings": True, "trainable_layers": "1", "data": DataArgs(path="nowhere.json")}, "no data"),
        ({"data": DataArgs(max_seq_length=4096)}, "512 positions"),
        ({"train": TrainArgs(max_steps=3, lr_warmup_steps=4)}, "longer than the run"),
        ({"data": DataArgs(val_split_fraction=0), "eval": EvalArgs(patience=2)}, "need validation records"),
        ({"frozen": FrozenArgs(stream_frozen=True)}, "the embedding trains, so nothing below it is frozen"),
        ({"frozen": FrozenArgs(cache="gpu"), "place": PlaceArgs(accelerator="cpu")}, "this run is on the CPU"),
        ({"frozen": FrozenArgs(fused_backward=True)}, "clipping needs all gradients"),
        ({"save": "delta"}, "everything trains, so that a delta would be the whole"),
        ({"data": DataArgs(val_split_fraction=0.2, val_path=VAL_FILE)}, "keep one"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(tmp_path, words, told):
    with pytest.raises(UsageError, match=told):
        finetune_full(out_dir=tmp_path / "run", **words)
    assert not (tmp_path / "run").exists()
