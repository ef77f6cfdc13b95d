"""A board of one's own. Without its extra, what has no page is tested all the same."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from served_board import Served

from litfreeze.__main__ import commands

KNOWN = "board" in commands()
if find_spec("litfreeze_board") is None:  # of an environment that was made before there was a board
    sys.path.insert(0, str(Path(__file__).parents[2] / "extensions" / "board"))


@pytest.fixture(scope="session")
def installed() -> None:
    """The command line knows the board."""
    if not KNOWN:
        pytest.skip("this environment's litfreeze was installed without the board: pip install '.[board]'")


@pytest.fixture(scope="module")
def served(installed, tmp_path_factory) -> Iterator[Callable[..., Served]]:
    """Starts a board over a root, with further words; all of them, and their runs, end with the module."""
    pytest.importorskip("nicegui", reason="the board's extra is not installed: pip install '.[board]'")
    started: list[Served] = []

    def serve(*words: str) -> Served:
        root = tmp_path_factory.mktemp("board") / "root"
        root.mkdir()
        started.append(Served(root, *words))
        return started[-1]

    yield serve
    from litfreeze_board.runs import all_runs

    for board in started:
        for run in all_runs(board.root):
            if run.alive:
                os.killpg(run.pid, signal.SIGKILL)
        board.kill()
