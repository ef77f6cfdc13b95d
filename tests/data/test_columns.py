"""Parquet files hold what a .jsonl with the same records holds, and what is wrong with one is told."""

import datetime
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from litfreeze.data.args import DataArgs
from litfreeze.data.prompt import Prompt
from litfreeze.data.records import read_records
from litfreeze.data.samples import load_samples
from litfreeze.errors import UsageError

pa = pytest.importorskip("pyarrow", reason="pip install 'litfreeze[data]'")
parquet = pytest.importorskip("pyarrow.parquet")

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
turns = st.lists(st.fixed_dictionaries({"role": texts, "content": texts}, optional={"name": texts}), max_size=3)
rows = st.lists(
    st.fixed_dictionaries({"messages": turns}, optional={"system": texts, "score": st.integers(-5, 5)}), max_size=9
)


def write(path, records, **more):
    parquet.write_table(pa.Table.from_pylist(records), path, **more)
    return path


@given(records=rows, size=st.integers(1, 4))
def test_a_table_holds_the_records_of_json(tmp_path_factory, records, size):
    path = tmp_path_factory.getbasetemp() / "a.parquet"
    write(path, [{"messages": [], "system": "", "score": 0}, *records], row_group_size=size)
    found = list(read_records(path))[1:]
    assert [record.fields for record in found] == [json.loads(json.dumps(record)) for record in records]
    assert [record.source for record in found] == [f"{path}:{row}" for row in range(2, len(records) + 2)]


def test_the_samples_are_those_of_a_jsonl(make_tokenizer, tmp_path):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    records = [{"messages": chat}, {"prompt": "p", "completion": "c"}, {"text": "plain"}] * 3
    columns = dict.fromkeys(("messages", "prompt", "completion", "text"))
    write(tmp_path / "a.parquet", [columns | record for record in records])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = make_tokenizer()
    made = [
        load_samples(DataArgs(path=tmp_path / name), tokenizer, Prompt("plain", tokenizer), 16)
        for name in ("a.jsonl", "a.parquet")
    ]
    for a, b in zip(*[[*each.train, *each.val] for each in made], strict=True):
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.labels, b.labels)
        assert a.source.replace("jsonl", "parquet") == b.source


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (pa.array([datetime.datetime(2026, 1, 1)]), "'text' should be text, not datetime"),
        (pa.array([10**15], pa.timestamp("ms")), r"'text' should be text, not timestamp\[ms\]"),
        (pa.array([b"x"]), "'text' should be text, not bytes"),
        (pa.array([1.5]), "'text' should be text, not float"),
        (
            pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers()),
            "'text' should be text, not bytes that are no UTF-8",
        ),
    ],
    ids=str,
)
def test_what_is_no_text_is_named(make_tokenizer, tmp_path, column, told):
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    tokenizer = make_tokenizer()
    with pytest.raises(UsageError, match=rf"a\.parquet:1: {told}"):
        load_samples(DataArgs(path=tmp_path / "a.parquet"), tokenizer, Prompt("plain", tokenizer), 16)


def test_a_broken_file_is_told(tmp_path):
    path = write(tmp_path / "a.parquet", [{"text": "x" * 100 + str(i)} for i in range(5000)], compression="none")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"a\.parquet is a broken Parquet file"):
        list(read_records(path))
    path.write_bytes(b"text\nhello\n")
    with pytest.raises(UsageError, match=r"a\.parquet is no Parquet file"):
        list(read_records(path))


def test_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [{"text": "x"}])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'litfreeze\[data\]'"):
        list(read_records(path))
