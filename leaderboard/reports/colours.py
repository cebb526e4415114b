"""Colours of methods, the same in every figure."""

from __future__ import annotations

COLOURS = ("ddpm", "sddpm", "sdm", "fsddim", "spiking-rwkv", "spiking-diffusion", "ann-snn", "sdit")
"""Methods in the order of matplotlib's colours."""


def colour(method: str) -> tuple[str, bool]:
    """Returns the colour of a method, and whether it is a ReLU twin, which has its network's colour and open marks.

    Args:
        method: Name in records, such as `sddpm` or `sddpm-relu-twin`.
    """
    base, twin, _ = method.partition("-relu-twin")
    return f"C{COLOURS.index(base) if base in COLOURS else len(COLOURS)}", bool(twin)
