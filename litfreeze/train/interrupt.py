"""Being asked to stop: Ctrl-C, and the SIGTERM with which a cluster takes a machine back."""

import signal
import sys
import threading
from types import FrameType
from typing import Optional

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While it is entered, a signal is kept in `number` for the loop to see at the end of a step; a second one is a
    KeyboardInterrupt at once. Only the main thread can do this; in another nothing changes."""

    def __init__(self, speaks: bool) -> None:
        self.speaks = speaks  # one process of a run does
        self.number = 0  # of the signal that came, 0 before
        self.before = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _take(self, number: int, _: Optional[FrameType]) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        if self.speaks:  # not by print: the signal may have come in the middle of one
            sys.stderr.write("\nStopping after this step, and saving. Once more (Ctrl-C) to leave at once.\n")
