"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console

WIDTH = 160
"""Columns that a table may take in a log or a pipe."""


def terminal() -> Console:
    """Returns the console for tables; a log or a pipe has no width of its own, and gets theirs."""
    console = Console()
    return console if console.is_terminal else Console(width=max(WIDTH, console.width))
