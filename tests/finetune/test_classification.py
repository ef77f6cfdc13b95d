"""`--task classification`, whole runs on the embedded demo: what trains, what is told, saved, merged, exported."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stops import ctrl_c_in_step

from litfreeze.__main__ import main
from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.confusion import macro_f1
from litfreeze.data.args import DataArgs
from litfreeze.demo import MODEL_DIR, TRAIN_FILE, VAL_FILE
from litfreeze.errors import UsageError
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.freeze.args import FrozenArgs
from litfreeze.generate.classify import setup as classify
from litfreeze.place import PlaceArgs
from litfreeze.train.args import EvalArgs, TrainArgs

FEW = TrainArgs(lr=5e-3, max_steps=4, global_batch_size=16, micro_batch_size=8, watch_interval=0)
QUICK = EvalArgs(max_samples=32)
OFF = FrozenArgs(cache="off")
HEAD = "head.weight"


def run(out_dir, script=finetune_full, train=FEW, **words):
    words = {"task": "classification", "frozen": OFF, "eval": QUICK, **words}
    return script(out_dir=out_dir, train=train, **words)


def trained(result) -> dict[str, torch.Tensor]:
    return load_file(next(result.checkpoint_dir.glob("*.safetensors")))


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def losses(run_dir: Path) -> list[str]:
    return [row[key] for row in rows(run_dir) for key in ("train_loss", "val_loss", "val_accuracy", "val_macro_f1")]


@pytest.fixture
def records(tmp_path) -> Path:
    lines = TRAIN_FILE.read_text(encoding="utf-8").splitlines()[:60]
    (tmp_path / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "records.jsonl"


@torch.no_grad()
def hf_logits(path: Path, texts: list[str], adapter: Path | None = None, count: int = 7) -> torch.Tensor:
    """By transformers' own tokenizer and model, all texts in one padded batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, num_labels=count).eval()
    if adapter is not None:
        from peft import PeftModel

        model.config.pad_token_id = model.config.pad_token_id or model.config.eos_token_id
        model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.eos_token
    return model(**tokenizer(texts, padding=True, return_tensors="pt").to(model.device)).logits


@torch.no_grad()
def our_logits(path: Path, texts: list[str]) -> torch.Tensor:
    checkpoint = open_checkpoint(path)
    model, tokenizer = load_model(checkpoint, lambda _: torch.float32), checkpoint.tokenizer()
    return torch.stack([model(torch.tensor([tokenizer.encode(text, special_tokens=True)]))[0, -1] for text in texts])


TEXTS = ["play some jazz", "what will the weather be like in Paris tomorrow", "rate this book five stars"]


@pytest.mark.painted
def test_the_head_alone(tmp_path, capsys):
    result = run(
        tmp_path / "run", train=replace(FEW, max_steps=40), trainable_layers="none", eval=EvalArgs(interval=20)
    )
    told = capsys.readouterr().out
    after, base = trained(result), load_file(MODEL_DIR / "litfreeze.safetensors")
    assert after[HEAD].shape == (7, 128) and all(torch.equal(after[name], base[name]) for name in base)
    assert result.proof.trained == 1 and result.proof.frozen == len(base)
    scores = result.outcome.after
    assert scores.accuracy > 0.4 > result.outcome.before.accuracy and scores.exact_match is None
    counts = np.array(scores.confusion)
    assert counts.sum() == scores.targets == 696 and np.trace(counts) == round(scores.accuracy * 696)
    assert scores.macro_f1 == macro_f1(counts)
    assert float(rows(tmp_path / "run")[-1]["val_macro_f1"]) == scores.macro_f1

    assert "As a classifier: a new head for 7 classes." in told and "7 classes: GetWeather (54)" in told
    assert "after the last token of each comes its class" in told and "accuracy" in told and "macro F1" in told
    assert "exact match" not in told and "tokens right" not in told and "Prompt style" not in told
    assert f"litfreeze classify --checkpoint_dir {tmp_path}/run/final --text 'book a table" in told
    assert (tmp_path / "run/confusion.png").stat().st_size > 5000
    report = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert (
        "![confusion](confusion.png)" in report and "| GetWeather |" in report and "Expected  BookRestaurant" in report
    )
    manifest = json.loads((tmp_path / "run/final/litfreeze.json").read_text(encoding="utf-8"))
    assert "confusion" in manifest["training"]["after"] and manifest["training"]["after"]["confusion"] is None

    # What was measured is what is told of the same texts
    classify(tmp_path / "run/final", data=VAL_FILE)
    figures = capsys.readouterr().out
    assert "of 696 texts whose class is known" in figures and "Right     accuracy " in figures


@pytest.mark.parametrize("way", ["head", "blocks", "lora"])
def test_ways_to_train_end_in_transformers(tmp_path, records, way):
    """Head alone, with blocks, with an adapter: a checkpoint over its base, merged, exported."""
    words = {"data": DataArgs(path=records), "save": "delta", "trainable_layers": "none" if way == "head" else "10,11"}
    script = finetune_full
    if way == "lora":
        script, words = finetune_lora, {"data": DataArgs(path=records), "trainable_layers": "10,11"}
    result = run(tmp_path / "run", script, **words)
    names = set(trained(result))
    assert HEAD in names and len(names) == {"head": 1, "blocks": 19, "lora": 1 + 2 * 14}[way]
    opened = open_checkpoint(result.checkpoint_dir)
    assert opened.config.labels and opened.base.path.resolve() == MODEL_DIR.resolve()
    assert not result.proof.frozen_that_changed and not result.proof.trained_that_did_not

    final = str(result.checkpoint_dir)
    merge = "merge_lora" if way == "lora" else "merge_delta"
    exact = ["--dtype", "float32"] if way == "lora" else []
    assert main([merge, "--checkpoint_dir", final, "--out_dir", str(tmp_path / "merged"), *exact]) == 0
    assert (
        main(["convert", "to_hf", "--checkpoint_dir", str(tmp_path / "merged"), "--out_dir", str(tmp_path / "hf")]) == 0
    )
    ours = our_logits(result.checkpoint_dir, TEXTS)
    torch.testing.assert_close(hf_logits(tmp_path / "hf", TEXTS), ours, rtol=1e-5, atol=1e-5)
    assert classify(tmp_path / "hf", text=TEXTS[0]) == classify(result.checkpoint_dir, text=TEXTS[0])
    if way == "lora":
        assert main(["convert", "to_hf", "--out_dir", str(tmp_path / "base_hf")]) == 0
        assert main(["convert", "to_peft", final, "--out_dir", str(tmp_path / "peft")]) == 0
        settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
        assert settings["task_type"] == "SEQ_CLS" and settings["modules_to_save"] == ["score"]
        theirs = hf_logits(tmp_path / "base_hf", TEXTS, tmp_path / "peft")
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_a_classifier_goes_on(tmp_path, records, capsys):
    """Full after full, LoRA after full, LoRA after LoRA, over a merged one, and one from transformers."""
    data = DataArgs(path=records)
    first = run(tmp_path / "1", data=data, trainable_layers="11")
    second = run(tmp_path / "2", checkpoint_dir=first.checkpoint_dir, data=data, trainable_layers="10", save="delta")
    assert "Goes on as a classifier of its 7 classes." in capsys.readouterr().out
    assert set(trained(second)) == {HEAD, *(n for n in trained(second) if n.startswith("blocks.10."))}
    assert second.outcome.before.loss == pytest.approx(first.outcome.after.loss, abs=0.05)  # saved in bf16
    third = run(tmp_path / "3", finetune_lora, checkpoint_dir=second.checkpoint_dir, data=data, trainable_layers="0")
    capsys.readouterr()
    fourth = run(tmp_path / "4", finetune_lora, checkpoint_dir=third.checkpoint_dir, data=data)
    assert "Continues LoRA" in capsys.readouterr().out
    assert set(trained(fourth)) == set(trained(third)) and not torch.equal(trained(fourth)[HEAD], trained(third)[HEAD])
    fifth = run(tmp_path / "5", finetune_lora, checkpoint_dir=fourth.checkpoint_dir, data=data, merge_first=True)
    assert open_checkpoint(fifth.checkpoint_dir).base.config.labels
    assert open_checkpoint(fifth.checkpoint_dir).history[-1]["kind"] == "lora"


def test_an_adapter_of_language_becomes_a_classifier(tmp_path, records):
    data = DataArgs(path=records)
    language = run(tmp_path / "1", finetune_lora, task="language", data=data, trainable_layers="3,4")
    for name, merge in (("2", False), ("3", True)):
        result = run(
            tmp_path / name, finetune_lora, checkpoint_dir=language.checkpoint_dir, data=data, merge_first=merge
        )
        assert result.proof.trained_that_did_not == [] and open_checkpoint(result.checkpoint_dir).config.labels
        assert HEAD in trained(result)


@pytest.mark.parametrize("layers", ["none", "11"])
def test_kept_activations_change_nothing(tmp_path, records, layers):
    words = {"data": DataArgs(path=records), "trainable_layers": layers}
    for cache in ("off", "ram", "disk"):
        run(tmp_path / cache, frozen=FrozenArgs(cache=cache, cache_dir=tmp_path / "cache"), **words)
    off, *others = (losses(tmp_path / cache) for cache in ("off", "ram", "disk"))
    for other in others:
        for a, b in zip(off, other, strict=True):
            assert a == b or float(a) == pytest.approx(float(b), rel=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_is_its_twin(tmp_path, records, method):
    script = {"full": finetune_full, "lora": finetune_lora}[method]
    train = replace(FEW, max_steps=6, save_interval=2)
    words = {"data": DataArgs(path=records), "trainable_layers": "10,11", "checkpoint_dir": MODEL_DIR}
    whole = run(tmp_path / "whole", script, replace(train, lr=None), **words)
    with ctrl_c_in_step(5), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", script, replace(train, lr=None), **words)
    resumed = script(resume=tmp_path / "cut")
    ours, twins = trained(resumed), trained(whole)
    assert set(ours) == set(twins) and all(torch.equal(ours[name], twins[name]) for name in twins)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_new_head_learns_faster_than_the_rest(tmp_path, records, capsys):
    words = {"data": DataArgs(path=records), "checkpoint_dir": MODEL_DIR}
    slow = replace(FEW, lr=None)
    run(tmp_path / "1", train=slow, trainable_layers="11", **words)
    told = capsys.readouterr().out
    assert "trains; lr 0.005" in told and "trains; lr 5e-05" in told
    assert "layer_lr: head:0.005" in (tmp_path / "1/recipe.yaml").read_text(encoding="utf-8")
    run(tmp_path / "2", checkpoint_dir=tmp_path / "1/final", data=DataArgs(path=records), train=slow)
    assert "lr 0.005" not in capsys.readouterr().out  # it is no longer new
    run(tmp_path / "4", train=slow, trainable_layers="none", **words)
    told = capsys.readouterr().out
    assert "lr 0.005 cosine" in told and "5e-05" not in told
    run(tmp_path / "3", train=replace(FEW, lr=1e-4), trainable_layers="11", **words)
    assert "lr 0.005" not in capsys.readouterr().out  # what is asked for goes for all


def test_classify_a_file(tmp_path, records, capsys):
    result = run(tmp_path / "run", data=DataArgs(path=records))
    capsys.readouterr()
    texts = [json.loads(line)["prompt"] for line in records.read_text(encoding="utf-8").splitlines()]
    (tmp_path / "texts.csv").write_text("id,text\n" + "\n".join(f'1,"{text}"' for text in texts), encoding="utf-8")
    place = ["--checkpoint_dir", str(result.checkpoint_dir)]
    line = ["classify", *place, "--data", str(tmp_path / "texts.csv"), "--out_csv", str(tmp_path / "out.csv")]
    assert main(line) == 0
    told = capsys.readouterr().out
    assert "60 records (not used of them: id)" in told and "Right" not in told
    with (tmp_path / "out.csv").open(encoding="utf-8") as lines:
        found = list(csv.DictReader(lines))
    assert [row["text"] for row in found] == texts
    assert [row["source"] for row in found] == [f"{tmp_path / 'texts.csv'}:{line}" for line in range(2, 62)]
    assert main(["classify", *place, "--text", texts[0], "--top", "3"]) == 0
    first = capsys.readouterr().out.splitlines()
    assert len(first) == 3 and first[0].endswith(found[0]["label"])
    assert float(first[0].split()[0]) == pytest.approx(100 * float(found[0]["probability"]), abs=0.01)


def wrong(words: str, capsys) -> str:
    """The one line that a mistaken command ends with."""
    assert main(words.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") <= 2
    return told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--data.prompt_style plain", "--data.prompt_style plain belongs to --task language"),
        ("--data.mask_prompt false", "--data.mask_prompt False belongs to --task language"),
        ("--eval.max_new_tokens 3", "--eval.max_new_tokens 3 belongs to --task language"),
        ("--untie_embeddings", "a classifier's head is its own anyway"),
        ("--data one.jsonl", "every record has the label 'x'"),
        ("--data gone.jsonl", "There is no data at gone.jsonl"),
        ("--data nokeys.jsonl", "a text is under text, sentence"),
        ("--data records.jsonl --data.val_path one.jsonl", "'x', first at one.jsonl:1, is no class of the training"),
        ("--task regression", "language, classification"),
        (
            "--checkpoint_dir run/final --data two.jsonl",
            "knows 7 classes and two.jsonl has 2: 'a', 'b' only in the data",
        ),
        ("--checkpoint_dir run/final --task language", "Say --task classification to go on with it"),
        ("--data.label_key x --task language", "--data.label_key x belongs to --task classification"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(shared_run, monkeypatch, capsys, words, told):
    monkeypatch.chdir(shared_run)
    before = sorted(Path().rglob("*"))
    assert told in wrong(f"finetune full --task classification {words}", capsys)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("finetune lora --task classification --lora_targets head", "a classifier's head always trains in full"),
        (
            "finetune lora --task classification --trainable_layers none",
            "finetune full --task classification --trainable_layers none",
        ),
        ("generate --checkpoint_dir run/final", "is a classifier and writes nothing: litfreeze classify"),
        ("chat --checkpoint_dir run/final", "is a classifier and writes nothing: litfreeze classify"),
        ("serve --checkpoint_dir run/final", "is a classifier and writes nothing: litfreeze classify"),
        (f"classify --checkpoint_dir {MODEL_DIR} --text hi", "is a language model. Make a classifier of it with"),
        ("classify --checkpoint_dir run/final", "either --text '…', or --data"),
        ("classify --checkpoint_dir run/final --text hi --data two.jsonl", "either --text '…', or --data"),
        ("classify --checkpoint_dir run/final --text hi --out_csv x.csv", "--out_csv is for the answers to --data"),
        (
            "classify --checkpoint_dir run/final --data two.jsonl --data.label_key label",
            "'a', first at two.jsonl:1, is no class of run/final",
        ),
        (
            "classify --checkpoint_dir run/final --data two.jsonl --out_csv no/where.csv",
            "must name a file, in a folder",
        ),
        ("classify --checkpoint_dir run/final --data two.jsonl --top 2", "--top is for --text"),
        ("classify --checkpoint_dir run/final --data two.jsonl --data.max_seq_length 1", "at least 2 tokens"),
        ("classify --checkpoint_dir run/final --data two.jsonl --data.max_seq_length 513", "the 512 positions"),
    ],
)
def test_mistakes_elsewhere(shared_run, monkeypatch, capsys, words, told):
    monkeypatch.chdir(shared_run)
    assert told in wrong(words, capsys)


def test_diff_with_its_language_model(shared_run, capsys):
    """All but the head is compared, which is another one."""
    line = ["diff", str(MODEL_DIR), str(shared_run / "run/final")]
    assert main(line) == 0
    told = capsys.readouterr().out
    assert "nothing changed" in told and "the config changed too: the head has no classes in A and 7 in B" in told
    assert "also the head" not in told
    assert main([*line, "--expect_only", "head"]) == 0
    assert "config" not in capsys.readouterr().out
    assert main([*line, "--expect_only", "11"]) == 1
    assert "the head has no classes in A and 7 in B" in capsys.readouterr().err


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory) -> Path:
    """A folder with a classifier and some files that are of no use to one."""
    folder = tmp_path_factory.mktemp("classifier")
    shutil.copyfile(TRAIN_FILE, folder / "records.jsonl")
    for name, records in {
        "one": [{"text": "t", "label": "x"}] * 4,
        "two": [{"text": "t", "label": label} for label in "abab"],
        "nokeys": [{"review": "t", "stars": 4}] * 4,
    }.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    run(folder / "run", train=replace(FEW, max_steps=1), trainable_layers="none")
    return folder


def test_python_takes_plain_paths(tmp_path, records):
    result = run(str(tmp_path / "run"), data=str(records), trainable_layers="none")
    assert (
        classify(str(result.checkpoint_dir), text="play jazz")[0]
        in open_checkpoint(result.checkpoint_dir).config.labels
    )
    with pytest.raises(UsageError, match="has no tokens"):
        classify(result.checkpoint_dir, text="")


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_other_precisions(tmp_path, records, capsys, precision):
    run(tmp_path / "run", data=DataArgs(path=records), trainable_layers="11", place=PlaceArgs(precision))
    assert "After     validation loss" in capsys.readouterr().out
    assert classify(tmp_path / "run/final", text="play jazz", precision="bf16-true")


def test_files_without_classes_are_classified_all_the_same(shared_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shared_run)
    (tmp_path / "blank.csv").write_text("text,label\nplay jazz,\nbook a table,\n", encoding="utf-8")
    (tmp_path / "null.jsonl").write_text('{"text": "play jazz", "label": null}\n', encoding="utf-8")
    (tmp_path / "other.csv").write_text("text,answer\nplay jazz,He said yes\n", encoding="utf-8")
    for name, count in (("blank.csv", 2), ("null.jsonl", 1), ("other.csv", 1)):
        out = tmp_path / f"{name}.out.csv"
        words = ["classify", "--checkpoint_dir", "run/final", "--data", str(tmp_path / name), "--out_csv", str(out)]
        assert main(words) == 0
        told = capsys.readouterr().out
        assert "Right" not in told and ("is no class of this model" in told) == (name == "other.csv")
        assert len(out.read_text(encoding="utf-8").splitlines()) == 1 + count
