"""What is not learned of the data is told, and what could mean two things is refused."""

import json

import pytest

from litfreeze.__main__ import main
from litfreeze.data.formats import to_conversation, used_keys

SHOW = ["data", "show", "--n", "1", "--data.val_split_fraction", "0"]
PAIR = {"prompt": "play", "completion": "music"}


def lines(path, *records) -> str:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return str(path)


def test_a_folder_is_learned_without_its_validation_file_and_what_is_not_read_is_named(tmp_path, capsys):
    lines(tmp_path / "train.jsonl", *[PAIR] * 5)
    val = lines(tmp_path / "val.jsonl", *[PAIR] * 2)
    for name in ("LICENSE.txt", "more.jsonl.gz"):
        (tmp_path / name).write_text("All rights reserved.")
    assert main(["data", "show", "--data", str(tmp_path), "--data.val_path", val, "--n", "0"]) == 0
    out = capsys.readouterr().out
    told = "Read 5 records (not read in the folder: LICENSE.txt, more.jsonl.gz, val.jsonl); validation: 2 records."
    assert told in out and "5 samples for training" in out
    words = ["--data", str(tmp_path / "train.jsonl"), "--data.val_path", str(tmp_path), "--n", "0"]
    assert main(["data", "show", *words]) == 0
    assert "Read 5 records; validation: 2 records (not read in the folder: LICENSE.txt, " in capsys.readouterr().out


def test_keys_that_a_format_does_not_look_at_are_named(tmp_path, capsys):
    fields = {"question": "Who?", "input": "It was Kafka.", "answer": "Kafka"}
    lines(tmp_path / "a.jsonl", fields | {"output": None, "\033[2J": 1})
    lines(tmp_path / "b.jsonl", PAIR | dict.fromkeys("abcdefgh", 1))
    for name, told in (
        ("a", r"(not used of them: \x1b[2J, input)"),
        ("b", "(not used of them: a, b, c, d, e, f and 2 more)"),
    ):
        assert main([*SHOW, "--data", str(tmp_path / f"{name}.jsonl")]) == 0
        assert told in capsys.readouterr().out
    assert used_keys(fields | {"text": "t"}, "text") == {"text"}


def test_what_was_said_before_a_prompt_is_read():
    earlier = [["Where first?", "Paris"], ["Then?", "Rome"]]
    turns = to_conversation({"prompt": "And then?", "response": "Berlin", "history": earlier})
    assert [turn["content"] for turn in turns] == ["Where first?", "Paris", "Then?", "Rome", "And then?", "Berlin"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "prompt,completion,completion\nq,right,wrong\n", "two columns are called 'completion'"),
        ("a.jsonl", '{"prompt": "q", "completion": "b", "completion": "c"}\n', "two keys are called 'completion'"),
        ("a.json", '[{"prompt": "q", "prompt": "p", "completion": "c"}]', "two keys are called 'prompt'"),
        ("b.jsonl", '{"messages": [{"role": "user", "content": "q", "weight": 0.5}]}\n', "the weight 0.5"),
        (
            "c.jsonl",
            '{"messages": [{"role": "assistant", "content": "q", "tool_calls": [{"id": "1"}]}]}\n',
            "chatml cannot write 'tool_calls'",
        ),
    ],
)
def test_what_could_mean_two_things_is_refused(tmp_path, capsys, name, text, told):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert main([*SHOW, "--data", str(tmp_path / name), "--data.prompt_style", "chatml"]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("style", ["chatml", "chat_template"])
def test_an_answer_of_weight_0_is_read_and_not_learned(tmp_path, capsys, style):
    turns = [("user", "hi", None), ("assistant", "bad", 0), ("user", "again", None), ("assistant", "good", 1)]
    messages = [{"role": role, "content": text} | ({"weight": w} if w is not None else {}) for role, text, w in turns]
    path = lines(tmp_path / "a.jsonl", {"messages": messages})
    assert main([*SHOW, "--data", path, "--data.prompt_style", style]) == 0
    learned = "".join(part.partition("⟧")[0] for part in capsys.readouterr().out.split("⟦")[1:])
    assert "good" in learned and "bad" not in learned


def test_half_a_record_of_a_table_is_told(tmp_path, capsys):
    """As of JSON: it is not taken for a text, which stands beside it in the set of Alpaca."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    columns = {"instruction": ["a", "b"], "input": [None, ""], "output": ["c", None], "text": ["whole a", "whole b"]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert main([*SHOW, "--data", str(tmp_path / "a.parquet")]) == 2
    assert "a.parquet:2: 'output' should be text, not null" in capsys.readouterr().err
    names = ["c", "completion", "c"]
    parquet.write_table(pa.Table.from_arrays([pa.array(["x"])] * 3, names=names), tmp_path / "b.parquet")
    assert main([*SHOW, "--data", str(tmp_path / "b.parquet")]) == 2
    assert "two columns are called 'c'" in capsys.readouterr().err
