"""litfreeze data show: what is printed is what the model reads, what is marked is what is learned."""

import gc
import json
import re

import pytest

from litfreeze.__main__ import main
from litfreeze.data.args import DataArgs
from litfreeze.data.prompt import Prompt
from litfreeze.data.samples import load_samples
from litfreeze.demo import MODEL_DIR, TRAIN_FILE
from litfreeze.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_dir(MODEL_DIR)


@pytest.fixture
def show(capsys, tmp_path, monkeypatch):
    """Runs `litfreeze data show` over some records: its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def show(records, *words) -> tuple[int, str, str]:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        capsys.readouterr()
        return main(["data", "show", "--data", "a.jsonl", *map(str, words)]), *capsys.readouterr()

    return show


def pairs(*lengths: int) -> list[dict]:
    return [{"prompt": f"q{i}", "completion": "word " * length} for i, length in enumerate(lengths)]


def test_marked_is_what_is_learned(capsys):
    assert main(["data", "show", "--n", "5"]) == 0
    out = capsys.readouterr().out
    args = DataArgs(path=TRAIN_FILE, val_split_fraction=0.0)
    samples = load_samples(args, TOKENIZER, Prompt.choose(None, None, TOKENIZER), 512).train
    for sample in samples[:5]:
        prompt, response = (TOKENIZER.decode(i, False) for i in (sample.prompt_tokens, sample.response_tokens))
        assert f"{sample.source}   {len(sample.tokens)} tokens, {len(sample.response_tokens)} learned" in out
        assert f"\n{prompt}⟦{response}⟧\n" in out
    assert "Read 300 records; validation: 696 records." in out and "Prompt style: chat_template." in out
    counts = [int(count) for count in re.findall(r"^ *\d+ - +\d+ +(\d+) ", out, re.M)]
    assert sum(counts) == 300
    assert f"longest {max(len(sample.tokens) for sample in samples)} tokens" in out


def test_colours_are_for_a_terminal(show, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    _, out, _ = show(pairs(2, 2), "--n", 1)
    assert "\033[32mword" in out and "\033[1;32m<|end|>\033[0m" in out and "\033[2m<|user|>" in out and "⟦" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    _, out, _ = show(pairs(2, 2), "--n", 1)
    assert "\033" not in out and "⟦word" in out


@pytest.mark.painted
def test_long_records_are_counted_and_shown_short_or_whole(show, tmp_path):
    records = pairs(*[5] * 17, 60, 700, 900)
    code, out, _ = show(records, "--n", 20, "--data.max_seq_length", 500, "--png", "lengths.png")
    assert code == 0 and "2 of 20 (10.0 %) are longer than 500 tokens, and cut at their end." in out
    assert "▒" in out and "characters …" in out and "2 over-long (cut)" in out
    assert (tmp_path / "lengths.png").read_bytes()[:4] == b"\x89PNG"
    _, whole, _ = show(records, "--index", 19, 3, "--data.max_seq_length", 500, "--data.overlong", "cut")
    shown = whole.partition("Data  ")[0]
    assert shown.count("──  ") == 0 and shown.count("a.jsonl:") == 2 and "characters …" not in shown
    assert shown.count("word") > 400
    _, dropped, _ = show(records, "--data.max_seq_length", 500, "--data.overlong", "drop")
    assert "and dropped." in dropped


def test_beginnings_that_records_share(show):
    system = {"role": "system", "content": "be brief, be kind, be right, and say it once and once only"}
    chats = [[system, {"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes"}] for i in range(12)]
    _, out, _ = show([{"messages": chat} for chat in chats])
    assert 20 < float(re.search(r"begin alike spare ([0-9.]+) % of the tokens", out)[1]) < 75
    assert "No records of a micro-batch begin alike" in show(pairs(1, 1, 1))[1]


def test_classes_and_plain_text(show):
    records = [{"text": f"say {i}", "label": "ab"[i % 2]} for i in range(8)]
    code, out, _ = show(records, "--task", "classification", "--n", 1)
    assert code == 0 and re.search(r"a\.jsonl:\d   \d+ tokens", out) and re.search("\nsay \\d\n→ ⟦[ab]⟧\n", out)
    assert "2 classes: a (" in out
    code, out, _ = show([{"text": "to be or not to be " * 99}] * 2, "--n", 1)
    assert code == 0 and "all learned" in out and "Cut into windows of 512 tokens" in out


def test_a_record_cannot_write_to_the_terminal(show):
    _, out, _ = show([{"prompt": "a\x1b[31mb\x07", "completion": "c"}] * 2)
    assert r"a\x1b[31mb\x07" in out and "\x1b" not in out


def test_nothing_stays_of_what_was_kept_on_disk(show, tmp_path):
    for records, code in ((pairs(1, 1), 0), ([*pairs(1, 1), {"prompt": "no completion"}], 2)):
        assert show(records, "--data.keep", "disk", "--data.keep_dir", "kept")[0] == code
        gc.collect()
        assert not list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--n", "-1"], "--n -1 must be at least 0"),
        (["--index", "99"], "--index 99: no sample begins there"),
        (["--png", "nowhere/a.png"], "--png nowhere/a.png must name a .png file, in a folder that is there"),
        (["--data.split", "train"], "--data.split train is for Hugging Face datasets, and a.jsonl is not one"),
        (["--data.max_seq_length", "9999"], "--data.max_seq_length 9999 is more than the 512 positions"),
    ],
)
def test_what_is_wrong_is_told(show, words, told):
    code, _, err = show(pairs(1, 1), *words)
    assert code == 2 and told in err
