"""A Ctrl-C in the middle of a step."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from litfreeze.train.loop import Loop


@contextmanager
def ctrl_c_in_step(at: int) -> Iterator[None]:
    """The `at`-th step (from 1) that is taken meanwhile does not come to its end, nor does anything after it."""
    plain, taken = Loop._step, []

    def step(*given):
        taken.append(1)
        if len(taken) == at:
            raise KeyboardInterrupt
        return plain(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_step", step)
        yield
