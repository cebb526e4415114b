"""`python -m benchmark break-even`: the firing rate below which a spiking network costs less than its twin."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from leaderboard.energy import Band, read_models
from leaderboard.energy.break_even import ALWAYS, NEVER, BreakEven, break_even
from leaderboard.files import free_path, refuse_existing, write_atomic
from leaderboard.record.entries import Entry, headline
from leaderboard.record.records import Cost, Record, find_records, read_record
from leaderboard.reports.cells import evaluation_cell
from leaderboard.reports.energies import band_cell, incomplete_cost
from leaderboard.reports.methods import fold
from leaderboard.reports.terminal import terminal
from systems.ops.quantise import PLAIN_BITS, bits_of_steps

_COLUMNS = 3
_SPIKING, _TWIN = "tab:blue", "tab:orange"
_BELOW = (
    "Energy in mJ per image. Break-even is the mean firing rate below which the spiking network costs less, if the "
    "rates of all layers change by the same factor; two values are of the lower and the upper bounds of energy. Less "
    "energy does not make up for worse images: compare the metric above."
)


def break_even_report(spiking: str = "", twin: str = "", output: str | None = None) -> None:
    """Shows by every model of energy the firing rate below which a spiking network costs less than its twin.

    The records contain all counts, so that nothing is run. The twin is any network without neurons on the same dataset
    with as many network evaluations: the ReLU twin, plain or quantised, or the ANN.

    Args:
        spiking: Record of the spiking network, or its run folder, of which the newest record counts.
        twin: Record, or run folder, of the network without spikes.
        output: PNG file of the plot; null writes break-even.png, under another name the next time.

    Raises:
        FileNotFoundError: If a record or folder does not exist.
        FileExistsError: If the output exists.
        ValueError: If a record lacks what is needed, or the records do not belong together.
    """
    if not (spiking and twin):
        raise ValueError("break-even compares two trained networks: give --spiking RECORD and --twin RECORD")
    entries = [_newest(spiking, "--spiking"), _newest(twin, "--twin")]
    found, missing = compared(*entries)
    if output is not None:
        refuse_existing(Path(output), option="--output")
    path = free_path(Path("break-even.png")) if output is None else Path(output)
    console = terminal()
    for line in describe(*entries):
        console.print(Text(line), soft_wrap=True)
    console.print(_table(found))
    for line in [*missing, *sentences(found)]:
        console.print(Text(line), soft_wrap=True)
    console.print(Text(_BELOW, style="dim"), soft_wrap=True)
    content = BytesIO()
    draw(found, *entries).savefig(content, format="png", dpi=130, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content.getvalue())
    console.print(f"wrote {path}", markup=False, soft_wrap=True)


def _newest(text: str, option: str) -> Entry:
    """Returns a record, or the newest one of a folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(text)
    if path.is_file():
        return Entry(path, read_record(path))
    if not path.is_dir():
        raise FileNotFoundError(f"{option} {text} does not exist; give a record (*.json) or a run folder")
    if not (files := find_records([path])):
        raise FileNotFoundError(f"{option} {text} contains no record; write one by `python -m benchmark test`")
    return max((Entry(file, read_record(file)) for file in files), key=lambda entry: (entry.time(), entry.path.name))


def compared(spiking: Entry, twin: Entry) -> tuple[list[BreakEven], list[str]]:
    """Returns the comparison by each model, and the reasons why models have none.

    Raises:
        ValueError: If a record lacks what is needed, or the records do not belong together.
    """
    costs = [_counted(entry) for entry in (spiking, twin)]
    if costs[0].firing_rate is None:
        raise ValueError(f"{spiking.path}: {_name(spiking)} has no neurons; give it as --twin, and a spiking network")
    if costs[0].firing_rate == 0:
        raise ValueError(f"{spiking.path}: {_name(spiking)} never fires, so that its energy has no rate to follow")
    if costs[1].firing_rate is not None:
        raise ValueError(
            f"{twin.path}: {_name(twin)} has neurons; a twin has none: give a network trained with "
            "--model.neuron relu, or the ANN (DDPM)"
        )
    for name, a, b in (
        ("datasets", spiking.record.dataset.name, twin.record.dataset.name),
        ("image geometries", spiking.record.dataset.geometry, twin.record.dataset.geometry),
        ("numbers of network evaluations", spiking.record.nfe, twin.record.nfe),
    ):
        if a != b and None not in (a, b):  # records of earlier versions do not state the geometry
            raise ValueError(
                f"the records are of different {name}, {a} ({spiking.path}) and {b} ({twin.path}); give two of the same"
            )
    found, missing = [], []
    for name, model in read_models().items():
        result = break_even(model, *costs)
        if result is not None:
            found.append(result)
        else:
            reasons = dict.fromkeys(reason for cost in costs if (reason := model.missing(cost)))
            missing.append(f"{name}: no energy: {'; '.join(reasons)}.")
    return found, missing


def _counted(entry: Entry) -> Cost:
    """Returns the cost of a record.

    Raises:
        ValueError: If it has none, or no operations by layer.
    """
    cost = entry.record.cost
    if cost is None:
        raise ValueError(f"{entry.path} is of images only and states no cost; give the record of a test")
    if cost.counts is None:
        raise ValueError(
            f"{entry.path} has no operations by layer, as written by an earlier version; evaluate the network again by "
            "`python -m benchmark test --ckpt_path CHECKPOINT`"
        )
    return cost


def _name(entry: Entry) -> str:
    (method,) = fold([entry])
    return method.name


def describe(spiking: Entry, twin: Entry) -> list[str]:
    """Returns lines that say which networks are compared, and at which quality."""
    lines = []
    for title, entry in (("spiking", spiking), ("twin", twin)):
        record, cost = entry.record, _counted(entry)
        key, metric = headline(record)
        fires = "" if cost.firing_rate is None else f", T = {record.num_steps}, firing rate {cost.firing_rate:.3f}"
        quality = f"{key} {evaluation_cell(key, metric, scaled=False)} ({record.protocol.name})"
        lines.append(
            f"{title}: {_name(entry)}, {record.dataset.name}, {record.nfe} NFE{fires}; {quality}; {entry.path}"
        )
        if note := incomplete_cost(cost):
            lines.append(f"warning: {title}: {note}")
    bits, equal = _bits(twin.record), bits_of_steps(spiking.record.num_steps or 1)
    if bits is not None and bits != equal:
        lines.append(
            f"note: the twin's activations have {bits} bits; {equal} bits have at least as many levels as a neuron has "
            f"spike counts in T = {spiking.record.num_steps} steps (arXiv 2409.08290), which is the fairer twin"
        )
    return lines


def _bits(record: Record) -> int | None:
    """Returns the bits of the activations, if the configuration of the method states them."""
    options = (record.config.get("model") or {}).get("init_args") or {}
    bits = options.get("activation_bits")
    return bits if isinstance(bits, int) and bits <= PLAIN_BITS else None


def _table(found: list[BreakEven]) -> Table:
    table = Table()
    for column in ("model", "spiking, mJ", "twin, mJ", "spiking / twin", "rate", "break-even rate"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in found:
        table.add_row(*cells(row))
    return table


def cells(row: BreakEven) -> tuple[str, ...]:
    """Returns the cells of one model."""
    ratio = Band(*(a / b for a, b in zip(row.spiking, row.twin, strict=True)))
    energies = (band_cell(row.spiking).text, band_cell(row.twin).text, in_words(ratio, "{:.2f}".format))
    return row.model.name, *energies, f"{row.rate:.3f}", rates_in_words(row)


def in_words(band: Band, form: Any) -> str:
    """Formats what the lower and the upper bounds say; once if they say the same."""
    low, high = map(form, band)
    return low if low == high else f"{low} / {high}"


def rates_in_words(row: BreakEven) -> str:
    """Formats the break-even rates by the lower and the upper bounds of energy."""
    return in_words(row.rates, lambda rate: {NEVER: "never", ALWAYS: "always"}.get(rate, f"{rate:.3f}"))


def sentences(found: list[BreakEven]) -> list[str]:
    """Says in words which network costs less at the measured rate, by each model."""
    verdicts: dict[str, list[str]] = {}
    for row in found:
        less = {spiking < twin for spiking, twin in zip(row.spiking, row.twin, strict=True)}
        verdict = "spiking costs less" if less == {True} else "the twin costs less"
        verdicts.setdefault(verdict if len(less) == 1 else "the bounds disagree", []).append(row.model.name)
    return [f"At the measured rate {verdict} by {', '.join(models)}." for verdict, models in verdicts.items()]


def draw(found: list[BreakEven], spiking: Entry, twin: Entry) -> Figure:
    """Plots energy against the firing rate, one panel for each model.

    Args:
        found: The comparisons.
        spiking: Record of the spiking network.
        twin: Record of the other one.
    """
    record, rows = spiking.record, -(-len(found) // _COLUMNS)
    figure = Figure(figsize=(3.6 * _COLUMNS, 0.9 + 3.0 * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    finite = [rate for row in found for rate in row.rates if 0 < rate < 1]
    rates = np.linspace(0, min(1.0, 1.25 * max([*finite, found[0].rate])), 50)
    for panel, row in zip(panels, found, strict=False):
        _panel(panel, row, rates)
    for panel in panels[len(found) :]:
        panel.axis("off")
    for panel in panels[max(0, len(found) - _COLUMNS) : len(found)]:
        panel.set_xlabel("mean firing rate")
    handles, labels = panels[0].get_legend_handles_labels()
    names = {"spiking": f"spiking: {_name(spiking)}, T = {record.num_steps}", "twin": f"twin: {_name(twin)}"}
    title = f"Energy per image against firing rate: {record.dataset.name}, {record.nfe} NFE"
    figure.suptitle(title, fontsize=11)
    figure.legend(handles, [names.get(name, name) for name in labels], loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _panel(axes: Any, row: BreakEven, rates: np.ndarray) -> None:
    """Draws the lines of one model; bounds, which may differ tenfold, with the area between them on a log scale."""
    lines = np.array([row.energy(float(rate)) for rate in rates])
    twin = np.array([row.twin] * len(rates))
    bounded = any(band.low != band.high for band in (row.spiking, row.twin))
    for energies, colour, label in ((lines, _SPIKING, "spiking"), (twin, _TWIN, "twin")):
        axes.plot(rates, energies[:, 0], color=colour, label=label)
        if bounded:
            axes.plot(rates, energies[:, 1], color=colour)
            axes.fill_between(rates, energies[:, 0], energies[:, 1], color=colour, alpha=0.15, linewidth=0)
    axes.axvline(row.rate, color="0.4", linestyle="--", linewidth=1, label=f"measured rate, {row.rate:.3f}")
    crossings = [(r, e) for r, e in zip(row.rates, row.twin, strict=True) if 0 < r < 1]
    axes.plot(*zip(*crossings, strict=True) if crossings else ([], []), "o", color="black", label="break-even")
    axes.set(ylim=(0, 1.08 * max(lines.max(), twin.max())), xlim=(0, rates[-1]))
    if bounded:
        least = min(lines.min(), twin.min())
        axes.set(yscale="log", ylim=(least / 1.5, 1.5 * max(lines.max(), twin.max())))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(f"{row.model.title} ({row.model.name})\nbreak-even: {rates_in_words(row)}", fontsize=9)
    axes.set_ylabel("mJ per image")
    axes.grid(alpha=0.3)
