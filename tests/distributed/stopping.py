"""`python stopping.py …` is `litfreeze …`, of which one process gets a signal in the middle of a step. The environment
says which signal (STOP_SIGNAL), in which step (STOP_STEP, from 1) and in which process (STOP_RANK)."""

import os
import signal
import sys

from litfreeze.__main__ import main
from litfreeze.train.loop import Loop


def stopped(step):
    taken = 0

    def wrapped(*given):
        nonlocal taken
        taken += 1
        if taken == int(os.environ["STOP_STEP"]) and os.environ.get("LOCAL_RANK", "0") == os.environ["STOP_RANK"]:
            os.kill(os.getpid(), getattr(signal, os.environ["STOP_SIGNAL"]))
        return step(*given)

    return wrapped


if __name__ == "__main__":
    Loop._step = stopped(Loop._step)
    sys.exit(main())
