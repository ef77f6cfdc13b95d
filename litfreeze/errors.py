"""What goes wrong, told in one or two lines.

Functions raise these; only `litfreeze/__main__.py` turns them into an exit code, so a notebook gets an exception."""

import difflib
import signal
from collections.abc import Iterable


class LitfreezeError(Exception):
    """Base of the errors whose text is meant for the person at the keyboard."""

    exit_code = 1
    told = False  # by another process of the same run


class UsageError(LitfreezeError, ValueError):
    """The input was wrong: what was wrong, what is allowed, what to do next. Exit code 2."""

    exit_code = 2


class RunError(LitfreezeError, RuntimeError):
    """The input was fine and the run failed all the same. Exit code 1."""


class Interrupted(LitfreezeError):
    """A run was asked to stop by a signal, and has saved where it stands. Exit code 128 + the signal's number, as a
    shell tells it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """`" Did you mean 'mlp'?"` if something in `allowed` is close to `word`, else an empty string."""
    close = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
