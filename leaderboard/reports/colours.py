"""Colours of methods, the same in every figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

COLOURS = ("ddpm", "sddpm", "sdm", "fsddim", "spiking-rwkv", "spiking-diffusion", "ann-snn", "sdit")
"""Methods in the order of matplotlib's colours."""

MARKERS = "osD^vPX*"
"""Markers of the first, second, ... row of a method."""


def marks(methods: Iterable[str]) -> list[dict[str, Any]]:
    """Returns the marks of the rows of a figure: the colour of the method, and another shape for each row of a colour.

    Args:
        methods: Names in records, in the order of the rows.

    Returns:
        Options of matplotlib's `plot` and `errorbar`.
    """
    shown: Counter[tuple[str, bool]] = Counter()
    found = []
    for key in map(colour, methods):
        shade, is_twin = key
        marker = MARKERS[shown[key] % len(MARKERS)]
        found.append({"color": shade, "marker": marker, "markerfacecolor": "white" if is_twin else shade})
        shown[key] += 1
    return found


def colour(method: str) -> tuple[str, bool]:
    """Returns the colour of a method, and whether it is a ReLU twin, which has its network's colour and open marks.

    Args:
        method: Name in records, such as `sddpm` or `sddpm-relu-twin`.
    """
    base, twin, _ = method.partition("-relu-twin")
    return f"C{COLOURS.index(base) if base in COLOURS else len(COLOURS)}", bool(twin)
