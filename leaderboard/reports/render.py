"""`python -m benchmark leaderboard render`: records and published results as HTML, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from leaderboard.energy import read_models
from leaderboard.files import is_report, refuse_existing, write_atomic
from leaderboard.record.entries import Entry, read_records
from leaderboard.record.records import Record, record_json
from leaderboard.reports.boards import UNKNOWN, Row, published_boards
from leaderboard.reports.energies import COLUMNS as ENERGY_COLUMNS
from leaderboard.reports.energies import energy, energy_columns
from leaderboard.reports.methods import Method, ranks, tables
from leaderboard.reports.page import render_page
from leaderboard.reports.published import Published, PublishedResult, read_published
from leaderboard.reports.statistics import half_width
from leaderboard.reports.table import escape, markdown, markdown_line
from leaderboard.reports.terminal import terminal

COLUMNS = [
    "source",
    "dataset",
    "protocol",
    "protocol_sha256",
    "rank_first",
    "rank_last",
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
    *ENERGY_COLUMNS,
    "energy_published_mj",
    "parameters",
    "parameters_m_published",
    "images_per_second",
    "resolution",
    "training_seed",
    "record",
    "repeated",
    "verified",
    "verified_by",
    "reproduced",
    "citation",
    "url",
    "table",
    "also_in",
    "note",
]
"""Columns of the CSV file, which has one line per metric of a record or published result; missing values are empty.

`uncertainty` is the standard error of the evaluation as recorded.
"""


def render(records: list[str] | None = None, output: str = "build/leaderboard") -> None:
    """Writes the leaderboard as `index.html`, `leaderboard.md`, `leaderboard.csv` and `leaderboard.json`.

    Args:
        records: Folders to search for `*.json`, directly and in any `records` folder below; null searches runs/ and
            the project's records, which come with the package.
        output: Output folder.

    Raises:
        SystemExit: If a record is broken; the others are still rendered.
        FileExistsError: If the folder contains files of these names, but not of an earlier leaderboard.
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
    if not is_report(folder / "leaderboard.csv", ",".join(COLUMNS[:3])):
        refuse_existing(*(folder / name for name in contents), option="--output")
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
        for method, rank in zip(group, ranks(group), strict=True):
            for entry in method.entries:
                for key, metric in sorted(entry.record.metrics.items()):
                    value = {"metric": key, "value": metric.value, "uncertainty": metric.uncertainty}
                    value |= {"num_samples": metric.num_samples, "note": metric.note}
                    writer.writerow(_escape_formulas(_measured_columns(entry, rank) | value))
    for result in published.results:
        for key, number in result.metrics.items():
            writer.writerow(_escape_formulas(_published_columns(result, published) | {"metric": key, "value": number}))
    return text.getvalue()


def _measured_columns(entry: Entry, rank: tuple[int, int] | None) -> dict[str, Any]:
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
        "source": entry.status,
        "dataset": record.dataset.name,
        "protocol": record.protocol.name,
        "protocol_sha256": record.protocol.sha256,
        "rank_first": rank[0] if rank else None,
        "rank_last": rank[1] if rank else None,
        "method": record.method,
        "variant": record.variant,
        "conditional": record.conditional,
        "num_steps": None if cost is None or cost.firing_rate is None else record.num_steps,
        "solver": record.solver,
        "nfe": record.nfe,
        "training_seed": record.seeds.get("training"),
        "record": entry.path.name,
        "repeated": _day(entry.repeated),
        "verified": max(map(_day, entry.verified.values()), default=None),
        "verified_by": "; ".join(entry.verified),
        "url": record.images.url if record.images else None,
        **{name: getattr(cost, name, None) for name in same},
        **energy_columns(cost),
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
        "reproduced",
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


def _day(record: Record | None) -> str:
    """Returns the date (ISO 8601) of a repetition; empty if there is none."""
    return "" if record is None else record.created[:10]


def to_json(records: Iterable[tuple[Path, Record]], published: Published) -> str:
    """Returns all results as one JSON object: methods over their seeds, and the complete records."""
    measured = [
        {
            "dataset": group[0].record.dataset.name,
            "protocol": group[0].record.protocol.name,
            "methods": [_json(method, rank) for method, rank in zip(group, ranks(group), strict=True)],
        }
        for group in tables(records)
    ]
    return json.dumps({"measured": measured, "published": asdict(published)}, indent=2, sort_keys=True) + "\n"


def _json(method: Method, rank: tuple[int, int] | None) -> dict[str, Any]:
    keys = sorted({key for entry in method.entries for key in entry.record.metrics})
    values = {key: list(method.values(key).values()) for key in keys}
    return {
        "name": method.name,
        "rank": rank,
        "seeds": len(method.entries),
        "energy_mj": {name: energy(method, model) for name, model in read_models().items()},
        "metrics": {
            key: {"mean": statistics.fmean(found), "half_width_95": half_width(found), "seeds": len(found)}
            for key, found in values.items()
        },
        "entries": [
            {
                "file": entry.path.name,
                "record": record_json(entry.record),
                "repeated": _day(entry.repeated) or None,
                "verified": {name: _day(record) for name, record in entry.verified.items()},
            }
            for entry in method.entries
        ],
    }
