"""Settings of the process: reuse of freed memory, and termination with the parent process."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`: size of free memory above which some is returned; number of mmap blocks."""


def keep_freed_memory() -> None:
    """Lets large tensors reuse the memory of freed ones (glibc only; does nothing elsewhere).

    By default, glibc maps every block above 32 MiB with mmap and unmaps it when it is freed. The kernel zeroes each
    page at its first use, which takes longer than a spiking layer computes on it. The cost: the process never shrinks.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


PARENT_VARIABLE = "SPIKING_DIFFUSION_PARENT"
"""Environment variable with the id of the process that `python -m benchmark` is terminated with."""
POLL_INTERVAL = 0.5
"""Seconds between two checks of the parent."""


def terminate_with_parent(parent: int) -> None:
    """Sends SIGTERM to this process when its parent dies, even if the parent was killed by SIGKILL.

    An orphan gets a new parent on every POSIX system, which is polled; only Linux could send a signal instead.

    Args:
        parent: Id of the process that started this one.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_INTERVAL)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
