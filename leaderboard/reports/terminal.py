"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console

WIDTH = 160
"""Columns of a full table in a log or a pipe."""
SHORT = 80
"""Columns of the short table in a log or a pipe."""


def terminal(width: int = WIDTH) -> Console:
    """Returns the console for tables.

    Args:
        width: Columns in a log or a pipe, which have no width of their own.
    """
    console = Console()
    return console if console.is_terminal else Console(width=max(width, console.width))
