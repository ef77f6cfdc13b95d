"""What goes wrong, told in one or two lines.

Functions raise these; only `litfreeze/__main__.py` turns them into an exit code, so a notebook gets an exception."""

import difflib
from collections.abc import Iterable


class LitfreezeError(Exception):
    """Base of the errors whose text is meant for the person at the keyboard."""

    exit_code = 1


class UsageError(LitfreezeError, ValueError):
    """The input was wrong: what was wrong, what is allowed, what to do next. Exit code 2."""

    exit_code = 2


class RunError(LitfreezeError, RuntimeError):
    """The input was fine and the run failed all the same. Exit code 1."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """`" Did you mean 'mlp'?"` if something in `allowed` is close to `word`, else an empty string."""
    close = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
