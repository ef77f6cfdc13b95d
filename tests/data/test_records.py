"""Files to records, each with the file and line it stands on."""

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litfreeze.data.records import data_files, read_records
from litfreeze.errors import UsageError

KEYS = st.text(st.characters(codec="utf-8"), max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8"), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(KEYS, VALUES, max_size=4), max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


def read(path):
    records = list(read_records(path))
    assert all(record.source.startswith(f"{path}:") for record in records)
    return [record.fields for record in records], [int(record.source.rpartition(":")[2]) for record in records]


@given(
    objects=OBJECTS, blanks=st.booleans(), bom=st.booleans(), escape=st.booleans(), end=st.sampled_from(["\n", "\r\n"])
)
def test_jsonl(folder, objects, blanks, bom, escape, end):
    lines = [json.dumps(value, ensure_ascii=escape) for value in objects]
    text = (end * (2 if blanks else 1)).join(lines)
    path = folder / "a.jsonl"
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    fields, lines = read(path)
    assert fields == objects
    assert lines == [i * (2 if blanks else 1) + 1 for i in range(len(objects))]


@given(objects=OBJECTS, indent=st.sampled_from([None, 0, 2]), wrapped=st.booleans())
def test_json(folder, objects, indent, wrapped):
    whole = {"version": "1]", "nested": {"list": [1]}, "data": objects, "end": 3} if wrapped else objects
    path = folder / "a.json"
    text = json.dumps(whole, indent=indent, ensure_ascii=False)
    path.write_bytes(text.encode())
    fields, lines = read(path)
    assert fields == objects
    # Put a word on each named line's start: it must be the line where an object begins.
    split = text.split("\n")
    assert all("{" in split[line - 1] for line in lines)
    assert lines == sorted(lines)
    if indent is not None:
        assert len(set(lines)) == len(lines)


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@given(rows=st.lists(st.tuples(CELLS, CELLS), max_size=6), bom=st.booleans())
def test_csv_with_quotes_and_line_breaks(folder, rows, bom):
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(["prompt", "completion"])
    writer.writerows(rows)
    path = folder / "a.csv"
    path.write_bytes(text.getvalue().encode("utf-8-sig" if bom else "utf-8"))
    fields, _ = read(path)
    assert fields == [{"prompt": a, "completion": b} for a, b in rows]


def test_csv_line_numbers(folder):
    path = folder / "lines.csv"
    path.write_text('prompt, completion\na,b\n\n"two\nlines ""quoted""",c\nd\n' + f'e,"{"long " * 50_000}"\n')
    records = list(read_records(path))
    assert [record.source for record in records] == [f"{path}:{line}" for line in (2, 4, 6, 7)]
    assert records[1].fields == {"prompt": 'two\nlines "quoted"', "completion": "c"}
    assert records[2].problem == "has 1 fields where the header has 2"


def test_txt_is_one_document(folder):
    path = folder / "a.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8-sig")
    assert read(path) == ([{"text": "one\n\ntwo\n"}], [1])


def test_a_folder_is_its_data_files_in_order(tmp_path):
    for name in ("b.JSONL", "a.json", "LICENSE", ".hidden.jsonl", "c.md"):
        (tmp_path / name).write_text("[]" if name == "a.json" else '{"text": "x"}', encoding="utf-8")
    (tmp_path / "folder.json").mkdir()
    assert [file.name for file in data_files(tmp_path)] == ["a.json", "b.JSONL"]
    assert [record.source for record in read_records(tmp_path)] == [f"{tmp_path / 'b.JSONL'}:1"]


def test_lines_that_are_no_records_are_problems_of_their_own(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": \n[1]\n"x"\n{"text": "y"}\n' + "[" * 100_000, encoding="utf-8")
    records = list(read_records(path))
    assert [bool(record.problem) for record in records] == [False, True, True, True, False, True]
    assert records[1].source == f"{path}:2"
    assert "JSON" in records[1].problem and "column" in records[1].problem
    assert "list" in records[2].problem


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", b'[{"a": 1},\n{"a": }]', r"a\.json:2 .*JSON"),
        ("a.json", b'{"a": 1}\n{"a": 2}', r"a\.json:2 .*\.jsonl"),
        ("a.json", b'{"a": 1}', "list of objects"),
        ("a.json", b'{"a": [], "b": []}', "list of objects"),
        ("a.json", b'"a"', "list of objects"),
        ("a.json", b"", r"a\.json:1"),
        ("a.jsonl", '{"text": "x"}\n{"text": "é"}'.encode("latin-1"), r"a\.jsonl:2 .*UTF-8.*0xe9"),
        ("a.txt", "text".encode("utf-16"), "UTF-8"),
        ("a.txt", b"PK\x03\x04\n\0\0", r"a\.txt:2 .*zero byte"),
        ("a.csv", b'prompt,completion\nx,y\n"never closed,z\n', r"a\.csv:3 .*CSV"),
        ("a.orc", b"ORC", r"a\.orc is no known kind .*\.jsonl"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=told):
        list(read_records(tmp_path / name))


def test_a_missing_path_and_an_empty_folder_are_named(tmp_path):
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(UsageError, match=r"trian\.jsonl.*Did you mean 'train\.jsonl'"):
        data_files(tmp_path / "trian.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty holds no data file"):
        data_files(tmp_path / "empty")
