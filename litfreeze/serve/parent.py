"""A process that ends with the one that started it."""

import multiprocessing
import os
import threading


def leave_with_parent() -> None:
    """Has this process end when the one that started it is lost, and can no longer end it."""

    def leave() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
