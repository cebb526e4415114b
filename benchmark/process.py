"""The process itself: memory that the C library keeps, and an end with the parent process."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`: free memory above which some is returned; blocks taken from the system singly."""


def keep_freed_memory() -> None:
    """Lets tensors of many MiB use the memory of earlier ones; does nothing where the C library is not glibc.

    By default, glibc takes every block above 32 MiB from the system and returns it when it is freed. The system clears
    the pages of each as they are first touched, which takes longer than a spiking layer computes on them. The price is
    that a process stays as large as it ever was.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


PARENT = "SPIKING_DIFFUSION_PARENT"
"""Environment variable: the process that `python -m benchmark` ends with."""
INTERVAL = 0.5
"""Seconds between looks for the parent."""


def end_with(parent: int) -> None:
    """Has this process get a SIGTERM once its parent is gone, be it by SIGKILL, which no parent can hand on.

    A process that lost its parent gets another one, on every POSIX system; Linux alone would tell it by a signal.

    Args:
        parent: The process that started this one.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(INTERVAL)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
