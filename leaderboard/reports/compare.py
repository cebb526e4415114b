"""`python -m benchmark leaderboard compare`: differences between two records."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leaderboard.record.differences import Row, differences, provenance
from leaderboard.record.records import MetricValue, Record, read_record
from leaderboard.reports.terminal import terminal

_HIGHER_IS_BETTER = re.compile(r"(is|precision|recall|density|coverage|authenticity)(_.*)?|reconstruction_ssim")
_SHARED = ("dataset", "protocol", "protocol sha256", "data fingerprint", "extractor sha256")
"""Values shared by all records of one table (`leaderboard.record.entries.Entry.table_key`)."""


def compare(first: str, second: str) -> None:
    """Shows how two records differ in configuration, code, data, weights, cost and metrics.

    Args:
        first: First record file, A.
        second: Second record file, B.
    """
    a, b = read_record(first), read_record(second)
    console = terminal()
    for letter, path, record in (("A", first, a), ("B", second, b)):
        line = f"{letter}: {record.method} {record.variant}, {record.dataset.name}, {record.protocol.name}: {path}"
        console.print(Text(line), soft_wrap=True)
    for problem in incomparable(a, b):
        console.print(Text(f"warning: the metrics cannot be compared: {problem}", style="red"), soft_wrap=True)
    for title, rows in (
        ("configuration", differences(_flat(a.config), _flat(b.config))),
        ("code, data and weights", differences(provenance(a), provenance(b))),
        ("cost per image", _cost(a, b)),
    ):
        show(console, title, ("", "A", "B"), rows)
    show(console, "metrics", ("", "A", "B", "difference B - A", "better", "beyond 2 sigma"), _metrics(a, b))


def incomparable(a: Record, b: Record) -> list[str]:
    """Returns the reasons why the metrics of two records are not comparable; empty if they are."""
    first, second = provenance(a), provenance(b)
    problems = [f"{name} {x} against {y}" for name, x, y in differences(first, second) if name in _SHARED]
    counts = [max((m.num_samples for m in record.metrics.values()), default=0) for record in (a, b)]
    if counts[0] != counts[1]:
        problems.append(f"{counts[0]:,} generated images against {counts[1]:,}")
    return problems


def show(console: Console, title: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Prints a table, or "the same" if it has no rows."""
    rows = list(rows)
    if not rows:
        console.print(Text(f"{title}: the same"))
        return
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _flat(value: Any, name: str = "") -> dict[str, str]:
    return dict(_leaves(value, name))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yields dotted name and text of each leaf of a JSON value, with control characters escaped."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            key = key if key.isprintable() else json.dumps(key)
            yield from _leaves(item, f"{name}.{key}" if name else key)
    else:
        yield name, json.dumps(value)


def _cost(a: Record, b: Record) -> Iterator[Row]:
    """Yields the costs that differ, without the firing rates of single layers."""
    first, second = (asdict(record.cost) if record.cost else {} for record in (a, b))
    for name in dict.fromkeys([*first, *second]):
        if name != "firing_rates" and (x := first.get(name)) != (y := second.get(name)):
            ratio = f" ({y / x:.3g} of A)" if x and y is not None else ""
            yield name, _number(x), f"{_number(y)}{ratio}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _metrics(a: Record, b: Record) -> Iterator[tuple[str, ...]]:
    for key in sorted(a.metrics.keys() | b.metrics.keys()):
        x, y = a.metrics.get(key), b.metrics.get(key)
        shown = [f"{m.value:.6g} ±{m.uncertainty:.2g}" if m else "-" for m in (x, y)]
        yield key, *shown, *(_verdict(key, x, y) if x and y else ("-", "-", "-"))


def _verdict(key: str, a: MetricValue, b: MetricValue) -> tuple[str, str, str]:
    """Returns the difference with its uncertainty, the better record, and whether it exceeds two sigma."""
    difference, uncertainty = b.value - a.value, math.hypot(a.uncertainty, b.uncertainty)
    if difference == 0:
        return "0", "equal", "no"
    better = "B" if (difference > 0) == bool(_HIGHER_IS_BETTER.fullmatch(key)) else "A"
    sigmas = f" ({abs(difference) / uncertainty:.1f})" if uncertainty > 0 else ""
    beyond = "yes" if abs(difference) > 2 * uncertainty else "no"
    return f"{difference:+.4g} ±{uncertainty:.2g}", better, f"{beyond}{sigmas}"
