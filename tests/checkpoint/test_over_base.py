"""Directories that hold only what trained: what they cost, how they find their base, and that they are the whole."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.checkpoint.tensors import same_bits
from litfreeze.checkpoint.trained import write_trained
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import UsageError
from litfreeze.freeze.words import plan_from_words
from litfreeze.scripts.convert import to_hf
from litfreeze.scripts.merge import merge_delta


def train_by_hand(base_dir: Path, out_dir: Path, whole: bool, layers: str = "10,11", extra=None, untie=False, **save):
    """What a run leaves: the chosen weights moved, the rest as it was."""
    base = open_checkpoint(base_dir)
    base = base.untied() if untie else base
    plan = plan_from_words(base.config, layers, trainable_extra=extra)
    model = load_model(base, lambda _: torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in plan.trained:
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    proof = write_trained(
        out_dir, base, dict(model.named_parameters()), plan, {"kind": "full", "prompt": base.prompt}, whole, **save
    )
    return model, proof


@pytest.fixture
def base_dir(tmp_path) -> Path:
    return Path(shutil.copytree(MODEL_DIR, tmp_path / "base"))


@pytest.mark.parametrize("untie", [False, True])
def test_a_delta_is_the_whole_in_less_room(tmp_path, base_dir, untie):
    extra = "head" if untie else None
    train_by_hand(base_dir, tmp_path / "whole", True, extra=extra, untie=untie)
    _, proof = train_by_hand(base_dir, tmp_path / "delta", False, extra=extra, untie=untie)
    whole, delta = open_checkpoint(tmp_path / "whole"), open_checkpoint(tmp_path / "delta")
    assert set(delta.tensors) == set(plan_from_words(delta.config, "10,11", trainable_extra=extra).trained)
    assert delta.weights_hash == whole.weights_hash and delta.layout() == whole.layout()
    assert all(torch.equal(delta.read(name), whole.read(name)) for name in whole.layout())
    assert proof.frozen + proof.trained == len(whole.layout())
    assert not proof.frozen_that_changed and not proof.trained_that_did_not
    size = sum(file.stat().st_size for file in (tmp_path / "delta").glob("*.safetensors"))
    trained = sum(delta.read(name).numel() * 2 for name in delta.tensors)
    assert size < trained + 4096
    merge_delta(tmp_path / "delta")
    again = open_checkpoint(tmp_path / "delta-whole")
    assert again.weights_hash == whole.weights_hash and again.base is None
    assert again.config == whole.config


def test_a_delta_on_a_delta_stands_on_the_same_base(tmp_path, base_dir):
    train_by_hand(base_dir, tmp_path / "first", False, "10,11")
    train_by_hand(tmp_path / "first", tmp_path / "second", False, "0")
    second = open_checkpoint(tmp_path / "second")
    assert second.base.path == base_dir
    assert {name.split(".")[1] for name in second.tensors} == {"0", "10", "11"}
    first = open_checkpoint(tmp_path / "first")
    assert torch.equal(first.read("blocks.10.attn.q_proj.weight"), second.read("blocks.10.attn.q_proj.weight"))


def test_masters_can_be_kept_in_a_delta(tmp_path, base_dir):
    model, _ = train_by_hand(base_dir, tmp_path / "delta", False, save_dtype=torch.float32)
    delta = open_checkpoint(tmp_path / "delta")
    name = "blocks.10.mlp.up_proj.weight"
    assert torch.equal(delta.read(name), model.get_parameter(name)) and delta.dtype("embed.weight") == torch.bfloat16
    merge_delta(tmp_path / "delta", tmp_path / "whole", dtype="float32")
    assert torch.equal(open_checkpoint(tmp_path / "whole").read(name), model.get_parameter(name))
    merge_delta(tmp_path / "delta", tmp_path / "rounded")  # by default in the base's own dtypes
    assert same_bits(open_checkpoint(tmp_path / "rounded").read(name), delta.read(name), torch.bfloat16)


def test_the_export_of_a_delta_is_whole(tmp_path, base_dir):
    train_by_hand(base_dir, tmp_path / "delta", False)
    to_hf(tmp_path / "delta", tmp_path / "hf")
    hf, delta = open_checkpoint(tmp_path / "hf"), open_checkpoint(tmp_path / "delta")
    assert hf.weights_hash == delta.weights_hash and hf.base is None


def test_base_and_delta_may_move_together_or_be_named(tmp_path, base_dir):
    (tmp_path / "project").mkdir()
    base_dir = base_dir.rename(tmp_path / "project/base")
    train_by_hand(base_dir, tmp_path / "project/delta", False)
    hash_before = open_checkpoint(tmp_path / "project/delta").weights_hash
    (tmp_path / "project").rename(tmp_path / "moved")
    assert open_checkpoint(tmp_path / "moved/delta").weights_hash == hash_before
    (tmp_path / "moved/base").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"no longer there\. Name the base's directory with --base_dir"):
        open_checkpoint(tmp_path / "moved/delta")
    assert open_checkpoint(tmp_path / "moved/delta", tmp_path / "elsewhere").base.path == tmp_path / "elsewhere"
    with pytest.raises(UsageError, match="needs no base"):
        open_checkpoint(tmp_path / "elsewhere", base_dir)


def test_another_base_is_refused_unless_insisted_on(tmp_path, base_dir):
    train_by_hand(base_dir, tmp_path / "delta", False)
    train_by_hand(base_dir, tmp_path / "other", True, "0")
    with pytest.raises(UsageError, match=r"is not the base that .* was trained on .*--force_base"):
        open_checkpoint(tmp_path / "delta", tmp_path / "other")
    forced = open_checkpoint(tmp_path / "delta", tmp_path / "other", force_base=True)
    other = open_checkpoint(tmp_path / "other")
    assert torch.equal(forced.read("blocks.0.attn.q_proj.weight"), other.read("blocks.0.attn.q_proj.weight"))
    with pytest.raises(UsageError, match="itself holds only what trained"):
        open_checkpoint(tmp_path / "delta", tmp_path / "delta")


def test_a_hugging_face_base_is_known_by_its_files_or_read_again(tmp_path, base_dir):
    to_hf(base_dir, tmp_path / "hf")
    train_by_hand(tmp_path / "hf", tmp_path / "delta", False)
    manifest = json.loads((tmp_path / "delta/litfreeze.json").read_text())
    assert manifest["base"]["weights_hash"] == open_checkpoint(base_dir).weights_hash
    assert list(manifest["base"]["files"]) == ["model.safetensors"]
    os.utime(tmp_path / "hf/model.safetensors")  # another time: read again, and found to be the same
    assert open_checkpoint(tmp_path / "delta").base.path == tmp_path / "hf"
    # The converted copy has the same identity
    assert open_checkpoint(tmp_path / "delta", base_dir).base.path == base_dir
    flip_last_byte(tmp_path / "hf/model.safetensors")
    with pytest.raises(UsageError, match="is not the base"):
        open_checkpoint(tmp_path / "delta")


def test_a_base_whose_bytes_changed_under_its_manifest_is_refused(tmp_path, base_dir):
    train_by_hand(base_dir, tmp_path / "delta", False)
    flip_last_byte(base_dir / "litfreeze.safetensors")
    with pytest.raises(UsageError, match="is not the base"):
        open_checkpoint(tmp_path / "delta")


def test_the_base_that_moved_along_comes_before_what_stands_in_its_old_place(tmp_path, base_dir):
    (tmp_path / "p").mkdir()
    base_dir.rename(tmp_path / "p/base")
    train_by_hand(tmp_path / "p/base", tmp_path / "p/delta", False)
    shutil.copytree(tmp_path / "p", tmp_path / "q")
    shutil.rmtree(tmp_path / "p/base")
    train_by_hand(MODEL_DIR, tmp_path / "p/base", True, "0")  # another model in the old place
    assert open_checkpoint(tmp_path / "q/delta").base.path == tmp_path / "q/base"
    (tmp_path / "q/base").rename(tmp_path / "away")
    with pytest.raises(UsageError, match="is not the base"):
        open_checkpoint(tmp_path / "q/delta")


def test_dots_stand_for_directories_too(tmp_path, base_dir, monkeypatch):
    train_by_hand(base_dir, tmp_path / "delta", False)
    monkeypatch.chdir(tmp_path / "delta")
    assert merge_delta(".").resolve() == tmp_path / "delta-whole"


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damaged(tmp_path, base_dir, change) -> Path:
    train_by_hand(base_dir, tmp_path / "delta", False)
    manifest = json.loads((tmp_path / "delta/litfreeze.json").read_text())
    change(tmp_path / "delta", manifest)
    (tmp_path / "delta/litfreeze.json").write_text(json.dumps(manifest))
    return tmp_path / "delta"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda path, m: m.pop("base"), "names no base"),
        (lambda path, m: m.update(lora={"targets": {}}), "adapter's settings are damaged"),
        (lambda path, m: m.update(tensors=None), "has no hashes"),
        (lambda path, m: m["tensors"].update({"blocks.0.norm_1.weight": "0"}), "blocks.0.norm_1.weight is missing"),
        (lambda path, m: flip_last_byte(path / "trained.safetensors"), "is damaged: its sha256"),
        (lambda path, m: m["base"].pop("from_here"), "names no base"),
        (lambda path, m: m["base"].update(path=str(path), from_here="."), "no longer there"),
        (lambda path, m: m.update(history=[{}, {"step": "x"}]), "what it says of its training is damaged"),
        (lambda path, m: truncate(path / "trained.safetensors"), "truncated"),
        (lambda path, m: (path / "trained.safetensors").unlink(), "has no weights"),
        (
            lambda path, m: m.update(
                lora={"dropout": 0, "rslora": False, "dora": False, "targets": {"blocks.99.q": {"r": 1, "alpha": 1}}}
            ),
            "no linear layer blocks.99.q",
        ),
    ],
)
def test_damage_is_told_in_one_line(tmp_path, base_dir, change, told):
    path = damaged(tmp_path, base_dir, change)
    with pytest.raises(UsageError, match=told) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value)
