"""Good checkpoints of every kind, to be made wrong."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stops import ctrl_c_in_step

from litfreeze.__main__ import main
from litfreeze.demo import MODEL_DIR, TRAIN_FILE


@pytest.fixture(scope="session")
def seed(tmp_path_factory) -> Callable[[str], Path]:
    """seed("peft"): a good directory of that kind, made once."""
    root = tmp_path_factory.mktemp("seeds")

    def get(name: str) -> Path:
        if name == "demo":
            return MODEL_DIR
        if not (root / name).exists():
            SEEDS[name](root / name, get)
        return root / name

    return get


def good(*words: str | Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([str(word) for word in words]) == 0


SHORT = ("--train.max_steps", "3", "--eval.max_samples", "4", "--cache", "off")


def trained(out: Path, *words: str) -> None:
    run = out.with_name(f"{out.name}-run")
    good("finetune", *words, *SHORT, "--out_dir", run)
    (run / "final").rename(out)


def classifier(out: Path, _) -> None:
    data = out.with_name("classes.csv")
    data.write_text("text,label\n" + "play a song,music\nis it raining,weather\n" * 8, encoding="utf-8")
    trained(out, "full", "--task", "classification", "--data", str(data), "--trainable_layers", "none")


def sharded(out: Path, get) -> None:
    shutil.copytree(get("hf"), out)
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    names = list(tensors)
    shards = {"model-1.safetensors": names[:50], "model-2.safetensors": names[50:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, out / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {"total_size": 4833880}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def pickled(out: Path, get) -> None:
    shutil.copytree(get("hf"), out)
    torch.save(load_file(out / "model.safetensors"), out / "pytorch_model.bin")
    (out / "model.safetensors").unlink()


def interrupted(out: Path, _) -> None:
    """A run that was stopped in its third step, with points to go on from."""
    words = ["lora", *SHORT, "--train.save_interval", "1", "--trainable_layers", "11"]
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with ctrl_c_in_step(3), quiet[0], quiet[1]:
        assert main(["finetune", *words, "--data", str(TRAIN_FILE), "--out_dir", str(out)]) == 130


SEEDS = {
    "hf": lambda out, get: good("convert", "to_hf", "--out_dir", out),
    "adapter": lambda out, get: trained(out, "lora", "--trainable_layers", "11"),
    "peft": lambda out, get: good("convert", "to_peft", get("adapter"), "--out_dir", out),
    "delta": lambda out, get: trained(out, "full", "--save", "delta", "--trainable_layers", "11"),
    "classifier": classifier,
    "sharded": sharded,
    "pickled": pickled,
    "interrupted": interrupted,
    "gguf": lambda out, get: good("convert", "to_gguf", "--out_file", out / "model.gguf"),
}


@pytest.fixture
def cwd(tmp_path, monkeypatch) -> Path:
    """An empty working directory, in which a command that is refused must leave nothing."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"
