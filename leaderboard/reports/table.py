"""Tables of the leaderboard, rendered from records for the terminal and as Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leaderboard.files import write_atomic
from leaderboard.record.entries import RECORDS, Entry, order_metrics, read_records
from leaderboard.record.records import MetricValue, Record
from leaderboard.reports.terminal import terminal

_HEADERS = {
    "fid": "FID",
    "kid_mean": "1000 KID",
    "is_mean": "IS",
    "reconstruction_mse": "Rec. MSE",
    "reconstruction_ssim": "Rec. SSIM",
}
METHOD_NOTES = {
    "sdit": "SDiT: the suite's own, fully spiking design after the paper's text, not the network of the public code "
    "(https://github.com/foolLain/SDiT).",
}
"""What a reader should know about a method, by its name in records."""
LABELS = {"mJ": "45 nm arithmetic, mJ"}
"""Column headers of pages and files, where the terminal has a shorter one."""
_SCALE = {"kid_mean": 1000.0}
_STACKS = (
    ("T", "Rate"),
    ("Solver", "NFE", "Repeated"),
    ("G SOPs", "mJ"),
    ("M params", "Images/s"),
    ("Samples", "Seed", "File"),
)


class Cell(NamedTuple):
    """What a table shows in one place.

    Args:
        text: The value as text.
        value: The value as a number, if it is one; absent values have none.
        uncertainty: The uncertainty as text, if the value has one.
        note: What a reader should know about the value.
    """

    text: str
    value: float | None = None
    uncertainty: str = ""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.text}{'*' if self.note else ''}{f' ±{self.uncertainty}' if self.uncertainty else ''}"


def leaderboard(records: list[str] = ["runs", RECORDS], output: str | None = None) -> None:  # noqa: B006 (never changed)
    """Shows every record as tables, one per dataset and protocol, best Fréchet distance first and drafts last.

    Args:
        records: Folders to search, each for its own `*.json` and those of any `records` folder below it.
        output: Markdown file to write the same tables to.

    Raises:
        SystemExit: If a record is broken; the others are shown all the same.
    """
    console = terminal()
    entries, broken = read_records(records)
    for message in broken:
        console.print(Text(f"skipped: {message}", style="red"), soft_wrap=True)
    if not entries:
        console.print(
            f"No records under {', '.join(records)}. An evaluation writes one: python -m benchmark test --config "
            "configs/<method>_<dataset>.yaml --ckpt_path <checkpoint>",
            markup=False,
            soft_wrap=True,
        )
    else:
        show_records(entries, console)
        _show_run(Entry(*max(entries, key=lambda entry: entry[1].created)), console)
        if output is not None:
            write_atomic(Path(output), markdown(entries))
            console.print(f"wrote {output}", markup=False, soft_wrap=True)
    if broken:
        raise SystemExit(1)


def _show_run(entry: Entry, console: Console) -> None:
    """Says where the samples and the TensorBoard log of the run behind a record lie, if it lies in one."""
    if entry.samples.is_file():
        run = entry.path.parent.parent
        console.print(f"newest run:\n  samples:     {entry.samples}", markup=False, soft_wrap=True, highlight=False)
        console.print(f"  tensorboard: tensorboard --logdir {run}", markup=False, soft_wrap=True, highlight=False)


def show_records(records: Iterable[tuple[Path, Record]], console: Console) -> None:
    """Prints the tables of records, each given with its file."""
    for group in tables(records):
        _print(console, group)


def markdown(records: Iterable[tuple[Path, Record]]) -> str:
    """Returns the tables of records, each given with its file, as Markdown: the same text for the same records."""
    lines = ["# Leaderboard", "", "Measured results, rendered from records. Drafts have too few samples to rank."]
    for group in tables(records):
        rows = table_rows(group)
        lines += ["", f"## {escape(table_title(group[0]))}", "", escape(table_provenance(group[0])), ""]
        lines += [markdown_line(map(label, rows[0])), markdown_line("---" for _ in rows[0])]
        lines += [markdown_line(map(str, row.values())) for row in rows]
        lines += [part for note in _notes(group) for part in ("", escape(note))]
    return "\n".join(lines) + "\n"


def tables(records: Iterable[tuple[Path, Record]]) -> list[list[Entry]]:
    """Groups comparable entries, each group in the order of its table."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    entries = [Entry(path, record) for path, record in records]
    for entry in sorted(entries, key=lambda e: (e.record.draft, e.frechet, e.path.name)):
        groups.setdefault(entry.table_key, []).append(entry)
    return [groups[key] for key in sorted(groups)]


def table_rows(group: list[Entry]) -> list[dict[str, Cell]]:
    """Returns the cells of each entry by column; all entries of a table have the same columns."""
    keys = order_metrics(key for entry in group for key in entry.record.metrics)
    return [
        {"#": _rank(i, entry), **_cells(entry, keys), "Record": Cell(entry.path.name)} for i, entry in enumerate(group)
    ]


def metric_name(key: str) -> str:
    """Returns the column header of a metric; precision and recall go without the extractor, which a table shares."""
    for start, name in (("precision", "Prec."), ("recall", "Recall")):
        if key.startswith(start):
            return name
    return _HEADERS.get(key, key)


def label(column: str) -> str:
    """Returns the header of a column in pages and files."""
    return LABELS.get(column, column)


def _rank(position: int, entry: Entry) -> Cell:
    if entry.record.draft:
        return Cell("draft")
    return Cell(str(position + 1), position + 1) if math.isfinite(entry.frechet) else Cell("-")


def _cells(entry: Entry, keys: list[str]) -> dict[str, Cell]:
    record, cost = entry.record, entry.record.cost
    samples = max((v.num_samples for v in record.metrics.values()), default=0)
    seed = record.seeds.get("training")
    return {
        "Method": Cell(record.method, note=METHOD_NOTES.get(record.method, "")),
        "Variant": Cell(record.variant),
        **{metric_name(key): metric_cell(key, record.metrics.get(key)) for key in keys},
        "T": Cell("-") if cost.firing_rate is None else Cell(str(record.num_steps), record.num_steps),
        "Rate": number_cell(cost.firing_rate),
        "Solver": Cell(record.solver),
        "NFE": Cell(str(record.nfe), record.nfe),
        "G SOPs": number_cell(cost.sops / 1e9),
        "mJ": number_cell(cost.energy_strict_mj),
        "M params": number_cell(cost.parameters / 1e6),
        "Images/s": number_cell(cost.images_per_second),
        "Samples": Cell(f"{samples:,}", samples),
        "Seed": Cell("-" if seed is None else str(seed), seed),
        "Repeated": Cell("-" if entry.verified is None else entry.verified.created[:10]),
    }


def metric_cell(key: str, metric: MetricValue | None) -> Cell:
    """Shows a metric with as many decimals as its uncertainty asks for."""
    if metric is None:
        return Cell("-")
    value, uncertainty = metric.value * _SCALE.get(key, 1), metric.uncertainty * _SCALE.get(key, 1)
    return uncertain_cell(value, uncertainty, metric.note)


def uncertain_cell(value: float, uncertainty: float, note: str = "") -> Cell:
    """Shows a number with as many decimals as two digits of its uncertainty have."""
    decimals = min(6, max(0, 1 - math.floor(math.log10(uncertainty)))) if uncertainty > 0 else 3
    return Cell(f"{value:.{decimals}f}", value, f"{uncertainty:.{decimals}f}", note)


def number_cell(value: float | None) -> Cell:
    """Shows a number with three digits, or whole if large."""
    if value is None:
        return Cell("-")
    return Cell(f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}", value)


def table_title(entry: Entry) -> str:
    """Names the table that an entry stands in."""
    return f"{entry.record.dataset.name}, {entry.record.protocol.name}"


def table_provenance(entry: Entry) -> str:
    """Says what the entries of a table were compared with."""
    r = entry.record
    return (
        f"Reference: {r.dataset.fingerprint[:12]} from {r.dataset.source}. Extractor: {r.extractor.name} "
        f"({r.extractor.sha256[:8]}). Protocol: {r.protocol.sha256[:8]}. mJ: MACs and "
        "accumulates per image at 45 nm, strict count, without memory access."
    )


def _notes(group: list[Entry]) -> list[str]:
    notes = {v.note for entry in group for v in entry.record.metrics.values() if v.note}
    notes |= {METHOD_NOTES[entry.record.method] for entry in group if entry.record.method in METHOD_NOTES}
    return [f"* {note}" for note in sorted(notes)]


def _print(console: Console, group: list[Entry]) -> None:
    """Prints a table, of 100 columns for a few metrics: related cells stand above each other, files in a list below."""
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
    alone = [(m,) for m in metrics if m not in pair]
    stacks = [("#",), ("Method", "Variant"), *alone, *([pair] if set(pair) <= set(metrics) else []), *_STACKS]
    for stack in stacks:
        header = re.sub("_(?=[^_]+$)", "\n_", stack[0]) if len(stack) == 1 else "\n".join(stack)
        least = max(len(str(row["Method"])) for row in rows) if stack[0] == "Method" else None
        justify: Literal["left", "right"] = "left" if stack[0] in ("#", "Method") else "right"
        table.add_column(header, justify=justify, overflow="fold", min_width=least)
    for number, row in enumerate(rows, 1):
        row = row | {"File": Cell(f"[{number}]")}
        cells = ["\n".join(str(row[name]) for name in stack).replace(" ±", "\n±") for stack in stacks]
        table.add_row(*map(Text, cells))
    console.print(table)
    for line in (table_provenance(group[0]), *_notes(group), *(f"[{n}] {e.path}" for n, e in enumerate(group, 1))):
        console.print(Text(line, style="dim"), soft_wrap=True)
    console.print()


def markdown_line(cells: Iterable[str]) -> str:
    """Returns a line of a Markdown table."""
    return "| " + " | ".join(map(escape, cells)) + " |"


def escape(text: str) -> str:
    """Escapes text for Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))
