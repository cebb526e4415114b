"""Tables of the leaderboard, rendered from records for the terminal and as Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leaderboard.records import MetricValue, Record, RecordError, find_records, read_record, write_atomic

_HEADERS = {
    "fid": "FID",
    "kid_mean": "1000 KID",
    "is_mean": "IS",
    "reconstruction_mse": "Rec. MSE",
    "reconstruction_ssim": "Rec. SSIM",
}
_SCALE = {"kid_mean": 1000.0}
_STACKS = (("T", "Rate"), ("Solver", "NFE"), ("G SOPs", "mJ"), ("M params", "Images/s"), ("Samples", "File"))


@dataclass(frozen=True)
class Entry:
    """A record and the file it came from."""

    path: Path
    record: Record

    @property
    def frechet(self) -> float:
        """The Fréchet distance that ranks the entry, infinite if it was not measured."""
        return min((v.value for key, v in self.record.metrics.items() if _kind(key) == 0), default=math.inf)

    @property
    def table_key(self) -> tuple[str, ...]:
        """What entries must share to be comparable: data, protocol and weights of the extractor."""
        r = self.record
        return (r.dataset.name, r.protocol.name, r.protocol.sha256, r.dataset.fingerprint, r.extractor.sha256)


def leaderboard(records: list[str] = ["runs"], output: str | None = None) -> None:  # noqa: B006 (never changed)
    """Shows every record as tables, one per dataset and protocol, best Fréchet distance first and drafts last.

    Args:
        records: Folders to search, each for its own `*.json` and those of any `records` folder below it.
        output: Markdown file to write the same tables to.

    Raises:
        SystemExit: If a record is broken; the others are shown all the same.
    """
    console = Console()
    entries, broken = _read(records)
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
        _show_run(max(entries, key=lambda entry: entry[1].created)[0], console)
        if output is not None:
            write_atomic(Path(output), markdown(entries))
            console.print(f"wrote {output}", markup=False, soft_wrap=True)
    if broken:
        raise SystemExit(1)


def _show_run(record: Path, console: Console) -> None:
    """Says where the samples and the TensorBoard log of the run behind a record lie, if it lies in one."""
    run = record.parent.parent
    samples = run / "samples" / f"{record.stem}.png"
    if samples.is_file():
        console.print(f"newest run:\n  samples:     {samples}", markup=False, soft_wrap=True, highlight=False)
        console.print(f"  tensorboard: tensorboard --logdir {run}", markup=False, soft_wrap=True, highlight=False)


def show_records(records: Iterable[tuple[Path, Record]], console: Console) -> None:
    """Prints the tables of records, each given with its file."""
    for group in _tables(records):
        _print(console, group)


def markdown(records: Iterable[tuple[Path, Record]]) -> str:
    """Returns the tables of records, each given with its file, as Markdown: the same text for the same records."""
    lines = ["# Leaderboard", "", "Measured results, rendered from records. Drafts have too few samples to rank."]
    for group in _tables(records):
        rows = _rows(group)
        lines += ["", f"## {_escape(_title(group[0]))}", "", _escape(_provenance(group[0])), ""]
        lines += [_line(rows[0].keys()), _line("---" for _ in rows[0])]
        lines += [_line(row.values()) for row in rows]
        lines += [part for note in _notes(group) for part in ("", _escape(note))]
    return "\n".join(lines) + "\n"


def _read(folders: list[str]) -> tuple[list[tuple[Path, Record]], list[str]]:
    entries, broken = [], []
    for path in find_records(folders):
        try:
            entries.append((path, read_record(path)))
        except RecordError as error:
            broken.append(str(error))
    return entries, broken


def _tables(records: Iterable[tuple[Path, Record]]) -> list[list[Entry]]:
    """Groups comparable entries, each group in the order of its table."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    entries = [Entry(path, record) for path, record in records]
    for entry in sorted(entries, key=lambda e: (e.record.draft, e.frechet, e.path.name)):
        groups.setdefault(entry.table_key, []).append(entry)
    return [groups[key] for key in sorted(groups)]


def _rows(group: list[Entry]) -> list[dict[str, str]]:
    """Returns the cells of each entry by column; all entries have the same columns."""
    keys = sorted({key for entry in group for key in entry.record.metrics}, key=lambda key: (_kind(key), key))
    return [{"#": _rank(i, entry), **_cells(entry, keys), "Record": entry.path.name} for i, entry in enumerate(group)]


def _rank(position: int, entry: Entry) -> str:
    if entry.record.draft:
        return "draft"
    return str(position + 1) if math.isfinite(entry.frechet) else "-"


def _cells(entry: Entry, keys: list[str]) -> dict[str, str]:
    record, cost = entry.record, entry.record.cost
    return {
        "Method": record.method,
        "Variant": record.variant,
        **{_header(key): _metric(record.metrics.get(key), _SCALE.get(key, 1)) for key in keys},
        "T": "-" if cost.firing_rate is None else str(record.num_steps),
        "Rate": _number(cost.firing_rate),
        "Solver": record.solver,
        "NFE": str(record.nfe),
        "G SOPs": _number(cost.sops / 1e9),
        "mJ": _number(cost.energy_strict_mj),
        "M params": _number(cost.parameters / 1e6),
        "Images/s": _number(cost.images_per_second),
        "Samples": f"{max((v.num_samples for v in record.metrics.values()), default=0):,}",
    }


def _header(key: str) -> str:
    """Name of a metric's column; precision and recall go without the extractor, which all entries of a table share."""
    for start, name in (("precision", "Prec."), ("recall", "Recall")):
        if key.startswith(start):
            return name
    return _HEADERS.get(key, key)


def headline(record: Record) -> tuple[str, MetricValue]:
    """Returns the metric that ranks a record, with its key: the Fréchet distance where it was measured."""
    key = min(record.metrics, key=lambda key: (_kind(key), key))
    return key, record.metrics[key]


def _kind(key: str) -> int:
    """Order of the metrics: Fréchet, kernel, Inception score, others."""
    patterns = ("fid|fid_.*|fd_.*", "kid_mean|kd_.*", "is_.*", ".*")
    return next(i for i, pattern in enumerate(patterns) if re.fullmatch(pattern, key))


def _metric(metric: MetricValue | None, scale: float) -> str:
    if metric is None:
        return "-"
    value, uncertainty = metric.value * scale, metric.uncertainty * scale
    decimals = min(6, max(0, 1 - math.floor(math.log10(uncertainty)))) if uncertainty > 0 else 3
    return f"{value:.{decimals}f}{'*' if metric.note else ''} ±{uncertainty:.{decimals}f}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _title(entry: Entry) -> str:
    return f"{entry.record.dataset.name}, {entry.record.protocol.name}"


def _provenance(entry: Entry) -> str:
    r = entry.record
    return (
        f"Reference: {r.dataset.fingerprint[:12]} from {r.dataset.source}. Extractor: {r.extractor.name} "
        f"({r.extractor.sha256[:8]}). Protocol: {r.protocol.sha256[:8]}. mJ: energy per image at 45 nm, strict count."
    )


def _notes(group: list[Entry]) -> list[str]:
    notes = {v.note for entry in group for v in entry.record.metrics.values() if v.note}
    return [f"* {note}" for note in sorted(notes)]


def _print(console: Console, group: list[Entry]) -> None:
    """Prints a table for 100 columns: related cells stand above each other, files in a list below."""
    rows = _rows(group)
    metrics = list(rows[0])[3 : list(rows[0]).index("T")]
    table = Table(
        title=Text(_title(group[0])), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True
    )
    pair = ("Prec.", "Recall")
    alone = [(m,) for m in metrics if m not in pair]
    stacks = [("#",), ("Method", "Variant"), *alone, *([pair] if set(pair) <= set(metrics) else []), *_STACKS]
    for stack in stacks:
        header = re.sub("_(?=[^_]+$)", "\n_", stack[0]) if len(stack) == 1 else "\n".join(stack)
        least = max(len(row["Method"]) for row in rows) if stack[0] == "Method" else None
        justify: Literal["left", "right"] = "left" if stack[0] in ("#", "Method") else "right"
        table.add_column(header, justify=justify, overflow="fold", min_width=least)
    for number, row in enumerate(rows, 1):
        row = row | {"File": f"[{number}]"}
        cells = ["\n".join(row[name] for name in stack).replace(" ±", "\n±") for stack in stacks]
        table.add_row(*map(Text, cells))
    console.print(table)
    for line in (_provenance(group[0]), *_notes(group), *(f"[{n}] {e.path}" for n, e in enumerate(group, 1))):
        console.print(Text(line, style="dim"), soft_wrap=True)
    console.print()


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(_escape, cells)) + " |"


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))
