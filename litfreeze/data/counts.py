"""What became of the records of a file, folder or set, counted."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Optional

from litfreeze.data.records import Record
from litfreeze.errors import UsageError

SHOWN = 3  # bad records that are told with their places


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
        unused_keys: Keys of records that no format looks at, such as a label beside a text.
        samples: What remains. Plain text becomes windows, so that this is not the rest of a subtraction.
        lengths: How many records have so many tokens, before anything is cut.
        split: Of a set with splits, the one that was read.
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
        unused = ", ".join(sorted(self.unused_keys)[:6])
        split = f" of the split {self.split}" if self.split else ""
        whole = f" ({self.whole} is read as a whole; a .jsonl or .parquet takes less memory)" if self.whole else ""
        return f"{plural(self.read, 'record')}{split}{odd}{f' (not used of them: {unused})' if unused else ''}{whole}"

    def met(self, record: Record, error: UsageError) -> None:
        """Counts a bad record."""
        self.bad += 1
        if len(self.problems) < SHOWN:
            self.problems.append(f"{record.source}: {error}")

    def refuse_bad(self) -> None:
        """Raises UsageError about bad records, if there are any."""
        if self.bad:
            more = f" (and {self.bad - SHOWN:,} more)" if self.bad > SHOWN else ""
            raise UsageError(
                f"{plural(self.bad, 'bad record')}: {'; '.join(self.problems)}{more}.\n"
                "Mend them, or leave them out with --data.bad_records skip."
            )


def plural(count: int, noun: str) -> str:
    """'1 record', '2,000 records'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
