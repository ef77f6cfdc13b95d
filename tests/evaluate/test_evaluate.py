"""`litfreeze evaluate`: the figures are those of validation, of transformers and of greedy decoding; what stands beside
what; and what is refused."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from litfreeze.__main__ import main
from litfreeze.checkpoint.open import began_from, open_checkpoint
from litfreeze.data.args import DataArgs
from litfreeze.demo import MODEL_DIR, TRAIN_FILE, VAL_FILE
from litfreeze.evaluate.evaluate import setup as evaluate
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.generate.base import setup as generate
from litfreeze.scripts.convert import to_hf
from litfreeze.scripts.merge import merge_lora
from litfreeze.train.args import EvalArgs, TrainArgs

FEW = TrainArgs(lr=2e-3, max_steps=3, global_batch_size=8, watch_interval=0)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """40 of the embedded validation utterances."""
    file = tmp_path_factory.mktemp("data") / "few.jsonl"
    lines = VAL_FILE.read_text(encoding="utf-8").splitlines()[:40]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory, few):
    """A short run that validated on these."""
    data = DataArgs(path=TRAIN_FILE, val_path=few)
    place = {"out_dir": tmp_path_factory.mktemp("run") / "run", "save": "delta", "save_dtype": "float32"}
    return finetune_full(trainable_layers="10,11", data=data, train=FEW, **place)


def write(file: Path, records) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def test_base_and_tuned_have_the_scores_of_validation(run, few, tmp_path, capsys):
    base, tuned = evaluate(str(run.checkpoint_dir), data=few, json=tmp_path / "figures.json")
    for found, of_run in ((base["records"], run.outcome.before), (tuned["records"], run.outcome.after)):
        assert found.loss == pytest.approx(of_run.loss, rel=1e-6)
        assert (found.accuracy, found.exact_match, found.targets) == (
            of_run.accuracy,
            of_run.exact_match,
            of_run.targets,
        )
    assert tuned["records"].loss < base["records"].loss
    out = capsys.readouterr().out
    head, rows = next(line for line in out.splitlines() if "base (demo)" in line), out.splitlines()
    assert str(run.checkpoint_dir) in head and f"{few}: 40 records, 40 of them measured" in out
    loss = next(line for line in rows if line.startswith("loss"))
    assert loss.split() == ["loss", f"{run.outcome.before.loss:.4f}", f"{run.outcome.after.loss:.4f}"]
    written = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert written["data"] == str(few)
    assert [each["records"]["loss"] for each in written["checkpoints"]] == [base["records"].loss, tuned["records"].loss]
    assert written["checkpoints"][1]["records"]["perplexity"] == pytest.approx(math.exp(tuned["records"].loss))


def test_perplexity_is_that_of_transformers(tmp_path):
    text = "the quick brown fox jumps over the lazy dog while the band plays on"
    file = write(tmp_path / "text.jsonl", [{"text": text}])
    [found] = evaluate(data=file)
    tokenizer = open_checkpoint(MODEL_DIR).tokenizer()
    ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_id]])
    theirs = AutoModelForCausalLM.from_pretrained(to_hf(out_dir=tmp_path / "hf"), dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(ids, labels=ids).loss.item()
    assert found["records"].loss == pytest.approx(expected, rel=1e-5)
    assert found["records"].exact_match is None and found["records"].targets == ids.shape[1] - 1


def test_exact_match_is_what_greedy_decoding_writes(tmp_path):
    prompts = ["play some jazz", "book a table for two", "will it rain in Paris", "rate this book five stars"]
    answers = [generate(prompt, max_new_tokens=64) for prompt in prompts]
    records = [
        {"prompt": p, "completion": a if i % 2 else a + " and more"}
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True))
    ]
    [found] = evaluate(data=write(tmp_path / "own.jsonl", records))
    assert found["records"].exact_match == 0.5


def test_each_base_stands_there_once_and_only_if_it_is_wanted(run, few, tmp_path, monkeypatch):
    adapter = finetune_lora(
        trainable_layers="10,11", train=FEW, eval=EvalArgs(max_samples=4, max_new_tokens=2), out_dir=tmp_path / "lora"
    ).checkpoint_dir
    merged = merge_lora(adapter, tmp_path / "merged")
    paths = [str(run.checkpoint_dir), str(adapter), str(merged)]
    names = [found["name"] for found in evaluate(",".join(paths), data=few, limit=4)]
    assert names == ["base (demo)", *paths]
    with_base, alone = evaluate([paths[1]], data=few, limit=4), evaluate(paths[1], data=few, limit=4, with_base=False)
    assert len(with_base) == 2 and len(alone) == 1 and alone[0] == with_base[1]
    together = evaluate(paths[1:], data=few, with_base=False)
    assert together[0]["records"].loss == pytest.approx(together[1]["records"].loss, rel=1e-2)  # rounded to bf16
    assert len(evaluate([str(MODEL_DIR), paths[1]], data=few, limit=4)) == 2  # it was named


def test_a_base_that_is_gone_is_told(few, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(MODEL_DIR, base)
    whole = finetune_full(
        checkpoint_dir=base, trainable_layers="11", train=FEW, out_dir=tmp_path / "run"
    ).checkpoint_dir
    shutil.rmtree(base)
    assert len(evaluate(str(whole), data=few, limit=4)) == 1
    told = capsys.readouterr().out
    assert "its base is left out" in told and "--base_dir" not in told  # which a whole checkpoint does not take


def test_what_columns_do_not_have_in_common_is_told_of_each(few, tmp_path, capsys):
    short = tmp_path / "short"
    shutil.copytree(MODEL_DIR, short)
    config = json.loads((short / "config.json").read_text(encoding="utf-8"))
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 24}), encoding="utf-8")
    long = {"prompt": "play some jazz " * 6, "completion": "Play"}
    data = write(tmp_path / "d.jsonl", [long, {"prompt": "play jazz", "completion": "Play"}])
    evaluate([str(short), str(MODEL_DIR)], data=DataArgs(path=data, overlong="drop"))
    told = capsys.readouterr().out
    assert re.search(rf"^ +{re.escape(str(short))}: .*, 1 of them measured$", told, re.M)
    assert re.search(r"^ +demo: .*, 2 of them measured$", told, re.M)


def test_the_base_is_asked_in_the_style_of_what_was_trained(few, tmp_path):
    options = {"trainable_layers": "11", "train": FEW, "out_dir": tmp_path / "run", "save": "delta"}
    run = finetune_full(data=DataArgs(path=TRAIN_FILE, val_path=few, prompt_style="alpaca"), **options)
    base, _ = evaluate(str(run.checkpoint_dir), data=few)
    assert base["records"].loss == pytest.approx(run.outcome.before.loss, rel=1e-6)


def test_what_was_saved_whole_knows_what_it_began_from(run, tmp_path):
    """Also where that was made another in memory: a classifier, what stands over its base."""
    (tmp_path / "c.csv").write_text("text,label\n" + "play jazz,a\nbook a table,b\n" * 4, encoding="utf-8")
    words = {"trainable_layers": "11", "train": FEW, "save": "full"}
    classifier = finetune_full(data=DataArgs(path=tmp_path / "c.csv"), task="classification",
                               out_dir=tmp_path / "classes", **words)  # fmt: skip
    further = finetune_full(run.checkpoint_dir, out_dir=tmp_path / "further", **words)
    for made in (classifier, further):
        assert began_from(open_checkpoint(made.checkpoint_dir)).path == MODEL_DIR.resolve()


def test_a_classifier_has_accuracy_and_f1(few, tmp_path, capsys):
    run = finetune_full(
        task="classification",
        trainable_layers="none",
        data=DataArgs(path=TRAIN_FILE, val_path=few),
        train=TrainArgs(max_steps=4),
        out_dir=tmp_path / "run",
        save="delta",
    )
    [found] = evaluate(str(run.checkpoint_dir), data=few)
    after = run.outcome.after
    assert found["records"].accuracy == after.accuracy and found["records"].macro_f1 == pytest.approx(after.macro_f1)
    out = capsys.readouterr().out
    assert "macro F1" in out and "knows no classes" in out and "perplexity" not in out


def test_no_two_columns_have_one_name(few, tmp_path, capsys):
    for name in ("a@1", "a@2"):
        shutil.copytree(MODEL_DIR, tmp_path / name)
    same = str(tmp_path / "a@1")
    assert main(["evaluate", f"{same},{tmp_path / 'a@2'},{same}", "--data", str(few), "--limit", "2"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in (f"{same} (1)", f"{same} (2)", str(tmp_path / "a@2"))), told


def test_limit_takes_the_first(few, tmp_path):
    lines = few.read_text(encoding="utf-8").splitlines()[:6]
    [limited] = evaluate(data=few, limit=6)
    [all_of_them] = evaluate(data=write(tmp_path / "six.jsonl", map(json.loads, lines)))
    assert limited["records"] == all_of_them["records"]


WRONG = {
    ("--limit", "0"): "--limit 0 must be at least 1",
    ("--micro_batch_size", "0"): "must be at least 1",
    ("--data.val_split_fraction", "0.5"): "looks at all records",
    ("--data.text_key", "x"): "belongs to --task classification",
    ("--include_path", "."): "--include_path is for --tasks",
    ("--num_fewshot", "1"): "--num_fewshot is for --tasks",
    ("--json", "no/such/folder.json"): "must name a file",
    ("--checkpoint_dir", "a,,b"): "has an empty part",
    ("--data", "absent.jsonl"): "absent.jsonl",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_is_told(words, capsys):
    assert main(["evaluate", *words]) == 2
    err = capsys.readouterr().err
    assert WRONG[words] in err and len(err.strip().splitlines()) == 1


def test_without_lm_eval_it_is_said_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    monkeypatch.delitem(__import__("sys").modules, "litfreeze.evaluate.harness", raising=False)
    assert main(["evaluate", "--tasks", "arc_easy"]) == 2
    assert "pip install 'litfreeze[eval]'" in capsys.readouterr().err
