"""`litfreeze rank`, and its rankings as --trainable_layers, from the command line."""

import json
import re
from pathlib import Path

import pytest
import yaml
from stops import ctrl_c_in_step

from litfreeze.__main__ import main
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.choose.words import METHODS
from litfreeze.demo import MODEL_DIR, TRAIN_FILE
from litfreeze.freeze.plan import block_of

QUICK = ["--train.max_steps", "2", "--train.global_batch_size", "4", "--train.watch_interval", "0",
         "--eval.max_samples", "4", "--eval.max_new_tokens", "2"]  # fmt: skip


def ranked(capsys, *words: str) -> list[int]:
    """The blocks of the table, best first."""
    assert main(["rank", *words]) == 0
    rows = re.findall(r"^ *(\d+) +(\d+) +\S+(?: +█+)?$", capsys.readouterr().out, re.M)
    assert [int(place) for place, _ in rows] == list(range(1, 13))
    return [int(block) for _, block in rows]


@pytest.mark.painted
@pytest.mark.parametrize("method", METHODS)
def test_table_json_and_picture_say_the_same(capsys, tmp_path, method):
    files = ["--out_json", str(tmp_path / "r.json"), "--png", str(tmp_path / "r.png")]
    few = ["--samples", "8"] if method in ("gradient", "angular") else []
    order = ranked(capsys, "--method", method, *few, *files)
    read = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert read["order"] == order and read["method"] == method
    assert sorted(read["scores"], reverse=True) == [read["scores"][i] for i in order]
    assert read["settings"].get("records") == (8 if few else None)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.png"]


def test_it_says_what_to_do_next_in_words_that_work(capsys):
    assert main(["rank", "--method", "gradient", "--checkpoint_dir", str(MODEL_DIR), "--data", str(TRAIN_FILE),
                 "--samples", "4"]) == 0  # fmt: skip
    line = capsys.readouterr().out.splitlines()[-1]
    _, place, data, layers = re.fullmatch(
        r"Next {6}litfreeze (finetune full) --checkpoint_dir (\S+) --data (\S+) --trainable_layers (\S+)", line
    ).groups()
    assert (place, data) == (str(MODEL_DIR), str(TRAIN_FILE))
    assert main(["layers", "--checkpoint_dir", place, "--trainable_layers", layers]) == 0


@pytest.mark.parametrize("known", [False, True], ids=["to be made", "made already"])
def test_a_classifier_is_ranked_by_its_own_loss(capsys, tmp_path, known):
    task, data, base = ["--task", "classification"], ["--data", str(TRAIN_FILE)], []
    if known:
        made = [*task, *data, "--out_dir", str(tmp_path / "made"), "--trainable_layers", "none", *QUICK[:-2]]
        assert main(["finetune", "full", *made]) == 0
        base = ["--checkpoint_dir", str(tmp_path / "made/final")]
    best = ranked(capsys, "--method", "gradient", *task, *data, *base)[:3]
    if not known:
        assert ranked(capsys, "--method", "gradient", *data)[:3] != best
    run = tmp_path / "run"
    words = [*task, *data, *base, "--out_dir", str(run), "--trainable_layers", "rank:gradient:3", *QUICK[:-2]]
    assert main(["finetune", "full", *words]) == 0
    assert f"64 records: {', '.join(map(str, best))} (scores" in capsys.readouterr().out
    assert main(["rank", *base]) == 0
    assert ("finetune full" + " ".join(["", *base, *task])) in capsys.readouterr().out or not known
    if known:
        assert main(["rank", *base, "--method", "gradient", *data]) == 2
        assert "Say --task classification" in capsys.readouterr().err


def test_the_seed_draws_the_records(capsys):
    words = ("--method", "gradient", "--samples", "4")
    first, again, other = (ranked(capsys, *words, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method", "spectrm"], "spectrum"),
        (["--method", "gradient", "--checkpoint_dir", str(MODEL_DIR)], "spectrum and random need none"),
        (["--data", str(TRAIN_FILE)], "--data: spectrum looks at no data"),
        (["--method", "random", "--samples", "3"], "--samples: random looks at no data"),
        (["--micro_batch_size", "3"], "--micro_batch_size: spectrum looks at no data"),
        (["--method", "gradient", "--samples", "0"], "at least 1"),
        (["--method", "gradient", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--checkpoint_dir", "nowhere"], "nowhere"),
        (["--png", "nowhere/r.png"], "--png nowhere/r.png"),
        (["--out_json", "."], "--out_json ."),
    ],
)
def test_mistakes_are_told(capsys, words, told):
    assert main(["rank", *words]) == 2
    error = capsys.readouterr().err
    assert told in error and len(error.splitlines()) == 1


# --- as --trainable_layers ---


def changed_blocks(run: Path) -> set:
    base, trained = open_checkpoint(MODEL_DIR), open_checkpoint(run / "final")
    return {block_of(name) for name in base.layout() if not base.read(name).equal(trained.read(name))}


@pytest.mark.parametrize("method", ["spectrum", "gradient"])
def test_a_run_trains_the_best_and_keeps_their_ids(capsys, tmp_path, method):
    best = ranked(capsys, "--method", method)[:2]
    run = tmp_path / "run"
    words = ["--out_dir", str(run), "--trainable_layers", f"rank:{method}:2,7", "--trainable_modules", "mlp"]
    assert main(["finetune", "full", *words, *QUICK]) == 0
    assert f"Ranked by {method}" in (out := capsys.readouterr().out) and f": {best[0]}, {best[1]} (scores" in out
    assert changed_blocks(run) == {*best, 7}
    assert "rank" not in (run / "recipe.yaml").read_text("utf-8")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text("utf-8"))
    assert sorted(map(int, str(recipe["trainable_layers"]).split(","))) == sorted({*best, 7})


def test_a_run_that_goes_on_ranks_nothing_again(capsys, tmp_path):
    run = tmp_path / "run"
    words = ["--out_dir", str(run), "--trainable_layers", "rank:random:2", "--train.save_interval", "1"]
    with ctrl_c_in_step(2):
        assert main(["finetune", "full", *words, *QUICK]) == 130
    assert "Ranked by random" in capsys.readouterr().out
    for other in ("rank:random:3", "rank:spectrum:2"):
        assert main(["finetune", "full", "--resume", str(run), "--trainable_layers", other]) == 2
        assert f"--trainable_layers {other} stands beside --resume, but the run was made" in capsys.readouterr().err
    with ctrl_c_in_step(1):
        assert main(["finetune", "full", "--resume", str(run)]) == 130
    assert main(["finetune", "full", "--resume", str(run), "--trainable_layers", "rank:random:2"]) == 0
    assert "Ranked" not in capsys.readouterr().out
    assert changed_blocks(run) == set(ranked(capsys, "--method", "random")[:2])


def test_an_adapter_stands_on_the_best_and_is_not_ranked_itself(capsys, tmp_path):
    run = str(tmp_path / "run")
    assert main(["finetune", "lora", "--out_dir", run, "--trainable_layers", "rank:random:3", *QUICK]) == 0
    best = ranked(capsys, "--method", "random")[:3]
    assert {block_of(module) for module in open_checkpoint(f"{run}/final").lora.ranks} == set(best)
    for words in (["rank"], ["finetune", "lora", "--trainable_layers", "rank:random:3"]):
        assert main([*words, "--checkpoint_dir", f"{run}/final"]) == 2
        error = capsys.readouterr().err
        assert "is an adapter" in error and len(error.splitlines()) == 1


def test_layers_shows_what_a_ranking_would_train(capsys):
    best = ranked(capsys)[:3]
    assert main(["layers", "--trainable_layers", "rank:spectrum:3"]) == 0
    out = capsys.readouterr().out
    assert f"Ranked by spectrum: {', '.join(map(str, best))} (scores" in out
    assert re.search(rf"blocks {','.join(map(str, sorted(best)))}: ", out)


@pytest.mark.parametrize(
    "words",
    [
        ["layers", "--trainable_layers", "rank:gradient:4"],
        ["layers", "--trainable_layers", "rank:spectrum:40"],
        ["layers", "--freeze_trainable_layers_ids", "rank:spectrum:4"],
        ["finetune", "full", "--trainable_layers", "rank:spectrum"],
        ["finetune", "full", "--unfreeze", "0:rank:spectrum:4"],
        ["finetune", "full", "--trainable_layers", "rank:random:1", "--unfreeze", "gradual:2"],
        ["finetune", "full", "--trainable_layers", "rank:random:1", "--freeze_trainable_layers", "2"],
        ["finetune", "lora", "--trainable_layers", "rank:random:1", "--unfreeze", "gradual:2"],
        ["finetune", "full", "--layer_lr", "rank:spectrum:4:1e-4"],
        ["finetune", "lora", "--full_layers", "rank:spectrum:4"],
        ["finetune", "lora", "--trainable_layers", "rank:spectrm:4"],
        ["expand", "--after", "rank:spectrum:4"],
        ["diff", str(MODEL_DIR), str(MODEL_DIR), "--expect_only", "rank:spectrum:4"],
    ],
)
def test_a_ranking_that_is_not_to_be_had_is_refused_in_a_line(capsys, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert ("rank" in error or "keep one of them" in error) and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())
