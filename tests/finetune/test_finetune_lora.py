"""`finetune lora`: what trains and is kept, going on with an adapter, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.checkpoint.write import write_peft
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import UsageError
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.lora import is_lora
from litfreeze.outputs import claim
from litfreeze.place import PlaceArgs
from litfreeze.train.args import EvalArgs, TrainArgs

FEW = TrainArgs(lr=1e-3, max_steps=3, global_batch_size=8, micro_batch_size=4, watch_interval=0)
QUICK = EvalArgs(max_samples=8, max_new_tokens=2)


def run(out_dir, train=FEW, eval=QUICK, **words):
    return finetune_lora(out_dir=out_dir, train=train, eval=eval, **words)


def own(result) -> dict[str, torch.Tensor]:
    return load_file(result.checkpoint_dir / "trained.safetensors")


def manifest(result) -> dict:
    return json.loads((result.checkpoint_dir / "litfreeze.json").read_text())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter of q_proj and v_proj in blocks 2 and 3, three steps old."""
    path = tmp_path_factory.mktemp("adapter") / "run"
    return run(path, trainable_layers="2,3", lora_targets="q_proj,v_proj", lora_r=4, seed=3).checkpoint_dir


def test_only_the_adapter_trains_and_only_it_is_kept(tmp_path):
    result = run(tmp_path / "run", trainable_layers="10,11", lora_targets="attn,up_proj", use_dora=True)
    kept = own(result)
    modules = [f"attn.{p}_proj" for p in "qkvo"] + ["mlp.up_proj"]
    kinds = ("lora_A", "lora_B", "lora_magnitude")
    assert set(kept) == {f"blocks.{i}.{m}.{kind}" for i in (10, 11) for m in modules for kind in kinds}
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    proof = result.proof
    assert proof.frozen == 110 and proof.trained == len(kept)
    assert not proof.frozen_that_changed and not proof.trained_that_did_not
    # Nothing else is needed but the base: settings, identity of the base, tokenizer, template, recipe
    opened = open_checkpoint(result.checkpoint_dir)
    assert opened.lora.dora and set(opened.lora.ranks.values()) == {8} and opened.lora.dropout == 0.05
    assert manifest(result)["base"]["weights_hash"] == open_checkpoint(MODEL_DIR).weights_hash
    assert opened.tokenizer().chat_template and opened.prompt["style"] == "chat_template"
    assert "use_dora: true" in manifest(result)["training"]["recipe"]
    assert sum(f.stat().st_size for f in result.checkpoint_dir.iterdir()) < 1e6


def test_a_mixed_plan_trains_blocks_in_full_beside_the_adapter(tmp_path):
    result = run(tmp_path / "run", trainable_layers="0-9", full_layers="10,11", trainable_extra="final_norm")
    full = {name for name in own(result) if not is_lora(name)}
    assert full == {
        name
        for name in open_checkpoint(MODEL_DIR).layout()
        if name.startswith(("blocks.10.", "blocks.11.", "final_norm"))
    }
    assert {name.split(".")[1] for name in own(result) if is_lora(name)} == {str(i) for i in range(10)}
    assert not result.proof.frozen_that_changed and not result.proof.trained_that_did_not
    # Left to itself, the adapter takes the blocks that do not train in full
    again = run(tmp_path / "again", full_layers="10,11")
    assert {name for name in own(again) if is_lora(name)} == {name for name in own(result) if is_lora(name)}
    # And so it goes on
    on = run(tmp_path / "on", checkpoint_dir=result.checkpoint_dir)
    assert set(own(on)) == set(own(result)) and not on.proof.trained_that_did_not


def test_going_on_takes_everything_from_the_directory(tmp_path, adapter, capsys):
    before = {file: file.read_bytes() for file in adapter.parent.rglob("*") if file.is_file()}
    result = run(tmp_path / "run", TrainArgs(max_steps=3), checkpoint_dir=adapter)
    told = capsys.readouterr().out
    assert "Continues LoRA r 4, alpha 16 of" in told and "lora: 3 steps" in told
    old = open_checkpoint(adapter)
    last = old.history[-1]
    assert f"validation loss {last['after']['loss']:.4f}" in told
    assert "Its learning rate was 0.001; going on with 0.0005" in told
    new = open_checkpoint(result.checkpoint_dir)
    assert new.lora == old.lora and new.base.path == old.base.path
    assert result.outcome.before.loss == pytest.approx(last["after"]["loss"], rel=1e-5)
    assert result.outcome.after.loss < result.outcome.before.loss
    assert [entry["step"] for entry in new.history] == [3, 3]
    assert {file: file.read_bytes() for file in adapter.parent.rglob("*") if file.is_file()} == before


def test_options_that_agree_with_the_adapter_are_fine(tmp_path, adapter):
    result = run(
        tmp_path / "run", checkpoint_dir=adapter, lora_r=4, lora_alpha=16, trainable_layers="2,3",
        lora_targets="q_proj,v_proj", use_dora=False, lora_dropout=0.0,
    )  # fmt: skip
    assert open_checkpoint(result.checkpoint_dir).lora.dropout == 0.0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"lora_r": 8}, r"--lora_r 8 contradicts the adapter of .*, which has 4\..*--lora_resize"),
        ({"lora_alpha": 8}, r"--lora_alpha 8 contradicts .* has 16"),
        ({"use_dora": True}, r"--use_dora True contradicts .* has false"),
        ({"use_rslora": True}, r"--use_rslora"),
        ({"trainable_layers": "2-4"}, r"--trainable_layers 2-4 contradicts .* stands on q_proj, v_proj of blocks 2,3"),
        ({"trainable_layers": "2"}, r"--trainable_layers 2 contradicts"),
        ({"lora_targets": "q_proj"}, r"--lora_targets q_proj contradicts"),
        ({"lora_targets": "all"}, r"--lora_targets all contradicts"),
        ({"full_layers": "11"}, r"--full_layers 11 names 9 tensors .* nothing did"),
        ({"lora_resize": True}, r"needs --lora_r"),
        ({"lora_resize": True, "lora_r": 2}, r"a smaller one cannot"),
        ({"lora_resize": True, "lora_r": 8, "lora_alpha": 16}, r"--lora_alpha 16 contradicts .* has 32"),
        ({"lora_resize": True, "lora_r": 8, "merge_first": True}, r"Keep one"),
        ({"untie_embeddings": True, "lora_targets": "head"}, r"--lora_targets head contradicts"),
    ],
)
def test_options_that_contradict_the_adapter_are_errors_that_name_both(tmp_path, adapter, words, told):
    with pytest.raises(UsageError, match=told) as error:
        run(tmp_path / "run", checkpoint_dir=adapter, **words)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"lora_r": 0}, "--lora_r 0 must be a whole number, from 1 to 1,048,576"),
        ({"lora_alpha": -16}, "--lora_alpha -16 must be a number above 0"),
        ({"lora_alpha": float("nan")}, "--lora_alpha nan"),
        ({"lora_dropout": 1.0}, "--lora_dropout 1 must be"),
        ({"lora_plus_ratio": 0}, "--lora_plus_ratio"),
        ({"lora_targets": "q"}, "--lora_targets 'q' matches nothing"),
        ({"lora_targets": "norm"}, "matches nothing in this model's blocks"),
        ({"lora_targets": "q_proj,"}, "empty name"),
        ({"trainable_layers": "12"}, "ids 0 to 11"),
        ({"trainable_layers": "none"}, "No layer is left to adapt"),
        ({"full_layers": "all"}, "No layer is left to adapt"),
        ({"full_layers": "10", "trainable_layers": "all"}, "cannot train in full and carry an adapter too"),
        ({"full_layers": "99"}, "ids 0 to 11"),
        ({"full_layers": []}, "--full_layers is an empty list"),
        ({"trainable_extra": "head"}, "The head is tied"),
        ({"merge_first": True}, "carries no adapter"),
        ({"lora_resize": True, "lora_r": 16}, "carries no adapter"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(tmp_path, words, told):
    with pytest.raises(UsageError, match=told):
        run(tmp_path / "run", **words)
    assert not (tmp_path / "run").exists()


def test_an_adapter_without_its_base_or_with_another_is_refused(tmp_path, adapter):
    base = Path(shutil.copytree(MODEL_DIR, tmp_path / "base"))
    first = run(tmp_path / "run", checkpoint_dir=base, trainable_layers="0", lora_targets="q_proj")
    base.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"no longer there.*--base_dir"):
        run(tmp_path / "on", checkpoint_dir=first.checkpoint_dir)
    again = run(tmp_path / "on", checkpoint_dir=first.checkpoint_dir, base_dir=tmp_path / "moved")
    assert open_checkpoint(again.checkpoint_dir).base.path == tmp_path / "moved"
    other = finetune_full(out_dir=tmp_path / "other", trainable_layers="0", train=FEW, eval=QUICK).checkpoint_dir
    with pytest.raises(UsageError, match="is not the base"):
        run(tmp_path / "wrong", checkpoint_dir=first.checkpoint_dir, base_dir=other)
    run(tmp_path / "forced", checkpoint_dir=first.checkpoint_dir, base_dir=other, force_base=True)
    with pytest.raises(UsageError, match="is an adapter"):
        finetune_full(out_dir=tmp_path / "full", checkpoint_dir=adapter, train=FEW)


def test_an_adapter_of_the_head_alone_has_no_blocks(tmp_path):
    head = run(tmp_path / "head", lora_targets="head", trainable_layers="none").checkpoint_dir
    run(tmp_path / "on", checkpoint_dir=head, trainable_layers="none")
    with pytest.raises(UsageError, match=r"--trainable_layers 3 contradicts the adapter of .*, which stands on head"):
        run(tmp_path / "not", checkpoint_dir=head, trainable_layers="3")


@pytest.mark.parametrize("method", ["delta", "lora"])
def test_a_head_is_untied_over_what_moved_the_embedding(tmp_path, method):
    """The new head begins as the embedding in hand, which is not the base's; and it is kept."""
    first = finetune_full(
        out_dir=tmp_path / "first", trainable_layers="11", trainable_extra="embed", save="delta", train=FEW, eval=QUICK
    )
    moved = open_checkpoint(first.checkpoint_dir).read("embed.weight")
    assert not torch.equal(moved, open_checkpoint(MODEL_DIR).read("embed.weight"))
    words = {"checkpoint_dir": first.checkpoint_dir, "out_dir": tmp_path / "second", "untie_embeddings": True}
    words |= {"trainable_layers": "0", "train": FEW, "eval": QUICK}
    second = finetune_full(**words, save="delta") if method == "delta" else finetune_lora(**words)
    again = open_checkpoint(second.checkpoint_dir)
    assert not again.config.tie_embeddings and not second.proof.frozen_that_changed
    assert torch.equal(again.read("embed.weight"), moved) and torch.equal(again.read("head.weight"), moved)
    plain = finetune_full(**{**words, "checkpoint_dir": MODEL_DIR, "out_dir": tmp_path / "third"}, save="delta")
    assert "head.weight" not in open_checkpoint(plain.checkpoint_dir).tensors  # there it is the base's embedding


def test_what_python_calls_a_list_of_layers_is_one(tmp_path):
    import numpy as np

    result = run(tmp_path / "run", trainable_layers=range(10, 12), full_layers=np.array([3]))
    assert {name.split(".")[1] for name in own(result)} == {"3", "10", "11"}
    assert run(tmp_path / "again", trainable_layers=(np.int64(10),), lora_targets=("q_proj",)).proof.trained == 2


def test_a_peft_adapter_is_not_credited_with_its_bases_training(tmp_path, capsys):
    base = finetune_full(
        out_dir=tmp_path / "base", trainable_layers="0", train=TrainArgs(lr=3e-5, max_steps=1), eval=QUICK
    )
    adapter = run(tmp_path / "lora", checkpoint_dir=base.checkpoint_dir, trainable_layers="11").checkpoint_dir
    write_peft(tmp_path / "peft", open_checkpoint(adapter))
    capsys.readouterr()
    run(tmp_path / "on", TrainArgs(max_steps=1), checkpoint_dir=tmp_path / "peft")
    told = capsys.readouterr().out
    assert "Continues LoRA" in told and "Trained   full" not in told and "lr 0.0002" in told


def test_lora_plus_goes_on_as_it_was(tmp_path, capsys):
    first = run(tmp_path / "first", trainable_layers="11", lora_plus_ratio=8.0)
    run(tmp_path / "second", checkpoint_dir=first.checkpoint_dir)
    assert "B goes on at 8 times the learning rate of A" in capsys.readouterr().out


def test_two_runs_that_begin_together_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(claim(None, "lora")) for _ in range(3)] == [f"out/finetune/lora{end}" for end in ("", "-2", "-3")]


def test_a_larger_rank_begins_as_the_same_function(tmp_path, adapter):
    result = run(tmp_path / "run", checkpoint_dir=adapter, lora_r=16, lora_resize=True)
    grown = open_checkpoint(result.checkpoint_dir)
    assert set(grown.lora.ranks.values()) == {16} and set(grown.lora.alphas.values()) == {64}
    last = open_checkpoint(adapter).history[-1]["after"]["loss"]
    assert result.outcome.before.loss == pytest.approx(last, rel=1e-6)
    assert not result.proof.trained_that_did_not


def test_merge_first_begins_anew_over_the_merged_base(tmp_path, adapter, capsys):
    result = run(tmp_path / "run", checkpoint_dir=adapter, merge_first=True, lora_r=2, trainable_layers="0")
    assert "Merged    LoRA r 4, alpha 16 of" in capsys.readouterr().out
    new = open_checkpoint(result.checkpoint_dir)
    assert new.base.path == result.out_dir / "base" and new.base.manifest["kind"] == "merged"
    assert {module.split(".")[1] for module in new.lora.ranks} == {"0"}
    last = open_checkpoint(adapter).history[-1]["after"]["loss"]
    assert result.outcome.before.loss == pytest.approx(last, rel=0.02)  # but for the rounding
    assert [entry["kind"] for entry in new.history] == ["lora", "lora"]
    # The folder of the run holds its base: it can be moved as a whole
    moved = result.out_dir.rename(tmp_path / "moved")
    assert open_checkpoint(moved / "final").base.path.resolve() == moved / "base"


def test_lora_plus_and_full_weights_have_learning_rates_of_their_own(tmp_path):
    """One AdamW step moves each weight by its learning rate, whatever the gradient."""
    train = TrainArgs(lr=1e-3, max_steps=1, global_batch_size=8, lr_warmup_steps=0, lr_schedule="constant")
    result = run(
        tmp_path / "run",
        train,
        trainable_layers="0",
        full_layers="11",
        lora_plus_ratio=16.0,
        full_lr_ratio=0.5,
        lora_dropout=0.0,
    )
    model = load_model(open_checkpoint(result.checkpoint_dir), lambda _: torch.float32)
    b = model.blocks[0].mlp.up_proj.lora_B.abs()
    assert b[b > 0].median().item() == pytest.approx(16e-3, rel=1e-2)
    base = open_checkpoint(MODEL_DIR).read("blocks.11.mlp.up_proj.weight").float()
    moved = (model.blocks[11].mlp.up_proj.weight - base).abs()
    assert moved.median().item() == pytest.approx(0.5e-3, rel=0.15)  # and rounded to bf16


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_it_trains_in_every_precision(tmp_path, precision):
    result = run(tmp_path / "run", place=PlaceArgs(precision), trainable_layers="11", use_dora=True, full_layers="0")
    assert not result.proof.frozen_that_changed
    # bf16 magnitudes and norms near 1 may stay where they are
    assert all("norm" in name or "magnitude" in name for name in result.proof.trained_that_did_not)
    assert result.outcome.after.loss < result.outcome.before.loss
