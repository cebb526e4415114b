"""Processes that end with the one that started them, however that one ended."""

from __future__ import annotations

import os
import signal
import threading
import time

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
