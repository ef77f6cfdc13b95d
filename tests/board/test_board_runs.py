"""Runs as processes of their own: started, found again, stopped, gone on with, and what they leave."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from litfreeze_board import runs
from litfreeze_board.results import Left, left_by
from served_board import wait_for

from litfreeze.errors import UsageError

WORDS = ["finetune", "full", "--trainable_layers", "10,11", "--out_dir", "out/finetune/full"]


@pytest.fixture
def root(tmp_path):
    yield tmp_path
    for run in runs.all_runs(tmp_path):
        if run.alive:
            os.killpg(run.pid, 9)


def begin(root, steps, *more):
    words = [*WORDS, "--train.max_steps", str(steps), *more]
    return runs.start(root, words, "out/finetune/full", steps, "10,11", 12)


def test_a_run_from_beginning_to_end(root, monkeypatch):
    monkeypatch.setenv("LITFREEZE_TOKEN", "not-for-a-run")
    monkeypatch.setenv("LITFREEZE_TRAIN__LR", "1")  # the words say everything
    run = begin(root, 2000, "--train.save_interval", "10", "--eval.interval", "100")
    assert run.state == "running" and runs.next_out_dir(root, "full") == "out/finetune/full-2"
    wait_for(lambda: (run.place / "metrics.csv").is_file() and run.resumable)

    again = runs.read_run(run.folder)  # as a server that has just begun
    assert again == run and again.alive
    with pytest.raises(UsageError, match="still running"):
        runs.resume(again)
    asked = runs.stop(again)
    assert asked.state in ("stopping", "stopped")
    wait_for(lambda: not asked.alive)
    assert runs.read_run(run.folder).state == "stopped" and asked.resumable
    log = run.log.read_text(encoding="utf-8")
    assert log.startswith("$ litfreeze finetune full") and "Go on with" in log and "lr 0.002" in log

    on = runs.resume(asked)
    wait_for(lambda: "Resumed after step" in run.log.read_text(encoding="utf-8"))
    wait_for(lambda: not runs.stop(on).alive)
    assert [left.name for left in left_by(on)][:1] != ["final"] and left_by(on)[0].partial
    kept = [file for folder in (run.folder, run.place) for file in folder.rglob("*") if file.is_file()]
    assert kept and not any(b"not-for-a-run" in file.read_bytes() for file in kept)

    left = left_by(on)[0]
    runs.act(on, f"merge-{left.name}", left.merge())
    runs.act(on, f"diff-{left.name}", left.diff(str(on.folder / "diff.png")))
    wait_for(lambda: not any(task.alive for task in runs.tasks(on)))
    logs = {task.name: (on.folder / f"{task.name}.log").read_text(encoding="utf-8") for task in runs.tasks(on)}
    assert "Written" in logs[f"merge-{left.name}"] and (root / left.merged / "config.json").is_file()
    assert "error:" not in logs[f"diff-{left.name}"] and (on.folder / "diff.png").is_file()


def test_a_run_that_ends_and_one_that_fails(root):
    run = begin(root, 2)
    wait_for(lambda: not run.alive)
    assert run.state == "done" and left_by(run)[0].name == "final"
    again = begin(root, 2)  # the folder has something now
    wait_for(lambda: not again.alive)
    assert again.id == "0002" and "already holds something" in again.log.read_text(encoding="utf-8")


def test_an_adapter_goes_to_peft_and_into_its_base():
    manifest = {
        "kind": "lora",
        "holds": "trained",
        "training": {"trained": ["blocks.3.attn.q_proj.lora_A", "head.lora_B"]},
    }
    left = Left("final", "out/finetune/lora/final", manifest)
    assert left.export()[:2] == ["convert", "to_peft"] and left.merge()[0] == "merge_lora"
    words = left.diff("x.png")
    assert words[words.index("--expect_only") + 1] == "3,head"
    best = Left("best", "out/finetune/full/best", {**manifest, "kind": "full"})
    assert best.export()[:2] == ["convert", "to_hf"] and best.merge()[0] == "merge_delta"


def test_a_number_that_is_another_process_now(tmp_path):
    mine = runs._born(os.getpid())
    run = runs.Run(tmp_path / "0001", ["finetune", "full"], "out/x", 1, "1", 12, 0.0, os.getpid(), mine)
    assert run.alive
    other = replace(run, born=f"{mine}0")
    assert not other.alive and other.state == "failed"
    assert runs.stop(other) == other  # and this test goes on


def test_what_is_not_readable_is_no_run(tmp_path):
    for number, text in enumerate(["", "{", "[]", json.dumps({"words": []})], 1):
        folder = tmp_path / runs.STATE / f"{number:04d}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(text, encoding="utf-8")
    assert runs.all_runs(tmp_path) == []


def test_it_is_this_litfreeze_wherever_it_runs():
    assert runs.command(["layers"]) == [sys.executable, "-m", "litfreeze", "layers"]
    assert runs.environment()["PYTHONSAFEPATH"] == "1"
    assert Path(runs.command([])[0]).is_absolute()
