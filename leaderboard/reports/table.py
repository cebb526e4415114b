"""Tables of the leaderboard, for the terminal and as Markdown."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leaderboard.files import is_report, refuse_existing, write_atomic
from leaderboard.record.entries import STATUSES, Entry, default_folders, read_records, table_metrics
from leaderboard.record.records import Cost, MetricValue, Record
from leaderboard.reports.terminal import SHORT, WIDTH, terminal

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
METHOD_NOTES = {
    "spiking-rwkv": "SpikingRWKV: the suite's own, fully spiking design after SDiT's paper, not SDiT as released; "
    "called sdit in its first records.",
}
"""Footnotes of methods, by method name."""
CONDITIONAL_NOTE = (
    "conditional: generates images of given classes, drawn uniformly unless stated, and so knows more about each image "
    "than the unconditional methods beside it."
)
"""Footnote of records of class-conditional models."""
LABELS = {"mJ": "45 nm arithmetic, mJ"}
"""Column headers in pages and files, for columns with a shorter header in the terminal."""
_TITLE = "# Leaderboard"
SHORT_ROWS = 8
"""Maximum number of rows of the short table, so that it fits a terminal together with the surrounding output."""
NO_BREAK = "\N{NO-BREAK SPACE}"
_SCALE = {"kid_mean": 1000.0}
"""Factors by which metrics are multiplied for display."""
_STACKS = (
    ("T", "Rate"),
    ("Solver", "NFE", "Repeated"),
    ("G SOPs", "mJ"),
    ("M params", "Images/s"),
    ("Samples", "Seed", "File"),
)
"""Columns that the wide terminal table prints above each other."""


class Cell(NamedTuple):
    """Cell of a table.

    Args:
        text: The value as text.
        value: The value as a number; None for text and missing values.
        uncertainty: The uncertainty as text; may be empty.
        note: Footnote; may be empty.
    """

    text: str
    value: float | None = None
    uncertainty: str = ""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.text}{'*' if self.note else ''}{f' ±{self.uncertainty}' if self.uncertainty else ''}"


def leaderboard(
    records: list[str] | None = None,
    output: str | None = None,
    wide: bool = False,
    all: bool = False,
) -> None:
    """Shows records as tables, one per dataset and protocol: best Fréchet distance first, then what is not ranked.

    By default, only the table of the newest run is shown, with few columns, the best rows and the neighbours of the
    newest run, which is marked by `>`. Without runs, the table with the most rows is shown.

    Args:
        records: Folders to search for `*.json`, directly and in any `records` folder below; null searches runs/ and
            the project's records, which come with the package.
        output: Markdown file to write all tables to, with every column and row.
        wide: Show every column and row, the source of the reference images and the files of the records.
        all: Show the tables of all datasets and protocols, with every row.

    Raises:
        SystemExit: If a record is broken; the others are still shown.
        FileExistsError: If the output is a file of another kind.
    """
    console = terminal(WIDTH if wide else SHORT)
    entries, broken = read_records(records)
    for message in broken:
        console.print(Text(f"skipped: {message}", style="red"), soft_wrap=True)
    if not entries:
        console.print(
            f"No records under {', '.join(records or default_folders())}. An evaluation writes one: "
            "python -m benchmark test --config configs/<method>_<dataset>.yaml --ckpt_path <checkpoint>",
            markup=False,
            soft_wrap=True,
        )
    else:
        groups = tables(entries)
        newest = max((entry for group in groups for entry in group if entry.in_run), key=Entry.time, default=None)
        chosen = next((group for group in groups if newest in group), max(groups, key=len))
        for group in groups if all else [chosen]:
            if wide:
                _print_wide(console, group)
            else:
                _print_short(console, group, newest, every_row=all)
        if not all:
            _show_hidden(console, chosen, groups, newest, wide)
        if newest is not None:
            _show_run(newest, console)
        if output is not None:
            if not is_report(Path(output), f"{_TITLE}\n"):
                refuse_existing(Path(output), option="--output")
            write_atomic(Path(output), markdown(entries))
            console.print(f"wrote {output}", markup=False, soft_wrap=True)
    if broken:
        raise SystemExit(1)


def _show_run(entry: Entry, console: Console) -> None:
    """Prints the paths of the samples and of the TensorBoard log of a record's run."""
    if entry.samples.is_file():
        print_line(console, f"samples: {entry.samples}")
    if entry.record.images is None:
        print_line(console, f"tensorboard --logdir {entry.path.parent.parent}")


def _show_hidden(
    console: Console, chosen: list[Entry], groups: list[list[Entry]], newest: Entry | None, wide: bool
) -> None:
    """Prints one line with the number of hidden rows and tables and the options that show them."""
    rows = 0 if wide else len(chosen) - len([i for i in short_rows(chosen, newest) if i is not None])
    others = [group[0].record for group in groups if group is not chosen]
    dataset = chosen[0].record.dataset.name
    names = ", ".join(dict.fromkeys(r.protocol.name if r.dataset.name == dataset else r.dataset.name for r in others))
    hidden = [f"{rows} more rows"] * (rows > 0)
    hidden += [f"{len(others)} more table{'s' * (len(others) > 1)} ({names})"] * bool(others)
    hints = ["--wide: every column"] * (not wide) + [f"--all: {' and '.join(hidden)}"] * bool(hidden)
    if hints:
        console.print(Text("  ".join(hints), style="dim"), no_wrap=True, overflow="ellipsis")


def print_line(console: Console, line: str) -> None:
    """Prints a line verbatim, without wrapping, so that it can be copied."""
    console.print(line, markup=False, soft_wrap=True, highlight=False)


def show_result(entry: Entry, console: Console) -> None:
    """Prints metrics and cost of a record, and the paths of its run folder, record file and sample grid."""
    record, row = entry.record, table_rows([entry])[0]
    names = list(row)[3 : list(row).index("T")]
    values = [f"{name} {row[name]}" for name in names]
    if record.cost is not None:
        values += [f"{row['NFE']} NFE", f"{row['mJ']} mJ"]
    if record.cost is not None and record.cost.firing_rate is not None:
        values.insert(len(names), f"T {row['T']}, rate {row['Rate']}")
    title = f"{table_title(entry)}{'' if entry.is_ranked else f' ({entry.status}, not ranked)'}"
    sentence = f"{title}: {', '.join(value.replace(' ', NO_BREAK) for value in values)}"
    print_line(console, textwrap.fill(sentence, console.width).replace(NO_BREAK, " "))
    for note in _notes([entry]):
        console.print(Text(note, style="dim"))
    run = entry.path.parent.parent
    for line in (f"in {run}:", f"  {entry.path.relative_to(run)}", f"  {entry.samples.relative_to(run)}"):
        print_line(console, line)


def show_records(records: Iterable[tuple[Path, Record]], console: Console) -> None:
    """Prints all tables of the records, which are passed as `(file, record)` pairs."""
    for group in tables(records):
        _print_wide(console, group)


def markdown(records: Iterable[tuple[Path, Record]]) -> str:
    """Returns all tables of the records, passed as `(file, record)` pairs, as deterministic Markdown."""
    lines = [_TITLE, "", "Measured results, rendered from records. Drafts have too few samples to rank."]
    for group in tables(records):
        rows = table_rows(group)
        lines += ["", f"## {escape(table_title(group[0]))}", "", escape(table_provenance(group[0])), ""]
        lines += [markdown_line(map(label, rows[0])), markdown_line("---" for _ in rows[0])]
        lines += [markdown_line(map(str, row.values())) for row in rows]
        lines += [part for note in _notes(group) for part in ("", escape(note))]
    return "\n".join(lines) + "\n"


def tables(records: Iterable[tuple[Path, Record]]) -> list[list[Entry]]:
    """Groups comparable records, each group sorted as its table: by status, then by Fréchet distance."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    entries = [Entry(path, record) for path, record in records]
    for entry in sorted(entries, key=lambda e: (STATUSES.index(e.status), e.frechet, e.path.name)):
        groups.setdefault(entry.table_key, []).append(entry)
    return [groups[key] for key in sorted(groups)]


def table_rows(group: list[Entry]) -> list[dict[str, Cell]]:
    """Returns one row per entry, as cells by column; all rows have the same columns."""
    keys = table_metrics(key for entry in group for key in entry.record.metrics)
    return [
        {"#": _rank(i, entry), **_cells(entry, keys), "Record": Cell(entry.path.name)} for i, entry in enumerate(group)
    ]


def metric_name(key: str) -> str:
    """Returns the column header of a metric; for shares of images without the extractor, shared by the table."""
    for start, name in _SHARES.items():
        if key.startswith(start):
            return name
    return _HEADERS.get(key, key)


def label(column: str) -> str:
    """Returns the header of a column in pages and files."""
    return LABELS.get(column, column)


def _rank(position: int, entry: Entry) -> Cell:
    if not entry.is_ranked:
        return Cell(entry.status)
    return Cell(str(position + 1), position + 1) if math.isfinite(entry.frechet) else Cell("-")


def _cells(entry: Entry, keys: list[str]) -> dict[str, Cell]:
    record, cost = entry.record, entry.record.cost
    spiking = record.images is not None or (cost is not None and cost.firing_rate is not None)
    samples = max((v.num_samples for v in record.metrics.values()), default=0)
    seed = record.seeds.get("training")
    return {
        "Method": Cell(method_name(record), note="; ".join(row_notes(entry))),
        "Variant": Cell(record.variant),
        **{metric_name(key): metric_cell(key, record.metrics.get(key)) for key in keys},
        "T": Cell(str(record.num_steps), record.num_steps) if spiking and record.num_steps else Cell("-"),
        "Rate": number_cell(cost.firing_rate if cost else None),
        "Solver": Cell(record.solver or "-"),
        "NFE": Cell("-") if record.nfe is None else Cell(str(record.nfe), record.nfe),
        "G SOPs": number_cell(cost.sops / 1e9 if cost else None),
        "mJ": number_cell(cost.energy_strict_mj if cost else None)._replace(note=incomplete_cost(cost)),
        "M params": number_cell(cost.parameters / 1e6 if cost else None),
        "Images/s": number_cell(cost.images_per_second if cost else None),
        "Samples": Cell(f"{samples:,}", samples),
        "Seed": Cell("-" if seed is None else str(seed), seed),
        "Repeated": Cell("-" if entry.verified is None else entry.verified.created[:10]),
    }


def incomplete_cost(cost: Cost | None) -> str:
    """Returns a note on products that the cost lacks; empty if it is complete."""
    names = ", ".join((cost and cost.incomplete) or ())
    return f"the cost is a lower bound: it lacks the products of {names}, which cannot be counted" if names else ""


def metric_cell(key: str, metric: MetricValue | None) -> Cell:
    """Formats a metric with the decimals of `uncertain_cell`."""
    if metric is None:
        return Cell("-")
    value, uncertainty = metric.value * _SCALE.get(key, 1), metric.uncertainty * _SCALE.get(key, 1)
    return uncertain_cell(value, uncertainty, metric.note)


def uncertain_cell(value: float, uncertainty: float, note: str = "") -> Cell:
    """Formats a number with as many decimals as show two significant digits of its uncertainty."""
    decimals = min(6, max(0, 1 - math.floor(math.log10(uncertainty)))) if uncertainty > 0 else 3
    return Cell(f"{value:.{decimals}f}", value, f"{uncertainty:.{decimals}f}", note)


def plus_minus(value: float, spread: float | None = None) -> str:
    """Formats a distance and its uncertainty or spread, if there is one, with two decimals each."""
    return f"{value:.2f}" if spread is None else f"{value:.2f} ±{spread:.2f}"


def number_cell(value: float | None) -> Cell:
    """Formats a number with three significant digits, or as an integer from 100 on."""
    if value is None:
        return Cell("-")
    return Cell(f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}", value)


def table_title(entry: Entry) -> str:
    """Returns the title of the table of an entry: dataset and protocol."""
    return f"{entry.record.dataset.name}, {entry.record.protocol.name}"


def table_provenance(entry: Entry) -> str:
    """Returns one line on the reference data, extractor and protocol of the table of an entry."""
    r = entry.record
    successor = f", superseded by {entry.superseded_by}" if entry.superseded_by else ""
    return (
        f"Reference: {r.dataset.fingerprint[:12]} from {r.dataset.source}. Extractor: {r.extractor.name} "
        f"({r.extractor.sha256[:8]}). Protocol: {r.protocol.sha256[:8]}{successor}. mJ: MACs and "
        "accumulates per image at 45 nm, strict count, without memory access."
    )


def row_notes(entry: Entry) -> list[str]:
    """Returns the footnotes of a whole row: of its method, and of what keeps it from being ranked."""
    record = entry.record
    notes = status_notes(entry)
    if record.code.external:
        notes.append(f"external code: {', '.join(f'{name} {code}' for name, code in record.code.external.items())}.")
    return notes + ([method_note(record)] if record.images is None and method_note(record) else [])


def method_note(record: Record) -> str:
    """Returns the footnote of the method of a record, or nothing."""
    notes = [METHOD_NOTES.get(record.method, ""), CONDITIONAL_NOTE if record.conditional is not None else ""]
    return " ".join(filter(None, notes))


def status_notes(entry: Entry) -> list[str]:
    """Returns the footnotes on what keeps a row from being ranked."""
    record = entry.record
    notes = [f"transfer: {difference}." for difference in record.transfers]
    if (made := record.images) is not None:
        notes.append("images: made by other code, so that `leaderboard verify` cannot repeat them.")
        notes[-1] += f" {made.copies:,} of {made.count:,} repeat another one." * bool(made.copies)
        notes[-1] += " Their cost is as its authors state it." * (record.cost is not None)
    return notes


def _notes(group: list[Entry]) -> list[str]:
    notes = {v.note for entry in group for v in entry.record.metrics.values() if v.note}
    notes |= {note for entry in group for note in row_notes(entry)}
    notes |= {note for entry in group if (note := incomplete_cost(entry.record.cost))}
    return [f"* {note}" for note in sorted(notes)]


def _print_wide(console: Console, group: list[Entry]) -> None:
    """Prints the wide table: related cells are stacked (100 characters for a few metrics), files are listed below."""
    rows = table_rows(group)
    metrics = list(rows[0])[3 : list(rows[0]).index("T")]
    table = Table(
        title=Text(table_title(group[0])),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    pair = ("Prec.", "Recall")
    singles = [(m,) for m in metrics if m not in pair]
    stacks = [("#",), ("Method", "Variant"), *singles, *([pair] if set(pair) <= set(metrics) else []), *_STACKS]
    for stack in stacks:
        header = re.sub("_(?=[^_]+$)", "\n_", stack[0]) if len(stack) == 1 else "\n".join(stack)
        min_width = max(len(str(row["Method"])) for row in rows) if stack[0] == "Method" else None
        justify: Literal["left", "right"] = "left" if stack[0] in ("#", "Method") else "right"
        table.add_column(header, justify=justify, overflow="fold", min_width=min_width)
    for number, row in enumerate(rows, 1):
        row = row | {"File": Cell(f"[{number}]")}
        cells = ["\n".join(str(row[name]) for name in stack).replace(" ±", "\n±") for stack in stacks]
        last_ranked = group[number - 1].is_ranked and number < len(group) and not group[number].is_ranked
        table.add_row(*map(Text, cells), end_section=last_ranked)
    console.print(table)
    for line in (table_provenance(group[0]), *_notes(group), *(f"[{n}] {e.path}" for n, e in enumerate(group, 1))):
        console.print(Text(line, style="dim"), soft_wrap=True)
    console.print()


def short_rows(group: list[Entry], newest: Entry | None) -> list[int | None]:
    """Returns the indices of the rows of the short table; None marks a gap.

    They are the first rows, the newest run and its neighbours.
    """
    if len(group) <= SHORT_ROWS:
        return list(range(len(group)))
    index = group.index(newest) if newest in group else 0
    if index < SHORT_ROWS - 1:
        return [*range(SHORT_ROWS - 1), None]
    first, last = index - 1, min(index + 1, len(group) - 1)
    top = SHORT_ROWS - 1 - (last - first + 1) - (last < len(group) - 1)
    return [*range(top), None, *range(first, last + 1), *[None] * (last < len(group) - 1)]


def _print_short(console: Console, group: list[Entry], newest: Entry | None, every_row: bool) -> None:
    """Prints the short table, one line per row; marks the newest run and crops names that do not fit."""
    rows = table_rows(group)
    metrics = list(rows[0])[3 : list(rows[0]).index("T")][:1]
    numbers = [*metrics, "T", "Rate", "NFE", "mJ", "Seed"]
    title = table_title(group[0]) + (f": best {metrics[0]} first" if math.isfinite(group[0].frechet) else "")
    title += ", > is the newest run" if newest in group else ""
    console.print(Text(title, style="italic"), no_wrap=True, overflow="ellipsis")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("Method")
    for name in numbers:
        table.add_column(Text(name), justify="right", no_wrap=True)
    notes: list[str] = []
    for index in range(len(group)) if every_row else short_rows(group, newest):
        if index is None:
            table.add_row("...")
            continue
        row, marked = rows[index], group[index] == newest
        cells = [
            f"{'> ' if marked else ''}{row['#']}",
            entry_name(group[index].record),
            *(str(row[n]) for n in numbers),
        ]
        table.add_row(*(Text(c, no_wrap=True, overflow="ellipsis") for c in cells), style="bold" if marked else None)
        found = [*(row[name].note for name in metrics), *status_notes(group[index])]
        notes += [note for note in found if note not in ("", *notes)]
    console.print(table)
    for note in notes:
        console.print(Text(f"* {note}", style="dim"))


def entry_name(record: Record) -> str:
    """Returns method, variant and the mark of code outside the suite on one line."""
    named = record.variant not in ("", "default")
    parts = [method_name(record), *[record.variant] * named, *["external code"] * bool(record.code.external)]
    return " ".join(", ".join(parts).split())


def method_name(record: Record) -> str:
    """Returns the method, marked if it is conditional, with the scale of guidance unless that is off."""
    if record.conditional is None:
        return record.method
    scale = "" if record.conditional == 1 else f", guidance {record.conditional:g}"
    return f"{record.method} (conditional{scale})"


def markdown_line(cells: Iterable[str]) -> str:
    """Returns a row of a Markdown table."""
    return "| " + " | ".join(map(escape, cells)) + " |"


def escape(text: str) -> str:
    """Escapes text for Markdown and collapses whitespace."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))
