"""Files to records: every record knows its file and line, so that a bad one can be named.

A .jsonl, .csv or .parquet is read a piece at a time, so that it may be larger than memory; a .json or .txt whole."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from litfreeze.data import hf_datasets
from litfreeze.data.columns import check_names, parquet_rows
from litfreeze.data.hf_datasets import SUFFIXES
from litfreeze.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Record:
    """One record as it stands in its file.

    Attributes:
        fields: Its keys and values; empty where `problem` is set.
        source: `file:line` of its first line; of a table `file:row`, and of one of several splits `name[train]:row`.
            The first line or row is 1.
        problem: Why it cannot be read, or an empty string.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    problem: str = ""


def data_files(path: str | Path, subset: Optional[str] = None, without: Optional[Path] = None) -> list[Path]:
    """The data files that `path` stands for: itself, or those directly in the folder, sorted by name; the Arrow files
    of a set of Hugging Face's `datasets`, which is downloaded if need be. Of a folder, the file `without` is none of
    them, nor is a .txt beside files of records: it tells about them.

    Raises:
        UsageError: Nothing is there, or nothing with a known suffix.
    """
    path, known = Path(path), ", ".join(SUFFIXES)
    if hf_datasets.is_dataset(path):
        return hf_datasets.files_of(path, subset)
    if path.is_dir():
        out = None if without is None else Path(without).resolve()
        files = [f for f in _inside(path) if _is_data(f) and f.resolve() != out]
        if not files:
            raise UsageError(f"The folder {path} holds no data file; the known ones are {known}.")
        return [f for f in files if f.suffix.lower() != ".txt"] or files
    if not path.exists():
        near = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(f"There is no data at {path}.{did_you_mean(path.name, near)}")
    if not _is_data(path):
        raise UsageError(f"{path} is no known kind of data file; the known ones are {known}.")
    return [path]


def passed_over(path: str | Path, files: list[Path]) -> list[str]:
    """The names of what is in the folder `path` and none of its data files, `files`."""
    taken = {file.name for file in files}
    is_folder = Path(path).is_dir() and not hf_datasets.is_dataset(Path(path))
    return [f.name for f in _inside(Path(path)) if f.name not in taken] if is_folder else []


def _inside(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))


def read_records(
    path: str | Path, subset: Optional[str] = None, split: Optional[str] = None, without: Optional[Path] = None
) -> Iterator[Record]:
    """The records of a file or folder, in order, but of the file `without`. A line that is no record comes as one with
    a `problem`.

    Text is UTF-8, with or without a byte order mark. A .json holds a list of objects, alone or as the only list of
    one object; a .jsonl one object a line, blank lines aside; a .csv a header and rows; a .txt one document; a .parquet
    a table. A set of Hugging Face's `datasets`, in a folder or on the Hub, is read one `split` of one `subset`, as
    `hf_datasets.rows` says.

    Raises:
        UsageError: A file is missing, unreadable, not text, or broken in a way that hides the records after it.
        RunError: A set on the Hub could not be downloaded.
    """
    if hf_datasets.is_dataset(Path(path)):
        yield from (Record(fields, source) for fields, source in hf_datasets.rows(Path(path), subset, split))
        return
    for option, value in (("subset", subset), ("split", split)):
        if value is not None:
            raise UsageError(f"--data.{option} {value} is for Hugging Face datasets, and {path} is not one.")
    readers = {
        ".json": _read_json,
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".txt": _read_txt,
        ".parquet": _read_parquet,
    }
    for file in data_files(path, without=without):
        try:
            yield from readers[file.suffix.lower()](file)
        except UnicodeDecodeError:
            raise _no_text(file) from None
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from error


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _lines(path: Path, newline: str) -> Iterator[str]:
    """The lines of a text file with their ends. Of `newline` "\\n", at U+000A alone; of "", at U+000D too."""
    with path.open(encoding="utf-8-sig", newline=newline) as file:
        for line in file:
            if "\0" in line:
                raise _no_text(path)
            yield line


def _no_text(path: Path) -> UsageError:
    """What is wrong with a file that cannot be read as text, and in which line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                return UsageError(
                    f"{path}:{number} is not UTF-8 text (byte 0x{line[error.start]:02x}); convert it first."
                )
            if b"\0" in line:
                return UsageError(f"{path}:{number} holds a zero byte: this is not a text file.")
    return UsageError(f"{path} was written to while it was read.")


def _record(value: Any, source: str) -> Record:
    if isinstance(value, dict):
        return Record(value, source)
    return Record(source=source, problem=f"should be an object with keys, not a {type(value).__name__}")


def _read_txt(path: Path) -> Iterator[Record]:
    yield Record({"text": "".join(_lines(path, ""))}, f"{path}:1")


def _read_jsonl(path: Path) -> Iterator[Record]:
    # Not splitlines(): it also splits at U+2028, which may stand inside a JSON string.
    for number, line in enumerate(_lines(path, "\n"), start=1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            yield _record(_DECODER.decode(line), source)
        except (ValueError, RecursionError) as error:
            told = (
                f"{error.msg.removesuffix(' at')} at column {error.colno}"
                if isinstance(error, json.JSONDecodeError)
                else str(error)
            )
            yield Record(source=source, problem=f"is not valid JSON: {told}")


def _read_json(path: Path) -> Iterator[Record]:
    text = "".join(_lines(path, ""))
    try:
        whole = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            hint = " It looks like one object a line: name it .jsonl." if error.msg == "Extra data" else ""
            raise UsageError(f"{path}:{error.lineno} is not valid JSON: {error.msg}.{hint}") from None
        raise UsageError(f"{path} is not valid JSON: {error}.") from None
    start = _list_start(text, whole)
    if start is None:
        raise UsageError(f"{path} should hold a list of objects, or one object with exactly one list.")
    del whole
    line, counted = 1, 0
    for begin, value in _elements(text, start):
        line += text.count("\n", counted, begin)
        counted = begin
        yield _record(value, f"{path}:{line}")


def _list_start(text: str, whole: Any) -> int | None:
    """Where the list of records begins in a valid JSON text: the top, or the only list among an object's values."""
    at = _skip(text, 0)
    if isinstance(whole, list):
        return at
    if not isinstance(whole, dict):
        return None
    starts = []
    at = _skip(text, at + 1)
    while text[at] != "}":
        _, at = _DECODER.raw_decode(text, at)
        at = _skip(text, _skip(text, at) + 1)  # past the colon
        if text[at] == "[":
            starts.append(at)
        _, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at)
        at = _skip(text, at + 1) if text[at] == "," else at
    return starts[0] if len(starts) == 1 else None


def _elements(text: str, start: int) -> Iterator[tuple[int, Any]]:
    """The elements of the JSON list that begins at `start`, each with its position."""
    at = _skip(text, start + 1)
    while text[at] != "]":
        value, end = _DECODER.raw_decode(text, at)
        yield at, value
        at = _skip(text, end)
        at = _skip(text, at + 1) if text[at] == "," else at


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two keys with one name JSON's usual readers take the last, and nobody knows that there was another."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two keys are called {next(name for name in names if names.count(name) > 1)!r}")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(max(csv.field_size_limit(), path.stat().st_size))  # the default refuses long documents
    reader = csv.reader(_lines(path, ""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for row in reader:
            source, line = f"{path}:{line}", reader.line_num + 1
            if not row:
                continue
            if not header:
                header = [name.strip() for name in row]
                check_names(path, header)
            elif len(row) == len(header):
                yield Record(dict(zip(header, row, strict=True)), source)
            else:
                yield Record(source=source, problem=f"has {len(row)} fields where the header has {len(header)}")
    except csv.Error as error:
        raise UsageError(f"{path}:{line} is not valid CSV: {error}.") from None


def _read_parquet(path: Path) -> Iterator[Record]:
    for number, fields in enumerate(parquet_rows(path), start=1):
        yield Record(fields, f"{path}:{number}")
