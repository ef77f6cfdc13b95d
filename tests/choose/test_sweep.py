"""Several choices of layers tried on one budget: what is run, what is compared, what is recommended."""

import json
from pathlib import Path

import pytest

from litfreeze.__main__ import COMMANDS, main
from litfreeze.choose.sweep import Candidate, Tried, recommend, table
from litfreeze.cli import parse
from litfreeze.demo import TRAIN_FILE
from litfreeze.errors import RunError


def tried(words: str, loss: float, seconds: float, memory: float = 1e9, before: float = 2.0) -> Tried:
    results = {
        "best_loss": loss, "best_step": 30, "step": 30, "seconds": seconds, "peak_memory": memory, "layers": "10,11",
        "trained_parameters": 1, "parameters": 10, "before": {"loss": before},
    }  # fmt: skip
    return Tried(Candidate.parse(words), Path("nowhere"), results)


FAILED = Tried(Candidate.parse("all"), Path("nowhere"), failure="out of memory")


def test_the_lowest_loss_is_recommended_unless_a_cheaper_one_is_as_good():
    taken, told = recommend([tried("-2:", 0.5, 10), tried("all", 0.3, 40), FAILED])
    assert taken.candidate.words == "all" and "Take all: validation loss 0.3000 after 30 steps, the lowest" in told
    assert "the next has 0.5000" in told
    # of a gain of 1.7, two hundredths are 0.034
    taken, told = recommend([tried("-2:", 0.333, 10, 2.5e8), tried("all", 0.3, 40)])
    assert taken.candidate.words == "-2:" and "0.25 of its time and 0.25 of its memory" in told
    taken, _ = recommend([tried("-2:", 0.335, 10), tried("all", 0.3, 40)])
    assert taken.candidate.words == "all"


def test_where_nothing_helped_it_says_so():
    assert "No candidate got below" in recommend([tried("-2:", 2.0, 10), tried("all", 2.0, 40)])[1]
    with pytest.raises(RunError, match="out of memory"):
        recommend([FAILED])


def test_the_table_has_the_best_first_and_the_failed_last():
    lines = table([tried("-2:", 0.5, 10), FAILED, tried("lora:all", 0.3, 40)]).splitlines()
    assert lines[2].startswith("lora:all") and "LoRA on 10,11" in lines[2] and lines[3].startswith("-2:")
    assert lines[-1] == "all: failed. out of memory"


def test_candidates_stand_one_after_another():
    words = ["sweep", "--candidates", "-2:", "20%-80%", "lora:all", "--seed", "3"]
    _, arguments = parse(words, COMMANDS)
    assert arguments["candidates"] == ["-2:", "20%-80%", "lora:all"] and arguments["seed"] == 3
    assert parse(["sweep", "--candidates=-2:"], COMMANDS)[1]["candidates"] == ["-2:"]
    assert parse(["sweep", "--candidates", '["-2:", "all"]'], COMMANDS)[1]["candidates"] == ["-2:", "all"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--candidates", "-2:", "-2:"], "names one twice"),
        (["--candidates", "-2:", "40"], "ids 0 to 11"),
        (["--candidates", "rank:spectrun:2"], "spectrum"),
        (["--candidates", "last"], "takes a count"),
        (["--candidates"], "needs a value"),
        (["--candidates", "-2:", "lora:none"], "trains no block"),
        (["--candidates", "-2:", "--eval.initial_validation", "false"], "before training"),
        (["--candidates", "-2:", "--data.val_split_fraction", "0"], "compares validation losses"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_first_run(words, told, tmp_path, capsys):
    assert main(["sweep", *words, "--out_dir", str(tmp_path / "sweep")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.painted
def test_a_sweep_runs_each_once_and_goes_on_where_it_was(tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(TRAIN_FILE.read_text(encoding="utf-8").splitlines()[:24]), encoding="utf-8")
    words = ["sweep", "--data", str(few), "--train.max_steps", "2", "--out_dir", str(tmp_path / "sweep")]
    words += ["--accelerator", "cpu", "--train.lr", "1e-3"]
    assert main([*words, "--candidates", "-1", "lora:rank:random:2"]) == 0
    told = capsys.readouterr().out
    assert "1/2  -1" in told and "Take " in told and "litfreeze finetune" in told
    found = json.loads((tmp_path / "sweep/sweep.json").read_text())["candidates"]
    assert [one["results"]["step"] for one in found] == [2, 2]
    assert found[0]["results"]["layers"] == "11" and len(found[1]["results"]["layers"].split(",")) == 2
    assert (tmp_path / "sweep/sweep.png").read_bytes().startswith(b"\x89PNG")
    first = tmp_path / "sweep" / found[0]["run"]
    made = (first / "results.json").stat().st_mtime_ns
    again = tmp_path / "sweep" / found[1]["run"]
    (again / "results.json").unlink()  # as if it had been interrupted after it had saved something
    assert main([*words, "--candidates", "-1", "lora:rank:random:2"]) == 0
    assert (first / "results.json").stat().st_mtime_ns == made and (again / "results.json").exists()
    # With other options, or other records under the same name, nothing old is taken
    assert main([*words, "--candidates", "-1", "--train.lr", "1e-2"]) == 0
    few.write_text("\n".join(TRAIN_FILE.read_text(encoding="utf-8").splitlines()[24:48]), encoding="utf-8")
    assert main([*words, "--candidates", "-1"]) == 0
    losses = {json.loads(file.read_text())["best_loss"] for file in (tmp_path / "sweep").glob("1-*/results.json")}
    assert len(losses) == 3 and not list((tmp_path / "sweep").glob("*.cache"))
