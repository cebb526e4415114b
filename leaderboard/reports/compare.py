"""`python -m benchmark leaderboard compare`: differences between two methods, or between two records."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leaderboard.energy import read_models
from leaderboard.record.differences import Row, differences, provenance
from leaderboard.record.entries import Entry, read_records
from leaderboard.record.records import Record, find_records, read_record
from leaderboard.reports.cells import direction, metric_cell
from leaderboard.reports.energies import band_cell, energy
from leaderboard.reports.methods import Method, fold, row_key, tables
from leaderboard.reports.statistics import LEVEL, OF_AN_EVALUATION, difference, holm
from leaderboard.reports.table import table_title
from leaderboard.reports.terminal import terminal

_SHARED = ("dataset", "protocol", "protocol sha256", "data fingerprint", "extractor sha256")
"""Values shared by all records of one table (`leaderboard.record.entries.Entry.table_key`)."""
_CANNOT_TELL = "cannot tell"


def compare(
    first: str,
    second: str,
    data: str | None = None,
    protocol: str | None = None,
    records: list[str] | None = None,
) -> None:
    """Compares two methods over their training seeds: metrics, configuration, code and cost.

    A group is the name of a row of the leaderboard, such as "sddpm, 950 steps", or files: a record, a folder of
    records, a pattern such as "runs/sddpm*/records/*.json", or several of these separated by commas. Groups with at
    least two seeds each are compared by a t-test, paired over the seeds that both have, and corrected by Holm for the
    number of metrics. Where the seeds show no difference, or a group has a single training, the answer is "cannot
    tell".

    Args:
        first: Group A.
        second: Group B.
        data: Dataset of the rows, if both names occur with several ones.
        protocol: Protocol of the rows, if both names occur under several ones.
        records: Folders of the records of the rows; null searches runs/ and the project's records.

    Raises:
        FileNotFoundError: If a group is neither a file, a folder, a pattern that matches nor a row.
        ValueError: If a group contains no record, or a name fits no row or several rows.
    """
    groups: list[list[Entry] | None] = [_files(text) for text in (first, second)]
    if None in groups:
        rows = _rows((first, second), groups, data, protocol, records)
    else:
        rows = [_row(group, text) for group, text in zip(groups, (first, second), strict=True) if group is not None]
    a, b = rows
    console = terminal()
    for letter, method in (("A", a), ("B", b)):
        _show_group(console, letter, method)
    for problem in incomparable(a.record, b.record):
        console.print(Text(f"warning: the metrics cannot be compared: {problem}", style="red"), soft_wrap=True)
    both = len(a.entries) == len(b.entries) == 1
    configs = [_flat(method.record.config) for method in rows]
    origins = [provenance(method.record) for method in rows]
    if not both:
        origins = [{name: text for name, text in origin.items() if name not in _OF_A_RECORD} for origin in origins]
    for title, lines in (
        ("configuration", differences(*configs)),
        ("code, data and weights", differences(*origins)),
        ("cost per image", _cost(a, b)),
    ):
        show(console, title, ("", "A", "B"), lines)
    header = ("", "A", "B", "B - A", "p", "p, Holm", "better")
    show(console, "metrics", header, _metrics(a, b))
    console.print(Text(_explanation(a, b), style="dim"))


_OF_A_RECORD = ("checkpoint sha256", "seed of training")
"""Entries of `provenance` that differ between the seeds of one method."""


def _files(text: str) -> list[Entry] | None:
    """Returns the records that a group names as files; None if it names no file.

    Raises:
        ValueError: If a folder contains no record.
    """
    paths: list[Path] = []
    for part in [text] if Path(text).exists() else text.split(","):
        part = part.strip()
        matches = [part] if Path(part).exists() else sorted(glob.glob(part, recursive=True))  # noqa: PTH207 - absolute patterns
        if not part or not matches:
            return None
        for match in map(Path, matches):
            paths += find_records([match]) if match.is_dir() else [match]
    if not paths:
        raise ValueError(f"{text}: the folder contains no record")
    return [Entry(path, read_record(path)) for path in dict.fromkeys(paths)]


def _row(group: Sequence[Entry], text: str) -> Method:
    """Returns the records of a group as one row, which averages over seeds only.

    Raises:
        ValueError: If they differ in more than the seed.
    """
    by_row = {(entry.table_key, row_key(entry)): entry for entry in group}
    if len(by_row) > 1:
        names = sorted({f"{table_title(e.record)}: {e.record.method} {e.record.variant}" for e in by_row.values()})
        raise ValueError(
            f"{text}: its {len(group)} records differ in more than the training seed ({'; '.join(names[:4])}); a group "
            "is one method with one configuration: name only its records"
        )
    (method,) = fold(group)
    return method


def _rows(
    names: tuple[str, str],
    groups: Sequence[list[Entry] | None],
    data: str | None,
    protocol: str | None,
    records: list[str] | None,
) -> list[Method]:
    """Finds the rows of two names in one table of the leaderboard; a group of files may stand for one of them.

    Raises:
        FileNotFoundError: If a name is neither that of a row nor of files.
        ValueError: If no table, or several ones, contain both.
    """
    boards = [
        table
        for table in tables(read_records(records)[0])
        if data in (None, table[0].record.dataset.name) and protocol in (None, table[0].record.protocol.name)
    ]
    found: list[list[Method]] = []
    for table in boards:
        pair = []
        for name, group in zip(names, groups, strict=True):
            if group is not None:
                method = _row(group, name)
                pair.append([method] if method.entries[0].table_key == table[0].entries[0].table_key else [])
            else:
                pair.append([m for m in table if name in (m.name, f"{m.name}, {m.record.solver}, {m.record.nfe}")])
        for name, rows in zip(names, pair, strict=True):
            if len(rows) > 1:
                full = "; ".join(f"{m.name}, {m.record.solver}, {m.record.nfe}" for m in rows)
                raise ValueError(f"{name!r} is the name of {len(rows)} rows of {table_title(table[0].record)}: {full}")
        if all(pair):
            found.append([rows[0] for rows in pair])
    if len(found) == 1:
        return found[0]
    if found:
        places = "; ".join(table_title(a.record) for a, _ in found)
        raise ValueError(
            f"{' and '.join(names)} occur in several tables ({places}): add --data NAME or --protocol NAME"
        )
    known = sorted({method.name for table in boards for method in table})
    for name, group in zip(names, groups, strict=True):
        if group is None and name not in known:
            raise FileNotFoundError(
                f"{name!r} is neither a file, a folder, a pattern that matches nor a row of the leaderboard; "
                f"rows: {'; '.join(known) or 'none'}"
            )
    raise ValueError(f"no table contains both {names[0]!r} and {names[1]!r}")


def _show_group(console: Console, letter: str, method: Method) -> None:
    seeds = [str(entry.record.seeds.get("training", "none")) for entry in method.entries]
    line = f"{letter}: {method.name}, {table_title(method.record)}, seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"
    if len(method.entries) == 1:
        line += f": {method.entries[0].path}"
    if method.older:
        line += f" ({len(method.older)} older records of these seeds not used)"
    console.print(Text(line), soft_wrap=True)


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


def _cost(a: Method, b: Method) -> Iterator[Row]:
    """Yields the mean costs that differ, without those of single layers, and the energies by all models."""
    first, second = (asdict(method.record.cost) if method.record.cost else {} for method in (a, b))
    for name in dict.fromkeys([*first, *second]):
        if name in ("firing_rates", "incomplete", "counts"):
            continue
        x, y = (method.mean_cost(name) for method in (a, b))
        if x != y:
            ratio = f" ({y / x:.3g} of A)" if x and y is not None else ""
            yield name, _number(x), f"{_number(y)}{ratio}"
    for name, model in read_models().items():
        energies = (band_cell(energy(a, model)).text, band_cell(energy(b, model)).text)
        if energies[0] != energies[1]:
            yield f"mJ by {name}", *energies


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value == int(value) and value < 1e9 else f"{value:.6g}"


def _metrics(a: Method, b: Method) -> Iterator[tuple[str, ...]]:
    """Yields one line per metric: values, difference, p-values and the better group."""
    keys = sorted({key for method in (a, b) for entry in method.entries for key in entry.record.metrics})
    results = {key: difference(a.values(key), b.values(key)) for key in keys}
    tested = [key for key, result in results.items() if result is not None]
    corrected = dict(zip(tested, holm([r.p for r in results.values() if r is not None]), strict=True))
    for key in keys:
        shown = (key, *(str(metric_cell(key, method, scaled=False)._replace(note="")) for method in (a, b)))
        result = results[key]
        if not (a.values(key) and b.values(key)):
            yield *shown, "-", "-", "-", "-"
        elif result is None:
            value, interval = _of_evaluations(key, a, b)
            yield *shown, f"{value:+.4g} (±{interval:.2g})", "-", "-", "equal" if value == 0 else _CANNOT_TELL
        else:
            better = _better(key, result.value) if corrected[key] <= LEVEL else _CANNOT_TELL
            p = f"{result.p:.2g}", f"{corrected[key]:.2g}"
            yield *shown, f"{result.value:+.4g} ±{result.half_width:.2g}", *p, "equal" if result.p == 1 else better


def _of_evaluations(key: str, a: Method, b: Method) -> tuple[float, float]:
    """Returns the difference of the means with half of its 95 % interval from the evaluations' errors only."""
    means, variances = [], []
    for method in (a, b):
        found = [entry.record.metrics[key] for entry in method.entries if key in entry.record.metrics]
        means.append(sum(metric.value for metric in found) / len(found))
        variances.append(sum(metric.uncertainty**2 for metric in found) / len(found) ** 2)
    return means[1] - means[0], OF_AN_EVALUATION * math.sqrt(sum(variances))


def _better(key: str, value: float) -> str:
    """Returns the better group for a difference B - A; the direction if the metric has no better one."""
    if not (better := direction(key)):
        return "B is higher" if value > 0 else "A is higher"
    return "B" if (value > 0) == (better == "higher") else "A"


def _explanation(a: Method, b: Method) -> str:
    """Explains the test, or why there is none."""
    if min(len(a.entries), len(b.entries)) < 2:
        return (
            "A single training cannot be told apart: (±) is half of the 95 % interval of the evaluations and does not "
            "include the spread of trainings. Train more seeds of both: python -m benchmark matrix --seeds 0 1 2 3 4"
        )
    shared = [x for x in a.trainings if x in b.trainings]
    test = (
        f"paired t-test over {len(shared)} shared seeds"
        if len(shared) > 1
        else "t-test of independent groups (Welch's statistic, degrees of freedom of the smaller group)"
    )
    return (
        f"± is half of the 95 % interval over training seeds. {test[0].upper()}{test[1:]}, corrected by Holm for the "
        f"number of metrics: the probability of a wrong answer in any line is at most {LEVEL:.0%}."
    )
