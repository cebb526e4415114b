"""Cells of tables: numbers with their intervals, and the headers of their columns."""

from __future__ import annotations

import math
import re
import statistics
from typing import Literal, NamedTuple

from leaderboard.record.records import MetricValue
from leaderboard.reports.methods import Method
from leaderboard.reports.statistics import OF_AN_EVALUATION, half_width

_HEADERS = {
    "fid": "FID",
    "kid_mean": "1000 KID",
    "is_mean": "IS",
    "reconstruction_mse": "Rec. MSE",
    "reconstruction_ssim": "Rec. SSIM",
}
_SHARES = {
    "precision": "Prec.",
    "recall": "Recall",
    "density": "Dens.",
    "coverage": "Cov.",
    "authenticity": "Auth.",
}
_SCALE = {"kid_mean": 1000.0}
"""Factors by which metrics are multiplied for display."""


class Cell(NamedTuple):
    """Cell of a table.

    Args:
        text: The value as text.
        value: The value as a number; None for text and missing values.
        uncertainty: Half of the 95 % interval as text; may be empty.
        note: Footnote; may be empty.
        single: Whether the interval is of the evaluation of a single training.
    """

    text: str
    value: float | None = None
    uncertainty: str = ""
    note: str = ""
    single: bool = False

    @property
    def spread(self) -> str:
        """The uncertainty with its sign; in parentheses if it is of a single training."""
        text = f"±{self.uncertainty}" if self.uncertainty else ""
        return f"({text})" if text and self.single else text

    def __str__(self) -> str:
        return f"{self.text}{'*' if self.note else ''}{f' {self.spread}' if self.spread else ''}"


def metric_name(key: str) -> str:
    """Returns the column header of a metric; for shares of images without the extractor, shared by the table."""
    for start, name in _SHARES.items():
        if key.startswith(start):
            return name
    return _HEADERS.get(key, key)


def direction(key: str) -> Literal["lower", "higher", ""]:
    """Returns the better direction of a metric; empty if it has none, as recall, which a few outliers raise."""
    if re.fullmatch(r"(fid|fd|kid|kd|fad)(_.*)?|reconstruction_mse", key):
        return "lower"
    return (
        "higher" if re.fullmatch(r"(is|precision|density|coverage|authenticity)(_.*)?|reconstruction_ssim", key) else ""
    )


def metric_cell(key: str, method: Method, scaled: bool = True) -> Cell:
    """Formats the mean of a metric and its 95 % interval: over seeds, or of the evaluation of a single training.

    Args:
        key: Key of the metric.
        method: Row of the table.
        scaled: Whether to multiply by the factor in the column's header.
    """
    scale = _SCALE.get(key, 1) if scaled else 1
    values = [value * scale for value in method.values(key).values()]
    found = [entry.record.metrics[key] for entry in method.entries if key in entry.record.metrics]
    if not found:
        return Cell("-")
    note = "; ".join(sorted({metric.note for metric in found} - {""}))
    if (interval := half_width(values)) is None:
        return evaluation_cell(key, found[0], scaled)
    return uncertain_cell(statistics.fmean(values), interval, note)


def evaluation_cell(key: str, metric: MetricValue, scaled: bool = True) -> Cell:
    """Formats a metric of one record with the 95 % interval of its evaluation."""
    scale = _SCALE.get(key, 1) if scaled else 1
    cell = uncertain_cell(metric.value * scale, OF_AN_EVALUATION * metric.uncertainty * scale, metric.note)
    return cell._replace(single=True)


def uncertain_cell(value: float, uncertainty: float, note: str = "") -> Cell:
    """Formats a number with as many decimals as show two significant digits of its uncertainty."""
    decimals = min(6, max(0, 1 - math.floor(math.log10(uncertainty)))) if uncertainty > 0 else 3
    return Cell(f"{value:.{decimals}f}", value, f"{uncertainty:.{decimals}f}", note)


def plus_minus(value: float, interval: float | None = None) -> str:
    """Formats a distance and half of its 95 % interval, if there is one, with two decimals each."""
    return f"{value:.2f}" if interval is None else f"{value:.2f} ±{interval:.2f}"


def number_cell(value: float | None) -> Cell:
    """Formats a number with three significant digits, or as an integer from 100 on."""
    if value is None:
        return Cell("-")
    return Cell(f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}", value)
