"""A command line that is watched: what it may do with a wrong input."""

import contextlib
import faulthandler
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from random import Random

from litfreeze.__main__ import main

REAL = os.dup(2)  # where what ends native code tells it
SECONDS = 30  # that one command line may take
MEMORY = 8 * 2**30  # and the address space it may add: what wants more is told, and the machine is not brought down


class Hang(BaseException):
    """A command line took too long. No `except Exception` of ours holds it up."""


def attempt(argv: list[str], told: str) -> int:
    """Runs a command line in the working directory and returns its exit code. `told` names the case.

    Fails unless it ends in time and, where its exit code says that it was refused, with an error of one or two lines
    and no file more in the working directory."""
    before = sorted(Path.cwd().rglob("*"))
    sys.stdout.flush()
    with tempfile.TemporaryFile() as written, limits(told):
        real = os.dup(2)
        os.dup2(written.fileno(), 2)  # a library in Rust or C++ writes past sys.stderr
        try:
            err = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
            out = io.TextIOWrapper(io.BytesIO(), "utf-8")
            with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
                code = main(argv)
        finally:
            os.dup2(real, 2)
            os.close(real)
        written.seek(0)
        error = written.read().decode()
    case = f"{told}\n{' '.join(argv)}\nexit code {code}\n{error[:3000]}"
    assert code in (0, 1, 2), case
    assert "Traceback" not in error and "run again with --debug" not in error and "panicked" not in error, case
    if code:
        assert error.startswith("error: ") and len(error.splitlines()) <= 2, case
        assert all(len(line) < 2000 for line in error.splitlines()), case
        assert code == 2 or "damaged" in error, case
        assert sorted(Path.cwd().rglob("*")) == before, case
    return code


@contextlib.contextmanager
def limits(told: str):
    """While it is entered, a command that takes too long or too much memory fails."""

    def too_long(*_):
        raise Hang(f"more than {SECONDS} s: {told}")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    used = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 2**40  # not Linux
    earlier = signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True, file=REAL)  # nothing else ends native code
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def linked(source: Path, place: Path) -> Path:
    """`source` again at `place`, its larger files as links."""

    def copy(one: str, other: str) -> None:
        if Path(one).stat().st_size > 100_000:
            Path(other).symlink_to(one)
        else:
            shutil.copyfile(one, other)

    return Path(shutil.copytree(source, place, copy_function=copy))


def draw(*words: object) -> Random:
    """The same numbers in every run."""
    return Random(" ".join(map(str, words)))
