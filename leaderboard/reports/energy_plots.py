"""Plots of quality against energy, one for each model of energy and one for all."""

from __future__ import annotations

import math
from collections.abc import Sequence

from leaderboard.energy import ARITHMETIC, read_models
from leaderboard.record.entries import headline
from leaderboard.reports import pareto
from leaderboard.reports.energies import all_models, energy, has_counts
from leaderboard.reports.methods import Method
from leaderboard.reports.statistics import OF_AN_EVALUATION, half_width

ALL = "all models"
"""Name of the plot that shows the band from the lowest to the highest model."""
AS_PUBLISHED = "published"
"""Name of the plot of published energies."""


def energy_plots(rows: Sequence[tuple[Method, str, str]]) -> dict[str, list[pareto.Plot]]:
    """Returns the plots of a table by model, for screens and for phones; those without two points are omitted.

    The mark of a model with two bounds is their geometric mean.

    Args:
        rows: Methods with their names and the HTML ids of their rows.
    """
    titles = {name: f"mJ per image by {name}" for name in read_models()}
    titles[ARITHMETIC] = "45 nm arithmetic per image, strict count (mJ)"
    if any(has_counts(method) for method, _, _ in rows):
        titles = {ALL: "mJ: mark arithmetic, bar all models"} | titles
    plots = {name: plots_of(_points(rows, name), "Fréchet distance", title) for name, title in titles.items()}
    return {name: found for name, found in plots.items() if found}


def plots_of(points: Sequence[pareto.Point], quality: str, title: str) -> list[pareto.Plot]:
    """Returns the plot for screens and for phones; none if there are fewer than two points."""
    plots = [pareto.plot(points, quality, title, frame) for frame in (pareto.WIDE, pareto.NARROW)]
    return [plot for plot in plots if plot is not None]


def _points(rows: Sequence[tuple[Method, str, str]], name: str) -> list[pareto.Point]:
    model = read_models()[ARITHMETIC if name == ALL else name]
    points = []
    for method, label, anchor in rows:
        if (band := energy(method, model)) is None:
            continue
        points.append(
            pareto.Point(
                math.sqrt(band.low * band.high),
                method.frechet,
                _interval(method),
                method.record.method,
                label,
                anchor,
                method.is_ranked,
                all_models(method) if name == ALL else band if band.low < band.high else None,
            )
        )
    return points


def _interval(method: Method) -> float:
    """Returns half of the 95 % interval of the Fréchet distance; 0 if it was not measured."""
    if not math.isfinite(method.frechet):
        return 0.0
    key, metric = headline(method.record)
    return half_width(list(method.values(key).values())) or OF_AN_EVALUATION * metric.uncertainty
