"""Records to texts and classes: which keys are taken, which ids classes get, what is cut, what is refused."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from litfreeze.data.args import DataArgs
from litfreeze.data.batches import build_batch
from litfreeze.data.classes import (
    LABEL_KEYS,
    TEXT_KEYS,
    as_sample,
    find_label,
    find_text,
    labels_of,
    load_classified,
    sort_labels,
    tokenise,
)
from litfreeze.data.shelf import IGNORE
from litfreeze.demo import MODEL_DIR, TRAIN_FILE
from litfreeze.errors import UsageError
from litfreeze.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_dir(MODEL_DIR)
BANKING = Path(__file__).parents[3] / "shared" / "data" / "banking77" / "train.csv"

words = st.text("abcdefgh ", min_size=1, max_size=12).filter(str.strip)
labels = st.sampled_from(["x", "y", "z z"])


def write(path: Path, records: list[dict], name: str = "data.jsonl") -> DataArgs:
    (path / name).write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return DataArgs(path=path / name)


def load(args: DataArgs, classes, length: int = 32, pad: int | None = None):
    return load_classified(args, TOKENIZER, classes, length, pad)


@given(words, st.integers(-5, 200) | words, st.sampled_from(TEXT_KEYS), st.sampled_from(LABEL_KEYS), st.booleans())
def test_text_and_label_are_found_under_every_known_key(text, label, text_key, label_key, named):
    record = {"id": 3, text_key: text, label_key: label}
    keys = (text_key, label_key) if named else (None, None)
    assert find_text(record, keys[0]) == (text, {text_key})
    assert find_label(record, keys[1]) == (str(label).strip(), {label_key})


def test_what_stands_beside_an_instruction_belongs_to_it():
    record = {"instruction": "Which mood?", "input": "I am glad", "output": "joy"}
    assert find_text(record)[0] == "Which mood?\n\nI am glad"
    assert find_text(record, "input")[0] == "I am glad"
    assert find_label({"text": "x"}) is None


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"text": "a", "prompt": "b", "label": "c"}, "'text' and 'prompt': say with --data.text_key"),
        ({"text": "a", "label": "b", "category": "c"}, "'label' and 'category': say with --data.label_key"),
        ({"review": "a", "label": "b"}, "has the keys 'review', 'label'; a text is under text, sentence"),
        ({"text": "a", "mood": "b"}, "has the keys 'text', 'mood'; a label is under label, category"),
        ({"text": 3, "label": "b"}, "'text' should be text"),
        ({"text": "a", "label": True}, "'label' should be text, not bool"),
        ({"text": "a", "label": 1.5}, "'label' should be text, not float"),
        ({"text": "a", "label": None}, "'label' should be text, not null"),
    ],
)
def test_what_is_no_labelled_text_is_told_with_its_place(tmp_path, record, told):
    args = write(tmp_path, [{"text": "fine", "label": "x"}, record])
    if list(record) == ["text", "prompt", "label"]:
        assert find_text(record, "prompt")[0] == "b"
    with pytest.raises(UsageError) as error:
        labels_of(args)
    assert told in str(error.value) and "data.jsonl:2" in str(error.value)


def test_a_key_that_is_not_there_is_told(tmp_path):
    args = write(tmp_path, [{"review": "a", "mood": "b"}] * 2)
    with pytest.raises(UsageError, match=r"has no 'reveiw' \(--data.text_key\).*Did you mean"):
        labels_of(replace(args, text_key="reveiw", label_key="mood"))


@given(st.sets(st.integers(-30, 300), min_size=1), st.sets(words, min_size=1))
def test_classes_are_ordered_by_number_or_as_text(numbers, texts):
    assert sort_labels({str(n) for n in numbers}) == tuple(map(str, sorted(numbers)))
    assert sort_labels(texts) == tuple(sorted(texts))


@given(st.lists(st.tuples(words, labels), min_size=4, max_size=40), st.integers(0, 9), st.floats(0.01, 0.9))
def test_every_class_keeps_a_record_to_learn_from(tmp_path, records, seed, fraction):
    args = write(tmp_path, [{"text": text, "label": label} for text, label in records])
    classes = sort_labels({label for _, label in records})
    samples = load(replace(args, seed=seed, val_split_fraction=fraction), classes)
    assert len(samples.train) + len(samples.val) == len(records) and samples.labels == classes
    assert {int(sample.labels[-1]) for sample in samples.train} == set(range(len(classes)))
    assert len(samples.val) <= max(1, round(len(records) * fraction))


@given(st.lists(words, min_size=1, max_size=8), st.integers(1, 6))
def test_a_sample_is_the_text_and_behind_it_the_class(texts, length):
    for text, (tokens, count) in zip(texts, tokenise(texts, TOKENIZER, length, None), strict=True):
        whole = TOKENIZER.encode(text, special_tokens=True)
        assert tokens == whole[:length] and count == len(whole)
        sample = as_sample(tokens, 5, "here:1")
        assert sample.tokens[:-1].tolist() == tokens and sample.labels.tolist() == [IGNORE] * len(tokens) + [5]
        assert sample.prompt_tokens.tolist() == tokens
    samples = [as_sample(tokens, i, "") for i, (tokens, _) in enumerate(tokenise(texts, TOKENIZER, length, None))]
    batch = build_batch(samples, list(range(len(samples))))
    assert sorted(batch.targets.tolist()) == list(range(len(samples)))  # one each, whatever is shared
    last = {int(batch.targets[m]): int(batch.tokens[row]) for m, row in enumerate(batch.rows)}
    assert all(last[i] == sample.tokens[-2] for i, sample in enumerate(samples))


def test_pads_at_the_end_are_not_read():
    eos = TOKENIZER.eos_token
    texts = [f"hello{eos}{eos}", f"{eos}hello", eos]
    (one, _), (two, _), (none, _) = tokenise(texts, TOKENIZER, 32, TOKENIZER.eos_id)
    assert one == TOKENIZER.encode("hello") and two[0] == TOKENIZER.eos_id and none == []


def test_counts_and_words_for_a_person(tmp_path):
    long = "word " * 50
    records = [
        {"text": t, "label": c, "id": 1} for t, c in [("a", "x"), (long, "y"), (" ", "y"), ("b", ""), ("c", "x")]
    ]
    args = replace(write(tmp_path, records), val_split_fraction=0)
    samples = load(args, ("x", "y"), length=8)
    assert (samples.counts.read, samples.counts.cut, samples.counts.empty) == (5, 1, 2)
    told = samples.describe()
    assert "not used of them: id" in told and "2 classes: x (2), y (1)." in told and "learned" not in told
    assert max(len(sample.tokens) for sample in samples.train) == 9
    dropped = load(replace(args, overlong="drop"), ("x", "y"), length=8)
    assert dropped.counts.dropped == 1 and len(dropped.train) == 2


def test_bad_records_can_be_skipped(tmp_path):
    args = write(tmp_path, [{"text": "a", "label": "x"}, {"text": "b"}, {"text": "c", "label": "y"}, {"x": 1}] * 2)
    args = replace(args, bad_records="skip")
    assert labels_of(args) == ("x", "y")
    assert load(args, ("x", "y")).counts.bad == 4


def test_data_that_is_no_classification(tmp_path):
    with pytest.raises(UsageError, match="every record has the label 'x'; a classifier needs two"):
        labels_of(write(tmp_path, [{"text": "a", "label": "x"}] * 9))
    with pytest.raises(UsageError, match=r"9 different labels in 9 records.*no classification data"):
        labels_of(write(tmp_path, [{"text": "a", "label": f"answer {i}"} for i in range(9)]))
    with pytest.raises(UsageError, match="leaves no text to classify"):
        labels_of(write(tmp_path, [{"text": "", "label": "x"}]))


def test_a_validation_label_that_nobody_trained_is_named(tmp_path):
    args = write(tmp_path, [{"text": "a", "label": c} for c in "xyxy"])
    val = write(tmp_path, [{"text": "a", "label": c} for c in ("x", "zz", "q")], "val.jsonl")
    with pytest.raises(UsageError) as error:
        load(replace(args, val_path=val.path), labels_of(args))
    assert "'q', 'zz', first at" in str(error.value) and "val.jsonl:3" in str(error.value)


def test_the_embedded_utterances():
    args = DataArgs(path=TRAIN_FILE)
    classes = labels_of(args)
    samples = load(args, classes, 512)
    assert len(classes) == 7 and len(samples.train) == 270 and len(samples.val) == 30
    counted = Counter(int(sample.labels[-1]) for sample in samples.train + samples.val)
    assert sum(counted.values()) == 300 and np.array(sorted(counted)).tolist() == list(range(7))


def test_seventy_seven_classes_of_a_csv():
    if not BANKING.is_file():
        pytest.skip(f"{BANKING} is not there")
    args = DataArgs(path=BANKING)
    classes = labels_of(args)
    assert len(classes) == 77
    told = load(args, classes).describe()
    assert "77 classes: " in told and ", …, " in told
