"""Console that tables are printed to."""

from __future__ import annotations

from rich.console import Console

WIDTH = 160
"""Width of full tables in a log or pipe, in characters."""
SHORT = 80
"""Width of the short table in a log or pipe, in characters."""


def terminal(width: int = WIDTH) -> Console:
    """Returns the console for tables.

    Args:
        width: Minimum width in a log or pipe, which have no width of their own, in characters.
    """
    console = Console()
    return console if console.is_terminal else Console(width=max(width, console.width))
