"""Writing beside the training: a snapshot is taken, and goes to disk while the next steps are made."""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

from litfreeze.errors import RunError

LEAVING = 2.0  # seconds that one who leaves at once waits for a save that is under way
ROOM = 2  # times a snapshot's size must be free in memory to take one


class Background:
    """Does one piece of writing at a time in a thread that does not hold up the end of the process: what is written
    aside and renamed is whole whenever that ends."""

    def __init__(self) -> None:
        self.thread: Optional[threading.Thread] = None
        self.name = ""
        self.trouble: Optional[BaseException] = None

    def start(self, name: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls `function`, once what was begun before is done; that is to be settled first."""
        assert self.thread is None

        def work() -> None:
            try:
                function(*arguments)
            except BaseException as error:
                self.trouble = error

        self.name, self.trouble = name, None
        self.thread = threading.Thread(target=work, name="litfreeze-save", daemon=True)
        self.thread.start()

    def settle(self, patience: Optional[float] = None) -> Optional[tuple[str, BaseException]]:
        """Waits for what was begun, with `patience` for so many seconds. What it was called and why it failed, if the
        disk or its lack of room was why."""
        if self.thread is None:
            return None
        self.thread.join(patience)
        if self.thread.is_alive():
            return None
        self.thread = None
        if self.trouble is not None and not isinstance(self.trouble, (RunError, OSError)):
            raise self.trouble
        return None if self.trouble is None else (self.name, self.trouble)


def has_room_for(size: int) -> bool:
    """Whether the machine has memory for a snapshot of `size` bytes beside what runs; unknown counts as yes."""
    with suppress(OSError, ValueError, IndexError):
        told = Path("/proc/meminfo").read_text(encoding="utf-8")
        return int(told.partition("MemAvailable:")[2].split()[0]) * 1024 > ROOM * size
    return True
