"""`python -m benchmark leaderboard seeds`: mean and standard deviation of results over training seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image
from rich.table import Table

from leaderboard.files import is_report, refuse_existing, write_atomic
from leaderboard.record.entries import Entry, headline, read_records, table_metrics
from leaderboard.record.records import Record
from leaderboard.reports.pareto import Point, pareto_front
from leaderboard.reports.table import (
    Cell,
    escape,
    label,
    markdown_line,
    method_name,
    method_note,
    metric_name,
    number_cell,
    table_provenance,
    table_title,
    tables,
    uncertain_cell,
)
from leaderboard.reports.terminal import terminal

COLOURS = ("ddpm", "sddpm", "sdm", "fsddim", "spiking-rwkv", "spiking-diffusion", "ann-snn", "sdit")
"""Methods in the order of matplotlib's colours, so that a method has the same colour in every plot."""
MARKERS = "osD^vPX*"
"""Markers of the first, second, ... row of a method."""

FIGURES = "data/figures"
"""Folder of the figures, relative to `RESULTS.md`."""
_PREAMBLE = """\
# Results

Rendered from the records by `python -m benchmark leaderboard seeds`; not edited by hand.

One row per method, solver and configuration, lowest Fréchet distance first. ± is the sample standard deviation over
training seeds; a row with one seed has none. The error of each single evaluation is in its record and in the tables of
`python -m benchmark leaderboard`. mJ counts 45 nm arithmetic only: no memory access, no neuron updates. Recall rises
steeply with a few outlying images and does not rank methods. `leaderboard/README.md` defines the columns and states
what these tables do not show.
"""
_PER_RUN_KEYS = {"default_root_dir", "init_from", "ckpt_path", "seed_everything", "cache_dir", "variant"}
"""Configuration keys that may differ between the seeds of one row."""


def seeds(records: list[str] | None = None, output: str | None = None) -> None:
    """Shows records that differ only in their seed as one row: mean ± standard deviation over the seeds.

    The standard deviation includes the variation of training and of the evaluation. Records that are not ranked are
    omitted. If a training seed has several records, such as its best and its last checkpoint, the newest is used.

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
    for group in tables(pair for pair in entries if Entry(*pair).is_ranked):
        rows = seed_rows(group)
        table = Table(*rows[0], title=table_title(group[0]), title_justify="left")
        for row in rows:
            table.add_row(*map(str, row.values()))
        console.print(table)
        notes = [f"* {note}" for note in sorted({row["Method"].note for row in rows} - {""})]
        for note in notes:
            console.print(note, markup=False, soft_wrap=True)
        lines += ["", f"## {escape(table_title(group[0]))}", "", escape(table_provenance(group[0])), ""]
        lines += [markdown_line(map(label, rows[0])), markdown_line("---" for _ in rows[0])]
        lines += [markdown_line(map(str, row.values())) for row in rows]
        lines += [part for note in notes for part in ("", escape(note))]
        if output is not None:
            for name, figure in _figures(group, rows).items():
                content = BytesIO()
                figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
                path = f"{FIGURES}/{name}-{'-'.join(group[0].table_key[:2])}.png"
                if not is_own:
                    refuse_existing(Path(output) / path, option="--output")
                write_atomic(Path(output) / path, content.getvalue())
                lines += ["", f"![{name}]({path})"]
    if output is not None:
        write_atomic(results, "\n".join(lines) + "\n")
    if broken:
        raise SystemExit(1)


def seed_rows(group: Sequence[Entry]) -> list[dict[str, Cell]]:
    """Returns one row per set of entries that differ only in the seed, best mean first."""
    by_config = sorted((entry.record for entry in group), key=_seedless_key)
    members = [_newest_per_seed(records) for _, records in groupby(by_config, key=_seedless_key)]
    members.sort(key=lambda records: _mean(lambda r: headline(r)[1].value, records))
    keys = table_metrics(key for entry in group for key in entry.record.metrics)
    return [_row(records, keys) for records in members]


def _newest_per_seed(records: Iterable[Record]) -> list[Record]:
    """Returns the newest record of each training seed; two tests of one training are not independent samples."""
    return list({record.seeds.get("training"): record for record in sorted(records, key=lambda r: r.created)}.values())


def _seedless_key(record: Record) -> str:
    """Returns a key that is equal for records that differ only in the seed."""
    return json.dumps([record.method, record.solver, _shared_config(record.config)], sort_keys=True)


def _shared_config(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _shared_config(value) for key, value in config.items() if key not in _PER_RUN_KEYS}
    return [_shared_config(value) for value in config] if isinstance(config, list) else config


def _mean(value: Callable[[Record], float | None], records: Sequence[Record]) -> float:
    values = [v for v in map(value, records) if v is not None]
    return statistics.fmean(values) if values else math.nan


def _row(records: Sequence[Record], keys: Sequence[str]) -> dict[str, Cell]:
    first, cost = records[0], records[0].counted_cost
    shared = {record.variant for record in records} - {"default"}
    variant = f", {first.variant}" if shared == {first.variant} else ""
    return {
        "Method": Cell(method_name(first) + variant, note=method_note(first)),
        "Solver": Cell(f"{first.solver}, {first.nfe}"),
        "Seeds": Cell(str(len({r.seeds.get("training") for r in records}))),
        **{metric_name(key): _mean_cell([r.metrics[key].value for r in records if key in r.metrics]) for key in keys},
        "T": Cell("-" if cost.firing_rate is None else str(first.num_steps)),
        "Rate": number_cell(None if cost.firing_rate is None else _mean(lambda r: r.counted_cost.firing_rate, records)),
        "G SOPs": number_cell(_mean(lambda r: r.counted_cost.sops, records) / 1e9),
        "mJ": number_cell(_mean(lambda r: r.counted_cost.energy_strict_mj, records)),
        "M params": number_cell(cost.parameters / 1e6),
    }


def _mean_cell(values: Sequence[float]) -> Cell:
    """Formats mean ± sample standard deviation; a single value has no standard deviation."""
    if not values:
        return Cell("-")
    mean = statistics.fmean(values)
    return uncertain_cell(mean, statistics.stdev(values)) if len(values) > 1 else Cell(f"{mean:.3g}", mean)


def _figures(group: Sequence[Entry], rows: Sequence[dict[str, Cell]]) -> dict[str, Figure]:
    """Returns the figures of a table by name; the strip of samples only if sample grids exist."""
    figures = {"quality-energy": _plot(rows, metric_name(headline(group[0].record)[0]))}
    best = {e.record.method: e for e in reversed(group) if e.record.variant == "default" and e.samples.is_file()}
    if best:
        figures["samples"] = _strip(sorted(best.values(), key=lambda entry: entry.frechet))
    return figures


def _strip(entries: Sequence[Entry]) -> Figure:
    """Plots the upper left quarters of the entries' sample grids side by side."""
    figure = Figure(figsize=(1.3 * len(entries), 1.45), layout="constrained")
    for axes, entry in zip(figure.subplots(1, len(entries), squeeze=False)[0], entries, strict=True):
        with Image.open(entry.samples) as page:
            quarter = page.convert("RGB").crop((0, 0, page.width // 2 + 1, page.height // 2 + 1))
        axes.imshow(np.asarray(quarter))
        axes.set_title(method_name(entry.record), fontsize=8)
        axes.set_axis_off()
    return figure


def _plot(rows: Sequence[dict[str, Cell]], quality: str) -> Figure:
    """Plots quality against energy, with the standard deviation over seeds and the Pareto front."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    points = [_point(row, quality) for row in rows]
    front = [(point.energy, point.quality) for point in pareto_front(points)]
    axes.step(*zip(*front, strict=True), where="post", color="0.6", lw=1, label="Pareto front")
    shown: Counter[str] = Counter()
    for point in points:
        colour = f"C{COLOURS.index(point.method) if point.method in COLOURS else len(COLOURS)}"
        marker = MARKERS[shown[point.method] % len(MARKERS)]
        shown[point.method] += 1
        axes.errorbar(
            point.energy,
            point.quality,
            yerr=point.uncertainty,
            fmt=marker,
            color=colour,
            capsize=3,
            label=point.label,
        )
    axes.set(xlabel="45 nm arithmetic per image, strict (mJ)", ylabel=f"{quality} (lower is better)", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, title="method, solver, NFE")
    return figure


def _point(row: dict[str, Cell], quality: str) -> Point:
    return Point(
        energy=row["mJ"].value or 0.0,
        quality=row[quality].value or 0.0,
        uncertainty=float(row[quality].uncertainty or 0),
        method=row["Method"].text.partition(",")[0].partition(" (")[0],
        label=f"{row['Method'].text}, {row['Solver']}",
        anchor="",
    )
