"""Has the C library keep memory that is freed, where it would return large blocks to the system."""

from __future__ import annotations

import ctypes
import sys

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
