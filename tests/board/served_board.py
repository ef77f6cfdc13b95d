"""A board in a process of its own, and waiting for what it does."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path


class Served:
    """A board of its own over `root`, in a process group of its own."""

    def __init__(self, root: Path, *words: str) -> None:
        self.root, self.words = root, words
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Returns once it answers."""
        log = self.root.parent / "board.log"
        with log.open("ab") as out:
            command = [sys.executable, "-m", "litfreeze", "board", "--port", str(self.port), "--root", str(self.root)]
            environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
            environment["OMP_NUM_THREADS"] = "1"  # and NiceGUI takes a test's process for a test of its own
            self.process = subprocess.Popen(
                [*command, *self.words], stdout=out, stderr=out, env=environment, start_new_session=True
            )
        wait_for(lambda: self.process.poll() is not None or self._answers(), 60)
        assert self.process.poll() is None, log.read_text(encoding="utf-8")

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.url, timeout=5).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        self.process.wait(30)


def wait_for(condition: Callable[[], object], seconds: float = 120) -> object:
    """What `condition` says, once it says something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)
    return found
