"""Records to samples: what is learned, what is left out and counted, and what is kept for validation."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litfreeze.data.args import DataArgs
from litfreeze.data.prompt import Prompt
from litfreeze.data.samples import load_samples
from litfreeze.data.shelf import IGNORE
from litfreeze.errors import UsageError

PAIRS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(20)]


@pytest.fixture
def load(make_tokenizer, tmp_path):
    """load(records, max_seq_length=64, style="plain", bos=False, **options of DataArgs)."""

    def load(records, max_seq_length=64, style="plain", bos=False, **options):
        if not isinstance(records, str):
            (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        else:
            (tmp_path / "a.jsonl").write_text(records, encoding="utf-8")
        tokenizer = make_tokenizer(bos=bos)
        args = DataArgs(**{"path": tmp_path / "a.jsonl", "val_split_fraction": 0.0, **options})
        return load_samples(args, tokenizer, Prompt(style, tokenizer), max_seq_length)

    return load


def texts(tokenizer, sample):
    """The text of a sample, and of what is learned of it."""
    learned = sample.tokens[sample.labels != IGNORE]
    return tuple(tokenizer.decode(ids, skip_special_tokens=False) for ids in (sample.tokens, learned))


# What is learned


def test_responses_are_learned_and_nothing_else(load, make_tokenizer, tmp_path):
    samples = load(PAIRS[:2], 512, style="alpaca", bos=True)
    tokenizer = make_tokenizer(bos=True)
    for i, sample in enumerate(samples.train):
        text, learned = texts(tokenizer, sample)
        assert learned == f"a{i}</s>"
        assert text.startswith("<s>Below") and text.count("<s>") == 1 and text.count("</s>") == 1
        assert sample.tokens.dtype == sample.labels.dtype == np.int32
        assert sample.source == f"{tmp_path / 'a.jsonl'}:{i + 1}"
        assert tokenizer.decode(sample.prompt_tokens).endswith("### Response:\n")
        assert tokenizer.decode(sample.response_tokens, skip_special_tokens=False) == f"a{i}</s>"


def test_every_turn_is_learned(load, make_tokenizer):
    chat = [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2"},
        {"role": "user", "content": "left over"},
    ]
    (sample,) = load([{"messages": chat}]).train
    assert texts(make_tokenizer(), sample) == ("q1a1</s>q2a2</s>", "a1</s>a2</s>")
    assert make_tokenizer().decode(sample.response_tokens) == "a1"


def test_all_tokens_without_the_mask(load, make_tokenizer):
    (sample,) = load(PAIRS[:1], mask_prompt=False).train
    assert (sample.labels == sample.tokens).all()
    assert make_tokenizer().decode(sample.prompt_tokens) == "q0"


@settings(deadline=None)
@given(
    documents=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), min_size=1, max_size=6),
    length=st.integers(2, 20),
    bos=st.booleans(),
)
def test_windows_of_plain_text_learn_every_token_once(make_tokenizer, tmp_path_factory, documents, length, bos):
    tokenizer = make_tokenizer(bos=bos)
    path = tmp_path_factory.getbasetemp() / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents), encoding="utf-8")
    kept = [text for text in documents if text.strip()]
    args = DataArgs(path=path, val_split_fraction=0.0)
    if not kept:
        with pytest.raises(UsageError, match="nothing to learn"):
            load_samples(args, tokenizer, Prompt("plain", tokenizer), length)
        return
    samples = load_samples(args, tokenizer, Prompt("plain", tokenizer), length)
    stream = [i for text in kept for i in [*([0] if bos else []), *tokenizer.encode(text), tokenizer.eos_id]]
    assert samples.counts.empty == len(documents) - len(kept)
    assert [i for sample in samples.train for i in sample.tokens[1:]] == stream[1:]
    assert all((sample.tokens == sample.labels).all() for sample in samples.train)
    assert all(len(sample.tokens) == length + 1 for sample in samples.train[:-1])
    assert 2 <= len(samples.train[-1].tokens) <= length + 1


def test_windows_name_the_document_they_begin_in(load, tmp_path):
    samples = load([{"text": "x" * 30}, {"text": "y" * 30}], max_seq_length=31)
    assert [sample.source for sample in samples.train] == [f"{tmp_path / 'a.jsonl'}:{line}" for line in (1, 2)]


# What is left out


def test_blank_responses_are_left_out_and_counted(load):
    records = [
        {"prompt": "q", "completion": " \n"},
        {"text": ""},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]},
        PAIRS[0],
    ]
    samples = load(records)
    assert (samples.counts.read, samples.counts.empty, len(samples.train)) == (4, 3, 1)
    assert "3 empty" in samples.describe()


def test_long_records_are_cut_or_dropped(load):
    records = [{"prompt": "q", "completion": "x" * 50}, PAIRS[0]]
    cut = load(records, max_seq_length=10)
    assert (cut.counts.cut, cut.counts.dropped) == (1, 0)
    assert [len(sample.tokens) for sample in cut.train] == [10, len(cut.train[1].tokens)]
    dropped = load(records, max_seq_length=10, overlong="drop")
    assert (dropped.counts.cut, dropped.counts.dropped, len(dropped.train)) == (0, 1, 1)
    assert "1 over-long (cut)" in cut.describe() and "1 over-long (dropped)" in dropped.describe()


def test_records_cut_to_their_prompt_are_left_out(load):
    samples = load([{"prompt": "q" * 50, "completion": "a"}, PAIRS[0]], max_seq_length=10)
    assert (samples.counts.untargeted, len(samples.train)) == (1, 1)


def test_the_first_token_is_no_target(load):
    """A response of which only the first token of the sample is left could only make a loss of NaN."""
    chat = {"messages": [{"role": "assistant", "content": "a"}]}
    (sample,) = load([chat], max_seq_length=2).train
    assert sample.labels[1] != IGNORE


def test_bad_records_stop_with_their_places(load, tmp_path):
    lines = ['{"prompt": "q", "completion": "a"}', '{"prompt": "q"}', "{", '{"text": 3}', '{"messages": []}', ""]
    with pytest.raises(UsageError) as error:
        load("\n".join(lines))
    told = str(error.value)
    path = tmp_path / "a.jsonl"
    assert told.startswith("4 bad records: ")
    assert all(f"{path}:{line}: " in told for line in (2, 3, 4)) and f"{path}:5" not in told
    assert "1 more" in told and "--data.bad_records skip" in told and len(told.splitlines()) == 2
    skipped = load("\n".join(lines), bad_records="skip")
    assert (skipped.counts.read, skipped.counts.bad, len(skipped.train)) == (5, 4, 1)


def test_a_record_the_template_refuses_is_a_bad_record(make_tokenizer, tmp_path):
    template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}{% endif %}"
        "{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "yes", "completion": "a"}\n{"prompt": "no", "completion": "a"}\n', encoding="utf-8"
    )
    tokenizer = make_tokenizer(template)
    args = DataArgs(path=tmp_path / "a.jsonl", val_split_fraction=0.0)
    with pytest.raises(UsageError, match=r"a\.jsonl:2: .*not this"):
        load_samples(args, tokenizer, Prompt.choose(None, None, tokenizer), 64)
    args.bad_records = "skip"
    assert load_samples(args, tokenizer, Prompt.choose(None, None, tokenizer), 64).counts.bad == 1


@pytest.mark.parametrize("records", [[], [{"prompt": "q", "completion": ""}]])
def test_nothing_left_is_told(load, records):
    with pytest.raises(UsageError, match=r"a\.jsonl leaves nothing to learn"):
        load(records)


# The split


@settings(deadline=None)
@given(n=st.integers(2, 20), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 9))
def test_the_split_is_seeded_and_whole(make_tokenizer, tmp_path_factory, n, fraction, seed):
    tokenizer = make_tokenizer()
    path = tmp_path_factory.getbasetemp() / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(pair) for pair in PAIRS[:n]), encoding="utf-8")
    args = DataArgs(path=path, val_split_fraction=fraction, seed=seed)
    samples = load_samples(args, tokenizer, Prompt("plain", tokenizer), 64)
    lines = [[int(s.source.rpartition(":")[2]) for s in part] for part in (samples.train, samples.val)]
    assert sorted(lines[0] + lines[1]) == list(range(1, n + 1))
    assert all(part == sorted(part) for part in lines)
    assert len(samples.val) == min(max(round(n * fraction), 1), n - 1)
    order = list(range(n))
    random.Random(seed).shuffle(order)
    assert {line - 1 for line in lines[1]} == set(order[: len(samples.val)])


def test_validation_from_a_file_of_its_own(load, tmp_path):
    (tmp_path / "val.jsonl").write_text('{"prompt": "q", "completion": "a"}\n{"text": ""}\n', encoding="utf-8")
    samples = load(PAIRS, val_path=tmp_path / "val.jsonl", val_split_fraction=None)
    assert (len(samples.train), len(samples.val)) == (20, 1)
    assert (samples.val_counts.read, samples.val_counts.empty) == (2, 1)
    assert "validation: 2 records, 1 empty" in samples.describe()


def test_a_large_file_that_is_read_as_a_whole_is_told(make_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("litfreeze.data.samples.LARGE", 100)
    tokenizer = make_tokenizer()
    for name, text in (("a.json", json.dumps(PAIRS)), ("a.jsonl", "\n".join(map(json.dumps, PAIRS)))):
        (tmp_path / name).write_text(text)
        told = load_samples(DataArgs(path=tmp_path / name), tokenizer, Prompt("plain", tokenizer), 64).describe()
        assert ("a.json, 0.0 MB, is read as a whole" in told) == (name == "a.json")


def test_a_fraction_of_zero_keeps_everything_for_training(load):
    samples = load(PAIRS)
    assert (len(samples.train), samples.val) == (20, [])
    assert "20 samples for training" in samples.describe()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"val_split_fraction": 1.0}, r"val_split_fraction is 1\.0"),
        ({"val_split_fraction": -0.1}, "val_split_fraction"),
        ({"val_split_fraction": float("nan")}, "val_split_fraction"),
        ({"max_seq_length": 1}, "max_seq_length is 1"),
        ({"path": None}, "--data"),
    ],
)
def test_options_that_cannot_be_are_told(load, options, told):
    with pytest.raises(UsageError, match=told):
        load(PAIRS, **options)


def test_a_single_record_cannot_be_split(load):
    with pytest.raises(UsageError, match=r"single sample.*--data\.val_path.*fraction 0"):
        load(PAIRS[:1], val_split_fraction=0.1)
