"""Freed memory goes back to the system, where glibc's malloc would keep it for reuse (mallopt(3), malloc_trim(3)).

What stays, made between temporaries that go, cuts up what malloc keeps, and a process grows by more than is saved.
Other C libraries have no such words, and nothing is done there."""

import ctypes
import sys
from functools import cache

M_MMAP_THRESHOLD = -3  # in glibc's malloc.h


@cache
def return_freed_blocks() -> None:
    """From here on blocks of 1 MiB and more go back when they are freed, at some cost to each."""
    if mallopt := _glibc("mallopt"):
        mallopt(M_MMAP_THRESHOLD, 1024**2)


def trim() -> None:
    """What is free now goes back."""
    if malloc_trim := _glibc("malloc_trim"):
        malloc_trim(0)


def _glibc(name: str):
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
