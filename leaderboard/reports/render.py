"""`python -m benchmark leaderboard render`: records and published results as HTML, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from leaderboard.files import write_atomic
from leaderboard.record.entries import RECORDS, Entry, read_records
from leaderboard.record.records import Record, record_data
from leaderboard.reports.boards import UNKNOWN, Row, published_boards
from leaderboard.reports.page import render_page
from leaderboard.reports.published import Published, PublishedResult, read_published
from leaderboard.reports.table import escape, markdown, markdown_line, tables
from leaderboard.reports.terminal import terminal

COLUMNS = [
    "source",
    "dataset",
    "protocol",
    "protocol_sha256",
    "rank",
    "method",
    "variant",
    "conditional",
    "kind",
    "metric",
    "value",
    "uncertainty",
    "num_samples",
    "num_steps",
    "solver",
    "nfe",
    "sampling_steps",
    "firing_rate",
    "sops",
    "macs",
    "acs",
    "energy_strict_mj",
    "energy_paper_mj",
    "energy_published_mj",
    "parameters",
    "parameters_m_published",
    "images_per_second",
    "resolution",
    "record",
    "verified",
    "citation",
    "url",
    "table",
    "also_in",
    "note",
]
"""Columns of the CSV file, which has one line per metric value; missing values are empty."""


def render(records: list[str] = ["runs", RECORDS], output: str = "build/leaderboard") -> None:  # noqa: B006 (never changed)
    """Writes the leaderboard as `index.html`, `leaderboard.md`, `leaderboard.csv` and `leaderboard.json`.

    Args:
        records: Folders to search for `*.json`, directly and in any `records` folder below.
        output: Output folder.

    Raises:
        SystemExit: If a record is broken; the others are still rendered.
    """
    console = terminal()
    entries, broken = read_records(records)
    published = read_published()
    for message in broken:
        console.print(Text(f"skipped: {message}", style="red"), soft_wrap=True)
    folder = Path(output)
    contents = {
        "index.html": render_page(entries, published),
        "leaderboard.md": f"{markdown(entries)}\n{published_markdown(published)}",
        "leaderboard.csv": to_csv(entries, published),
        "leaderboard.json": to_json(entries, published),
    }
    for name, text in contents.items():
        write_atomic(folder / name, text.encode("utf-8", "replace").decode())  # JSON text may contain lone surrogates
    counts = f"{len(entries)} records and {len(published.results)} published results"
    for line in (f"{counts} as {', '.join(contents)}", f"page: {folder / 'index.html'}"):
        console.print(line, markup=False, soft_wrap=True, highlight=False)
    if broken:
        raise SystemExit(1)


def published_markdown(published: Published) -> str:
    """Returns the published results as Markdown, one unranked table per dataset and protocol."""
    lines = ["# Published numbers", "", "As printed by their sources, each under its own protocol; never ranked among "]
    lines[-1] += f"measured results. Their uncertainty is not known (±{UNKNOWN})."
    for board in published_boards(published):
        lines += ["", f"## {escape(board.title)} (published)", "", escape(board.lead), ""]
        lines += [markdown_line(board.rows[0].cells), markdown_line("---" for _ in board.rows[0].cells)]
        lines += [markdown_line(_with_footnotes(row, board.marks(row))) for row in board.rows]
        if board.footnotes:
            lines += ["", *(f"{n}. {escape(note)}" for n, note in enumerate(board.footnotes, 1))]
    lines += ["", "## Sources", ""]
    lines += [
        f"- {escape(s.name)}: {escape(s.citation)}{f', <{s.url}>' if s.url else ''}" for s in published.sources.values()
    ]
    return "\n".join(lines) + "\n"


def _with_footnotes(row: Row, notes: list[int]) -> Iterable[str]:
    """Returns the cells of a row, with the numbers of its footnotes after the method."""
    marks = f" ({', '.join(map(str, notes))})" if notes else ""
    return [f"{cell}{marks if name == 'Method' else ''}" for name, cell in row.cells.items()]


def to_csv(records: Iterable[tuple[Path, Record]], published: Published) -> str:
    """Returns all measured and published results as CSV, one line per metric value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for group in tables(records):
        for position, entry in enumerate(group, 1):
            for key, metric in sorted(entry.record.metrics.items()):
                value = {"metric": key, "value": metric.value, "uncertainty": metric.uncertainty}
                value |= {"num_samples": metric.num_samples, "note": metric.note}
                writer.writerow(_escape_formulas(_measured_columns(entry, _rank(position, entry)) | value))
    for result in published.results:
        for key, number in result.metrics.items():
            writer.writerow(_escape_formulas(_published_columns(result, published) | {"metric": key, "value": number}))
    return text.getvalue()


def _rank(position: int, entry: Entry) -> int | None:
    return None if entry.record.draft or not math.isfinite(entry.frechet) else position


def _verified_day(entry: Entry) -> str | None:
    """Returns the date (ISO 8601) of a repetition that agreed, or None."""
    return None if entry.verified is None else entry.verified.created[:10]


def _measured_columns(entry: Entry, rank: int | None) -> dict[str, Any]:
    record, cost = entry.record, entry.record.cost
    same = [
        "firing_rate",
        "sops",
        "macs",
        "acs",
        "energy_strict_mj",
        "energy_paper_mj",
        "parameters",
        "images_per_second",
    ]
    return {
        "source": "draft" if record.draft else "measured",
        "dataset": record.dataset.name,
        "protocol": record.protocol.name,
        "protocol_sha256": record.protocol.sha256,
        "rank": rank,
        "method": record.method,
        "variant": record.variant,
        "conditional": record.conditional,
        "num_steps": None if cost.firing_rate is None else record.num_steps,
        "solver": record.solver,
        "nfe": record.nfe,
        "record": entry.path.name,
        "verified": _verified_day(entry),
        **{name: getattr(cost, name) for name in same},
    }


def _published_columns(result: PublishedResult, published: Published) -> dict[str, Any]:
    source = published.sources[result.source]
    same = [
        "dataset",
        "protocol",
        "method",
        "variant",
        "kind",
        "num_steps",
        "solver",
        "sampling_steps",
        "resolution",
        "table",
        "also_in",
    ]
    caveats = [published.caveats[name] for name in result.caveats]
    return {
        "source": "published",
        "energy_published_mj": result.energy_mj,
        "parameters_m_published": result.parameters_m,
        "citation": source.citation,
        "url": source.url,
        "note": " ".join([*([result.note] if result.note else []), *caveats]),
        **{name: getattr(result, name) for name in same},
    }


def _escape_formulas(columns: dict[str, Any]) -> dict[str, Any]:
    """Prefixes text that a spreadsheet would evaluate as a formula with an apostrophe."""
    dangerous = ("=", "+", "-", "@", "\t", "\r")
    return {k: f"'{v}" if isinstance(v, str) and v.startswith(dangerous) else v for k, v in columns.items()}


def to_json(records: Iterable[tuple[Path, Record]], published: Published) -> str:
    """Returns all results, including the complete records, as one JSON object."""
    measured = [
        {
            "dataset": group[0].record.dataset.name,
            "protocol": group[0].record.protocol.name,
            "entries": [
                {
                    "rank": _rank(position, entry),
                    "file": entry.path.name,
                    "record": record_data(entry.record),
                    "verified": _verified_day(entry),
                }
                for position, entry in enumerate(group, 1)
            ],
        }
        for group in tables(records)
    ]
    return json.dumps({"measured": measured, "published": asdict(published)}, indent=2, sort_keys=True) + "\n"
