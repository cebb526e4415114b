"""`python -m benchmark leaderboard seeds`: tables and figures of methods, over their training seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image
from rich.table import Table
from rich.text import Text

from leaderboard.files import is_report, refuse_existing, write_atomic
from leaderboard.pictures import excerpt
from leaderboard.record.entries import Entry, default_folders, headline, read_records
from leaderboard.reports.cells import Cell, metric_name
from leaderboard.reports.colours import marks
from leaderboard.reports.energies import ENERGY, all_models, chosen_model, energy_meaning
from leaderboard.reports.known_sets import known_set_rows
from leaderboard.reports.methods import Method, tables
from leaderboard.reports.pareto import Point, pareto_front
from leaderboard.reports.study import find_studies, read_results, study_lines
from leaderboard.reports.table import column_label, escape, markdown_line, table_provenance, table_rows, table_title
from leaderboard.reports.terminal import terminal

FIGURES = "data/figures"
"""Folder of the figures, relative to `RESULTS.md`."""
_PREAMBLE = """\
# Results

Rendered from the records by `python -m benchmark leaderboard seeds`; not edited by hand.

One row per method, solver and configuration, lowest mean Fréchet distance first. ± is half of the 95 % interval of the
mean over the training seeds (Student's t). In parentheses, (±) is half of the 95 % interval of the evaluation of a
single training, without the spread of trainings. # is the interval of ranks by Fréchet distance: rows that the seeds
cannot tell apart share ranks, and a row with a single seed cannot be told apart from any other. mJ counts 45 nm
arithmetic only: no memory access, no neuron updates. `leaderboard/README.md` defines the columns and the test, and
states what these tables do not show.
"""


def seeds(records: list[str] | None = None, output: str | None = None) -> None:
    """Shows records that differ only in their seed as one row: mean ± half of its 95 % interval over the seeds.

    The interval includes the variation of training, and that of sampling as far as the sampling seeds of the records
    differ. Records that are not ranked are omitted. If a training seed has several records, such as its best and its
    last checkpoint, the newest is used.

    Args:
        records: Folders to search for `*.json`, directly and in any `records` folder below; null searches runs/ and
            the project's records, which come with the package.
        output: Folder for `RESULTS.md` and, in its subfolder `data/figures`, two figures per table: samples of every
            method, and quality against energy.

    Raises:
        SystemExit: If a record is broken; the others are still shown.
        FileExistsError: If the folder contains files of these names, but not of earlier results.
    """
    console = terminal()
    entries, broken = read_records(records)
    for message in broken:
        console.print(f"skipped: {message}", style="red", markup=False, soft_wrap=True)
    lines = [_PREAMBLE.rstrip()]
    results = Path(output or ".") / "RESULTS.md"
    is_own = is_report(results, "".join(_PREAMBLE.splitlines(keepends=True)[:3]))
    if output is not None and not is_own:
        refuse_existing(results, option="--output")
    ranked = [Entry(*pair) for pair in entries if Entry(*pair).is_ranked]

    def save(name: str, figure: Figure) -> str:
        """Writes a figure and returns its line."""
        content = BytesIO()
        figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
        path = f"{FIGURES}/{name}.png"
        if not is_own:
            refuse_existing(results.parent / path, option="--output")
        write_atomic(results.parent / path, content.getvalue())
        return f"![{name}]({path})"

    if output is not None:
        for folder in find_studies(default_folders() if records is None else records):
            lines += study_lines(read_results(folder), save)
    for group in tables((entry.path, entry.record) for entry in ranked):
        rows = result_rows(group)
        table = Table(*rows[0], title=table_title(group[0].record), title_justify="left")
        known = known_set_rows(group[0].record, rows[0])
        shown = rows + [{name: cell._replace(note="") for name, cell in row.items()} for row in known]
        for row in shown:
            table.add_row(*(Text(str(cell)) for cell in row.values()))
        console.print(table)
        notes = [f"* {note}" for note in sorted({row["Method"].note for row in rows} - {""})]
        for note in notes:
            console.print(note, markup=False, soft_wrap=True)
        lines += [
            "",
            f"## {escape(table_title(group[0].record))}",
            "",
            escape(f"{table_provenance(group[0].record)} {energy_meaning(chosen_model(None))}"),
            "",
        ]
        lines += [markdown_line(map(column_label, rows[0])), markdown_line("---" for _ in rows[0])]
        lines += [markdown_line(map(str, row.values())) for row in shown]
        lines += [part for note in notes for part in ("", escape(note))]
        if output is not None:
            names = "-".join(group[0].entries[0].table_key[:2])
            for name, figure in _figures(group, rows).items():
                lines += ["", save(f"{name}-{names}", figure)]
    if output is not None:
        write_atomic(results, "\n".join(lines) + "\n")
    if broken:
        raise SystemExit(1)


def result_rows(group: list[Method]) -> list[dict[str, Cell]]:
    """Returns the rows of a table with variants, solvers and network evaluations beside the names, without files."""
    omitted = (
        "#",
        "Method",
        "Variant",
        "Solver",
        "NFE",
        "Seeds",
        "Images/s",
        "Samples",
        "Repeated",
        "Verified",
        "Record",
    )
    rows = []
    for method, row in zip(group, table_rows(group), strict=True):
        names = {
            "#": row["#"],
            "Method": Cell(method.name, note=row["Method"].note),
            "Solver": Cell(f"{row['Solver']}, {row['NFE']}"),
            "Seeds": row["Seeds"],
        }
        rows.append(names | {name: cell._replace(note="") for name, cell in row.items() if name not in omitted})
    return rows


def _figures(group: Sequence[Method], rows: Sequence[dict[str, Cell]]) -> dict[str, Figure]:
    """Returns the figures of a table by name; the samples only if sample grids exist."""
    figures = {"quality-energy": _plot(group, rows, metric_name(headline(group[0].record)[0]))}
    if shown := [method for method in group if method.entries[0].samples.is_file()]:
        figures["samples"] = _panels(shown)
    return figures


def _panels(methods: Sequence[Method]) -> Figure:
    """Shows the first images of the first seed of each method, in rows of panels."""
    columns = min(len(methods), 6)
    rows = -(-len(methods) // columns)
    figure = Figure(figsize=(1.6 * columns, 1.85 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    for axes, method in zip(panels, methods, strict=False):
        entry = method.entries[0]
        with Image.open(entry.samples) as page:
            axes.imshow(excerpt(page, 4, 4, entry.record.conditional is not None))
        cost = entry.record.cost
        is_ann = cost is not None and cost.firing_rate is None
        axes.set_title(textwrap.fill(f"{method.name}{' (ANN)' * is_ann}", 20), fontsize=8)
    return figure


def _plot(group: Sequence[Method], rows: Sequence[dict[str, Cell]], quality: str) -> Figure:
    """Plots quality against energy, with 95 % intervals, the bands of all models of energy and the Pareto front."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    points = [_point(method, row, quality) for method, row in zip(group, rows, strict=True)]
    front = [(point.energy, point.quality) for point in pareto_front(points)]
    axes.step(*zip(*front, strict=True), where="post", color="0.6", lw=1, label="Pareto front of the means")
    by_name = sorted(points, key=lambda point: point.label)  # so that marks do not depend on quality
    styles = dict(zip(map(id, by_name), marks(point.method for point in by_name), strict=True))
    for point in points:
        mark = styles[id(point)]
        if point.band:
            axes.hlines(point.quality, *point.band, color=mark["color"], alpha=0.4, lw=1)
        axes.errorbar(point.energy, point.quality, yerr=point.uncertainty, ls="", capsize=3, label=point.label, **mark)
    bands = "\nhorizontal bars: lowest to highest model of energy" if any(point.band for point in points) else ""
    axes.set(
        xlabel=f"45 nm arithmetic per image, strict (mJ){bands}", ylabel=f"{quality} (lower is better)", xscale="log"
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    top = 1.3 * max(point.quality for point in points)
    axes.set_ylim(0, top if top > 0 else None)  # intervals of few seeds are cut at the frame
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, title="method, solver, NFE")
    return figure


def _point(method: Method, row: dict[str, Cell], quality: str) -> Point:
    return Point(
        energy=row[ENERGY].value or 0.0,
        quality=row[quality].value or 0.0,
        uncertainty=float(row[quality].uncertainty or 0),
        method=row["Method"].text.partition(",")[0].partition(" (")[0],
        label=f"{row['Method'].text}, {row['Solver']}",
        anchor="",
        band=all_models(method),
    )
