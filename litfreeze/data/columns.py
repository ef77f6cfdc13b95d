"""Tables of Arrow to the fields of records: .parquet files, and what Hugging Face's `datasets` keeps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from litfreeze.data.formats import lacking
from litfreeze.errors import UsageError

if TYPE_CHECKING:
    import pyarrow

MISSING = "{} needs {}. Install it: pip install 'litfreeze[data]'."
AT_ONCE = 1000  # rows that are Python objects together


@dataclass(frozen=True)
class Unreadable:
    """A value that a table holds and Python has no object for."""

    what: str


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, as `fields_of` gives them, a batch in memory at a time.

    Raises UsageError if pyarrow is not installed, and if the file is broken or none of its kind."""
    pa = _pyarrow(path)
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
            check_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(AT_ONCE):
                yield from fields_of(batch)
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise
        reason = " ".join(str(error).split())[:160].rstrip(".")
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        raise UsageError(f"{path} is {'a broken' if is_parquet else 'no'} Parquet file: {reason}.") from None


def check_names(path: Path, names: Sequence[str]) -> None:
    """Raises UsageError if two columns of a table have one name."""
    if double := next((name for name in names if list(names).count(name) > 1), None):
        raise UsageError(f"{path}: two columns are called {double!r}. Rename or remove one.")


def fields_of(
    batch: "pyarrow.RecordBatch", change: Mapping[str, Callable[[Any], Any]] = {}
) -> Iterator[dict[str, Any]]:
    """The rows of a table, each as a record would be read from JSON: lists and dicts, and no nulls in dicts, since a
    column has a place for a value in rows that have none. But a null stays where a record would be half of one without
    (`formats.lacking`), so that it is told and not taken for another. `change` is done to the values of some columns.
    What JSON has no word for, such as a time, stays what it is, for whoever needs text there to name it."""
    names = batch.schema.names
    columns = [_values(column) for column in batch.columns]
    for row in zip(*columns, strict=True):
        given = {name: _without_nulls(value) for name, value in zip(names, row, strict=True) if value is not None}
        absent = dict.fromkeys(lacking(given, names)) if len(given) < len(names) else {}
        yield {name: change[name](value) if name in change else value for name, value in given.items()} | absent


def _values(column: "pyarrow.Array") -> list[Any]:
    """The values of a column; where one cannot be made, an `Unreadable` is in its place."""
    try:
        return column.to_pylist()
    except (
        ValueError,
        OverflowError,
        LookupError,
    ):  # nanoseconds, unknown zones, the year 20000, text that is no UTF-8
        return [_value(one) for one in column]


def _value(one: "pyarrow.Scalar") -> Any:
    try:
        return one.as_py()
    except UnicodeDecodeError:
        return Unreadable("bytes that are no UTF-8")
    except (ValueError, OverflowError, LookupError):
        return Unreadable(str(one.type))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _pyarrow(path: Path) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(MISSING.format(path, "pyarrow")) from None
    return pyarrow
