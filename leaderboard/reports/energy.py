"""`python -m benchmark leaderboard energy`: methods by models of energy, and which method costs least under each."""

from __future__ import annotations

import re
from operator import itemgetter
from pathlib import Path

from rich.table import Table
from rich.text import Text

from leaderboard.energy import EnergyModel, read_models
from leaderboard.files import is_report, refuse_existing, write_atomic
from leaderboard.record.entries import read_records
from leaderboard.reports.cells import Cell, metric_cell, metric_name
from leaderboard.reports.energies import ALL_MODELS, all_models, band_cell, energy, missing_energy, model_cell
from leaderboard.reports.methods import Method, tables
from leaderboard.reports.table import escape, markdown_line, shown_metrics, table_title
from leaderboard.reports.terminal import terminal

_TITLE = "# Energy"
_BELOW = "Millijoules per generated image, over its whole chain. Read it with the distance: images of noise are cheap."


def energy_table(
    records: list[str] | None = None,
    data: str | None = None,
    protocol: str | None = None,
    output: str | None = None,
) -> None:
    """Shows methods by models of energy, and names the method that costs least under each model.

    Args:
        records: Folders to search for `*.json`, directly and in any `records` folder below; null searches runs/ and
            the project's records, which come with the package.
        data: Dataset; null shows that of the table with the most rows.
        protocol: Protocol; null shows all protocols of the dataset.
        output: Markdown file to write the tables to.

    Raises:
        SystemExit: If a record is broken; the others are still shown.
        ValueError: If there are no records of the dataset and protocol.
        FileExistsError: If the output is a file of another kind.
    """
    console = terminal()
    entries, broken = read_records(records)
    for message in broken:
        console.print(Text(f"skipped: {message}", style="red"), soft_wrap=True)
    groups = _groups(tables(entries), data, protocol)
    lines = [_TITLE, "", _BELOW]
    for group in groups:
        rows, sentences = energy_rows(group), cheapest(group)
        console.print(Text(f"{table_title(group[0].record)}: mJ per image by each model", style="italic"))
        console.print(_table(rows))
        for sentence in sentences:
            console.print(Text(sentence), soft_wrap=True)
        console.print()
        lines += ["", f"## {escape(table_title(group[0].record))}", ""]
        lines += [markdown_line(rows[0]), markdown_line("---" for _ in rows[0])]
        lines += [markdown_line(map(str, row.values())) for row in rows]
        lines += [part for sentence in sentences for part in ("", escape(sentence))]
    console.print(Text(_BELOW, style="dim"), soft_wrap=True)
    if output is not None:
        if not is_report(Path(output), f"{_TITLE}\n"):
            refuse_existing(Path(output), option="--output")
        write_atomic(Path(output), "\n".join(lines) + "\n")
        console.print(f"wrote {output}", markup=False, soft_wrap=True)
    if broken:
        raise SystemExit(1)


def _table(rows: list[dict[str, Cell]]) -> Table:
    """Returns a table for terminals of 80 columns: models by their titles, without the distance and all models."""
    titles = {name: re.sub(r"(\w{5})(\w{4,})", r"\1-\n\2", model.title) for name, model in read_models().items()}
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("Method", vertical="bottom", overflow="fold", min_width=14)
    names = ["T", "Rate", *titles]
    for name in names:
        table.add_column(
            Text(titles.get(name, name).replace(" ", "\n")), justify="right", no_wrap=True, vertical="bottom"
        )
    for row in rows:
        table.add_row(*(Text(str(row[name])) for name in ("Method", *names)))
    return table


def _groups(groups: list[list[Method]], data: str | None, protocol: str | None) -> list[list[Method]]:
    """Returns the tables of a dataset, by default of the largest table, with methods that state a cost."""
    costed = [[method for method in group if method.record.cost is not None] for group in groups]
    costed = [group for group in costed if group]
    if data is None and costed:
        data = max(costed, key=len)[0].record.dataset.name
    found = [
        group
        for group in costed
        if group[0].record.dataset.name == data and protocol in (None, group[0].record.protocol.name)
    ]
    if not found:
        known = ", ".join(dict.fromkeys(table_title(group[0].record) for group in costed)) or "none"
        wanted = ", ".join(filter(None, (data, protocol))) or "any dataset"
        raise ValueError(f"no record with a cost of {wanted}; there are records of: {known}")
    return found


def energy_rows(group: list[Method]) -> list[dict[str, Cell]]:
    """Returns one row per method: distance, time steps, firing rate, and energy by model."""
    keys, models = shown_metrics(group)[:1], read_models().values()
    rows = []
    for method in group:
        cost, rate = method.record.cost, method.mean_cost("firing_rate")
        spiking = cost is not None and cost.firing_rate is not None
        rows.append(
            {
                "Method": Cell(method.name),
                **{metric_name(key): metric_cell(key, method)._replace(note="") for key in keys},
                "T": Cell(str(method.record.num_steps)) if spiking else Cell("-"),
                "Rate": Cell("-") if rate is None else Cell(f"{rate:.3f}"),
                **{model.name: model_cell(method, model) for model in models},
                ALL_MODELS: band_cell(all_models(method)),
            }
        )
    return rows


def cheapest(group: list[Method]) -> list[str]:
    """Says in words which method costs least under each model, and whether one does under all."""
    lines, least = [], set()
    for model in read_models().values():
        lower, upper = (_least(group, model, bound) for bound in (0, 1))
        if lower is None or upper is None:
            lines.append(f"{model.name}: no energy. {missing_energy(group, model).partition(': ')[2].capitalize()}.")
            continue
        least |= {lower.name, upper.name}
        energies = [energy(method, model) for method in (lower, upper)]
        missing = sum(energy(method, model) is None for method in group)
        among = f", of the {len(group) - missing} of {len(group)} methods that have an energy by it" if missing else ""
        if lower is upper:
            bounds = " by both bounds" if energies[0] is not None and energies[0].low != energies[0].high else ""
            lines.append(f"{model.name}: {lower.name} costs least{bounds}, {band_cell(energies[0]).text} mJ{among}.")
        else:
            lines.append(
                f"{model.name}: {lower.name} costs least by the lower bound ({band_cell(energies[0]).text} mJ), "
                f"{upper.name} by the upper one ({band_cell(energies[1]).text} mJ){among}."
            )
    if len(least) == 1 and all(energy(method, model) for method in group for model in read_models().values()):
        lines.append(f"{next(iter(least))} costs least by every model.")
    elif len(least) > 1:
        lines.append("Which method costs least depends on the model.")
    return lines


def _least(group: list[Method], model: EnergyModel, bound: int) -> Method | None:
    """Returns the method with the lowest bound of energy; None if none has an energy by the model."""
    found = [(band[bound], method) for method in group if (band := energy(method, model)) is not None]
    return min(found, key=itemgetter(0))[1] if found else None
