"""Columns of energy: one model, and the band from the lowest to the highest of all models."""

from __future__ import annotations

import math

from leaderboard.energy import ARITHMETIC, Band, EnergyModel, read_model, read_models
from leaderboard.record.records import Cost
from leaderboard.reports.cells import Cell, number_cell
from leaderboard.reports.methods import Method

ENERGY = "mJ"
"""Column of the chosen model, by default of the arithmetic."""
ALL_MODELS = "mJ, all models"
"""Column of the band from the lowest to the highest model; only in tables with records from which it follows."""


def chosen_model(name: str | None) -> EnergyModel:
    """Returns the model whose energy a table shows, by default the arithmetic.

    Raises:
        ValueError: If there is no such model.
    """
    return read_model(ARITHMETIC if name is None else name)


def energy_label(model: EnergyModel) -> str:
    """Returns the header of the column of a model in pages and files."""
    return f"45 nm {model.title}, mJ"


def energy_meaning(model: EnergyModel) -> str:
    """Returns one sentence on the column of a model."""
    if model.name == ARITHMETIC:
        return "mJ: MACs and accumulates per image at 45 nm, strict count, without memory access."
    return f"mJ: per image by the model {model.name}."


def energy_cells(method: Method, model: EnergyModel, has_band: bool) -> dict[str, Cell]:
    """Returns the cells of energy of a row.

    Args:
        method: The row.
        model: Model of the first column.
        has_band: Whether the table has a column of all models.
    """
    cells = {ENERGY: model_cell(method, model)}
    return cells | ({ALL_MODELS: band_cell(all_models(method))} if has_band else {})


def model_cell(method: Method, model: EnergyModel) -> Cell:
    """Returns the energy of a row by one model: a number, or two bounds."""
    return band_cell(energy(method, model))._replace(note=incomplete_cost(method.record.cost))


def energy(method: Method, model: EnergyModel) -> Band | None:
    """Returns the mean energy over the trainings that have one by a model; None if none has."""
    found = [band for entry in method.entries if (band := model.energy(entry.record.cost)) is not None]
    return Band(*(math.fsum(bounds) / len(found) for bounds in zip(*found, strict=True))) if found else None


def all_models(method: Method) -> Band | None:
    """Returns the band from the lowest to the highest model; None without operations by layer."""
    if not has_counts(method):
        return None
    found = [band for model in read_models().values() if (band := energy(method, model)) is not None]
    return Band(min(band.low for band in found), max(band.high for band in found))


def has_counts(method: Method) -> bool:
    """True if a training of a row has operations by layer, from which every model starts."""
    return any(entry.record.cost is not None and entry.record.cost.counts is not None for entry in method.entries)


def band_cell(band: Band | None) -> Cell:
    """Formats a number with three significant digits, or two bounds with two each; sorted by the geometric mean."""
    if band is None or band.low == band.high:
        return number_cell(None if band is None else band.low)
    low, high = (f"{bound:,.0f}" if bound >= 100 else f"{bound:.2g}" for bound in band)
    return Cell(low if low == high else f"{low}-{high}", math.sqrt(band.low * band.high))


def missing_energy(group: list[Method], model: EnergyModel) -> str:
    """Returns a note on the rows of a table that have no energy by a model; empty if all have."""
    costs = [entry.record.cost for method in group for entry in method.entries if energy(method, model) is None]
    reasons = sorted({model.missing(cost) for cost in costs})
    return f"- in {energy_label(model)}: {'; or '.join(reasons)}" if reasons else ""


COLUMNS = [f"energy_{name}_{bound}_mj" for name in read_models() if name != ARITHMETIC for bound in Band._fields]
"""Columns of energy in files; the arithmetic is `energy_strict_mj`."""


def energy_columns(cost: Cost | None) -> dict[str, float | None]:
    """Returns the bounds of the energy by each model but the arithmetic, by column of files."""
    bands = [model.energy(cost) for name, model in read_models().items() if name != ARITHMETIC]
    return dict(zip(COLUMNS, (bound for band in bands for bound in band or (None, None)), strict=True))


def incomplete_cost(cost: Cost | None) -> str:
    """Returns a note on products that the cost lacks; empty if it is complete."""
    names = ", ".join((cost and cost.incomplete) or ())
    return f"the cost is a lower bound: it lacks the products of {names}, which cannot be counted" if names else ""
