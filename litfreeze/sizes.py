"""Bytes as a person writes and reads them. No heavy import here."""

import re
from fractions import Fraction
from typing import Union

from litfreeze.errors import UsageError

UNITS = {"b": 1}
UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", 1)}
UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgtp", 1)}


def parse_size(size: Union[str, int]) -> int:
    """Bytes: `"20GB"` is 20 * 10**9, `"1.5TiB"` is 1.5 * 2**40, a number alone counts bytes.

    Raises UsageError for anything else, negative numbers included."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([a-z]*)", str(size).strip().lower(), re.ASCII)
    if found is None or (found[2] or "b") not in UNITS:
        units = "kB, MB, GB or TB (powers of ten), KiB, MiB, GiB or TiB (powers of two)"
        raise UsageError(f"{size!r} is no size. Write a number and {units}, such as 20GB; or bytes, without a unit.")
    return int(Fraction(found[1]) * UNITS[found[2] or "b"])


def megabytes(count: int) -> str:
    """Bytes as a person reads them: MB up to a gigabyte, then GB (powers of ten)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
