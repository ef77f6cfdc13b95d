"""An interrupted run goes on and ends as its uninterrupted twin."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stops import ctrl_c_in_step
from test_optim import OPTIMIZERS

from litfreeze.__main__ import main
from litfreeze.data.args import DataArgs
from litfreeze.demo import TRAIN_FILE
from litfreeze.errors import UsageError
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.freeze.args import FrozenArgs
from litfreeze.place import PlaceArgs
from litfreeze.train.args import EvalArgs, TrainArgs

# 40 records in batches of 16: three steps to an epoch, so that the interruption falls inside one
TRAIN = TrainArgs(lr=2e-3, max_steps=8, global_batch_size=16, micro_batch_size=8, save_interval=2, weight_decay=0.1)
EVAL = EvalArgs(max_samples=8, interval=3, max_new_tokens=2)
METHODS = {
    "lora": (finetune_lora, {"trainable_layers": "0,1", "full_layers": "11", "lora_dropout": 0.3, "use_dora": True}),
    "full": (finetune_full, {"trainable_layers": "10,11", "trainable_extra": "embed"}),
}


@pytest.fixture
def records(tmp_path) -> Path:
    lines = TRAIN_FILE.read_text(encoding="utf-8").splitlines()[:48]
    (tmp_path / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "records.jsonl"


def interrupt(method: str, run_dir: Path, records: Path, at: int = 6, train: TrainArgs = TRAIN, **words) -> None:
    """The run of `method`, which a Ctrl-C ends in the middle of step `at`."""
    script, own = METHODS[method]
    with ctrl_c_in_step(at), pytest.raises(KeyboardInterrupt):
        script(out_dir=run_dir, train=train, eval=EVAL, data=DataArgs(path=records), **{**own, **words})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(next(path.glob("*.safetensors")))


def log(run_dir: Path) -> list[dict]:
    timed = ("seconds", "tokens_per_second")
    with (run_dir / "metrics.csv").open() as rows:
        return [{key: float(v) for key, v in row.items() if v and key not in timed} for row in csv.DictReader(rows)]


@pytest.mark.parametrize(("method", "precision"), [("lora", "32-true"), ("full", "32-true"), ("full", "16-mixed")])
def test_a_resumed_run_ends_as_its_uninterrupted_twin(tmp_path, records, monkeypatch, capsys, method, precision):
    script, own = METHODS[method]
    own = {**own, "place": PlaceArgs(precision, accelerator="cpu")}
    whole = script(out_dir=tmp_path / "whole", train=TRAIN, eval=EVAL, data=DataArgs(path=records), **own)
    assert not (tmp_path / "whole/resume").exists()  # a finished run needs none
    cut = tmp_path / "cut"
    interrupt(method, cut, records, **own)
    told = capsys.readouterr().out
    assert f"litfreeze finetune {method} --resume {cut}" in told and not (cut / "final").exists()
    resumed = script(resume=cut)
    assert "Resumed after step 4 of 8" in capsys.readouterr().out
    ours, twins = weights(cut / "final"), weights(tmp_path / "whole/final")
    assert set(ours) == set(twins) and all(torch.equal(ours[name], twins[name]) for name in twins)
    assert log(cut) == log(tmp_path / "whole")
    assert resumed.outcome.after == whole.outcome.after and resumed.outcome.best_loss == whole.outcome.best_loss
    assert not (cut / "resume").exists()
    names = [{path.name for path in folder.iterdir()} for folder in (cut, tmp_path / "whole")]
    assert names[0] == names[1]


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_so_it_does_with_every_optimizer(tmp_path, records, monkeypatch, optimizer, fused):
    train = replace(TRAIN, optimizer=optimizer, global_batch_size=8, max_norm=None)
    words = {"eval": EVAL, "data": DataArgs(path=records), **METHODS["full"][1]}
    finetune_full(out_dir=tmp_path / "whole", train=train, **words)
    frozen = FrozenArgs(fused_backward=fused)
    interrupt("full", tmp_path / "cut", records, train=train, frozen=frozen)
    finetune_full(resume=tmp_path / "cut")
    ours, twins = (weights(tmp_path / name / "final") for name in ("cut", "whole"))
    assert set(ours) == set(twins) and all(torch.equal(ours[name], twins[name]) for name in twins)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")


def test_the_newest_run_is_found_and_paths_are_meant_from_where_it_began(tmp_path, records, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    interrupt("lora", Path("out/finetune/lora"), Path(records.name))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["finetune", "lora", "--resume"]) == 2
    assert "no interrupted run of finetune lora to resume" in capsys.readouterr().err
    shutil.copytree("../out", "out")
    assert main(["finetune", "lora", "--resume"]) == 0
    assert Path("out/finetune/lora/final").is_dir()


def test_merge_first_is_not_done_twice(tmp_path, records, monkeypatch):
    first = finetune_lora(out_dir=tmp_path / "first", train=TrainArgs(lr=1e-3, max_steps=2), eval=EVAL).checkpoint_dir
    interrupt("lora", tmp_path / "cut", records, checkpoint_dir=first, merge_first=True)
    base = (tmp_path / "cut/base/litfreeze.safetensors").stat().st_mtime_ns
    finetune_lora(resume=tmp_path / "cut")
    assert (tmp_path / "cut/base/litfreeze.safetensors").stat().st_mtime_ns == base


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-10] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "words", "told"),
    [
        (lambda cut, data: shutil.rmtree(cut / "resume"), {}, "no point to go on from"),
        (
            lambda cut, data: data.write_text(data.read_text().replace("play", "stop")),
            {},
            "the data of this run changed",
        ),
        (lambda cut, data: [flip_a_byte(file) for file in cut.glob("resume/*/state.safetensors")], {}, "every point"),
        (
            lambda cut, data: None,
            {"seed": 3},
            "--seed 3 stands beside --resume",
        ),
        (lambda cut, data: [file.write_text("{}") for file in cut.glob("resume/*/resume.json")], {}, "every point"),
        (
            lambda cut, data: None,
            {"train": TrainArgs(lr=1.0)},
            "--train.lr 1.0 stands beside --resume, but the run was made with 0.002",
        ),
        (lambda cut, data: None, {"lora_r": 4}, "--lora_r 4 stands beside --resume"),
    ],
)
def test_what_cannot_be_resumed_is_told(tmp_path, records, monkeypatch, change, words, told):
    cut = tmp_path / "cut"
    interrupt("lora", cut, records)
    change(cut, records)
    before = sorted(str(path) for path in cut.rglob("*"))
    with pytest.raises(UsageError, match=told):
        finetune_lora(resume=cut, **words)
    assert sorted(str(path) for path in cut.rglob("*")) == before


def test_options_that_say_the_same_are_fine_and_data_may_lie_elsewhere(tmp_path, records, monkeypatch):
    interrupt("lora", tmp_path / "cut", records)
    records = records.rename(tmp_path / "moved.jsonl")
    monkeypatch.setenv("LITFREEZE_TRAIN__LR", "2e-3")
    assert main(["finetune", "lora", "--resume", str(tmp_path / "cut"), "--data", str(records)]) == 0


def test_an_adapter_that_changed_under_the_run_is_told(tmp_path, records, monkeypatch):
    few = TrainArgs(lr=1e-3, max_steps=1)
    first, other = (
        finetune_lora(out_dir=tmp_path / str(seed), train=few, eval=EVAL, seed=seed).out_dir for seed in (1, 2)
    )
    cut = tmp_path / "cut"
    own = {"checkpoint_dir": first / "final", "trainable_layers": None, "full_layers": None, "use_dora": None}
    interrupt("lora", cut, records, **own)
    shutil.rmtree(first)
    shutil.move(other, first)
    with pytest.raises(UsageError, match="the checkpoint of this run changed"):
        finetune_lora(resume=cut)


def test_a_run_of_another_method_or_a_finished_one_is_told(tmp_path, records, monkeypatch):
    interrupt("lora", tmp_path / "cut", records)
    with pytest.raises(UsageError, match="is a run of finetune lora, not of full"):
        finetune_full(resume=tmp_path / "cut")
    done = finetune_lora(resume=tmp_path / "cut").out_dir
    with pytest.raises(UsageError, match="It is finished"):
        finetune_lora(resume=done)
    assert json.loads((done / "final/litfreeze.json").read_text())["training"]["step"] == 8
