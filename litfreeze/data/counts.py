"""What became of the records of a file, folder or set, counted."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from litfreeze.data.records import Record
from litfreeze.errors import UsageError

SHOWN = 3  # bad records that are told with their places
SOME = 6  # names of what is left aside


@dataclass
class Counts:
    """What became of the records of one file or folder.

    Attributes:
        read: Records found, blank lines aside.
        bad: Not readable as the format, skipped.
        empty: Left out, a response or the text being blank.
        cut: Longer than `max_seq_length`, cut at the end.
        dropped: Longer than `max_seq_length`, left out.
        untargeted: Left out, nothing to learn being left (in a cut sample, say).
        unused_keys: Keys of records that their format does not look at, such as a label beside a text.
        samples: What remains. Plain text becomes windows, so that this is not the rest of a subtraction.
        lengths: How many records have so many tokens, before anything is cut.
        split: Of a set with splits, the one that was read.
        passed_over: Names of what lies in the folder and is not read.
        whole: Of a large file that memory holds as a whole while it is read, its name and size.
        problems: Of the first bad records, where they stand and what is wrong.
    """

    read: int = 0
    bad: int = 0
    empty: int = 0
    cut: int = 0
    dropped: int = 0
    untargeted: int = 0
    samples: int = 0
    unused_keys: set[str] = field(default_factory=set)
    lengths: Counter[int] = field(default_factory=Counter)
    split: Optional[str] = None
    passed_over: list[str] = field(default_factory=list)
    whole: str = ""
    problems: list[str] = field(default_factory=list)

    def describe(self) -> str:
        told = {
            "bad (skipped)": self.bad,
            "empty (left out)": self.empty,
            "over-long (cut)": self.cut,
            "over-long (dropped)": self.dropped,
            "with nothing to learn (left out)": self.untargeted,
        }
        odd = "".join(f", {count:,} {what}" for what, count in told.items() if count)
        unused, others = _some(sorted(self.unused_keys)), _some(self.passed_over)
        split = f" of the split {self.split}" if self.split else ""
        whole = f" ({self.whole} is read as a whole; a .jsonl or .parquet takes less memory)" if self.whole else ""
        unused = f" (not used of them: {unused})" if unused else ""
        others = f" (not read in the folder: {others})" if others else ""
        return f"{plural(self.read, 'record')}{split}{odd}{unused}{others}{whole}"

    def met(self, record: Record, error: UsageError) -> None:
        """Counts a bad record."""
        self.bad += 1
        if len(self.problems) < SHOWN:
            self.problems.append(printable(f"{record.source}: {error}"))

    def refuse_bad(self) -> None:
        """Raises UsageError about bad records, if there are any."""
        if self.bad:
            more = f" (and {self.bad - SHOWN:,} more)" if self.bad > SHOWN else ""
            raise UsageError(
                f"{plural(self.bad, 'bad record')}: {'; '.join(self.problems)}{more}.\n"
                "Mend them, or leave them out with --data.bad_records skip."
            )


def given(fields: Mapping[str, Any]) -> set[str]:
    """The keys that have a value: a table has a place for one in every row, and Alpaca's input is often blank."""
    return {name for name, value in fields.items() if value is not None and value != ""}


def printable(text: str) -> str:
    """Without characters that a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SOME} more" if len(names) > SOME else ""
    return printable(", ".join(names[:SOME])) + more


def plural(count: int, noun: str) -> str:
    """'1 record', '2,000 records'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
