"""Tables of the leaderboard, for the terminal and as Markdown: one row per method with its training seeds.

± is half of a 95 % interval: over the training seeds, or, in parentheses, of the evaluation of a single training.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leaderboard.energy import EnergyModel
from leaderboard.files import is_report, refuse_existing, write_atomic
from leaderboard.protocols import FAULTS, SUPERSEDED_BY
from leaderboard.record.entries import Entry, default_folders, read_records, table_metrics
from leaderboard.record.records import Record
from leaderboard.reports.cells import Cell, metric_cell, metric_name, number_cell
from leaderboard.reports.energies import (
    ALL_MODELS,
    ENERGY,
    chosen_model,
    energy_cells,
    energy_label,
    energy_meaning,
    has_counts,
    incomplete_cost,
    missing_energy,
)
from leaderboard.reports.known_sets import known_set_rows
from leaderboard.reports.methods import Method, method_name, ranks, tables
from leaderboard.reports.terminal import SHORT, WIDTH, terminal

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
_TITLE = "# Leaderboard"
HIDDEN = re.compile("recall.*")
"""Metrics that only records and exported files contain: recall rises steeply with a few outlying images."""
SHORT_ROWS = 9
"""Maximum number of rows of the short table, so that it fits a terminal together with the surrounding output."""
MEANING = (
    "One row per method with its training seeds. ± is half of the 95 % interval of the mean over the seeds; in "
    "parentheses, (±), of the evaluation of a single training, without the spread of trainings. # is the interval of "
    "ranks: rows that the seeds cannot tell apart share ranks (paired t-tests, corrected by Holm for all pairs)."
)
"""Explanation of the rows, printed with full tables."""
LONE = "\N{DAGGER}"
"""Marks an energy by only the arithmetic in a column of bands."""
NO_BREAK = "\N{NO-BREAK SPACE}"
_STACKS = (
    ("T", "Rate", "NFE"),
    ("Solver", "Repeated", "Verified"),
    ("G SOPs", ENERGY, ALL_MODELS, "M params"),
    ("Samples", "Images/s", "File"),
)
"""Columns that the wide terminal table prints above each other."""


def leaderboard(
    records: list[str] | None = None,
    output: str | None = None,
    wide: bool = False,
    all: bool = False,
    energy: str | None = None,
) -> None:
    """Shows records as tables, one per dataset and protocol: best Fréchet distance first, then what is not ranked.

    A row is a method with its training seeds: mean and 95 % interval. Rows whose seeds cannot tell them apart share
    ranks. By default, only the table of the newest run is shown, with few columns, the best rows and the neighbours of
    the newest run, which is marked by `>`. Without runs, the table with the most rows is shown.

    Args:
        records: Folders to search for `*.json`, directly and in any `records` folder below; null searches runs/ and
            the project's records, which come with the package.
        output: Markdown file to write all tables to, with every column and row.
        wide: Show every column, row and seed, the source of the reference images and the files of the records.
        all: Show the tables of all datasets and protocols, with every row and seed.
        energy: Model of energy, such as memory-45nm; null shows the band from the lowest to the highest model, or the
            arithmetic where a record has no operations by layer.

    Raises:
        SystemExit: If a record is broken; the others are still shown.
        FileExistsError: If the output is a file of another kind.
        ValueError: If there is no such model of energy.
    """
    model = chosen_model(energy)
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
        shown = (entry for group in groups for method in group for entry in method.entries)
        newest = max((entry for entry in shown if entry.in_run), key=Entry.time, default=None)
        chosen = next((group for group in groups if _row_of(newest, group) is not None), max(groups, key=len))
        for group in groups if all else [chosen]:
            if wide:
                _print_wide(console, group, model)
            else:
                _print_short(console, group, newest, model, has_band=energy is None, every_row=all)
        if not all:
            _show_hidden(console, chosen, groups, newest, wide)
        if newest is not None:
            _show_run(newest, console)
        if output is not None:
            if not is_report(Path(output), f"{_TITLE}\n"):
                refuse_existing(Path(output), option="--output")
            write_atomic(Path(output), markdown(entries, model))
            console.print(f"wrote {output}", markup=False, soft_wrap=True)
    if broken:
        raise SystemExit(1)


def _show_run(entry: Entry, console: Console) -> None:
    """Prints the paths of the samples and of the TensorBoard log of a record's run."""
    if entry.samples.is_file():
        print_line(console, f"samples: {entry.samples}")
    if entry.record.images is None:
        print_line(console, f"tensorboard --logdir {entry.path.parent.parent}")


def _row_of(entry: Entry | None, group: list[Method]) -> int | None:
    """Returns the index of the row that contains an entry; None if there is none."""
    return next((i for i, method in enumerate(group) if entry in method.entries), None)


def _show_hidden(
    console: Console, chosen: list[Method], groups: list[list[Method]], newest: Entry | None, wide: bool
) -> None:
    """Prints one line with the number of hidden rows and tables and the options that show them."""
    shown = [i for i in short_rows(len(chosen), _row_of(newest, chosen)) if i is not None]
    rows = 0 if wide else len(chosen) - len(shown)
    others = [group[0].record for group in groups if group is not chosen]
    dataset = chosen[0].record.dataset.name
    names = ", ".join(dict.fromkeys(r.protocol.name if r.dataset.name == dataset else r.dataset.name for r in others))
    hidden = [f"{rows} more row{'s' * (rows > 1)}"] * (rows > 0)
    hidden += ["seeds"] * (not wide and any(len(method.entries) > 1 for method in chosen))
    hidden += [f"{len(others)} more table{'s' * (len(others) > 1)} ({names})"] * bool(others)
    hints = ["--wide: every column"] * (not wide) + [f"--all: {', '.join(hidden)}"] * bool(hidden)
    if hints:
        console.print(Text("  ".join(hints), style="dim"), no_wrap=True, overflow="ellipsis")


def print_line(console: Console, line: str) -> None:
    """Prints a line verbatim, without wrapping, so that it can be copied."""
    console.print(line, markup=False, soft_wrap=True, highlight=False)


def show_result(entry: Entry, console: Console) -> None:
    """Prints metrics and cost of a record, and the paths of its run folder, record file and sample grid."""
    method = Method((entry,))
    record, row = entry.record, table_rows([method])[0]
    names = list(row)[3 : list(row).index("T")]
    values = [f"{name} {row[name]}" for name in names]
    if record.cost is not None:
        values += [f"{row['NFE']} NFE", f"{row[ENERGY]} mJ (arithmetic)"]
    if record.cost is not None and record.cost.firing_rate is not None:
        values.insert(len(names), f"T {row['T']}, rate {row['Rate']}")
    title = f"{table_title(record)}{'' if entry.is_ranked else f' ({entry.status}, not ranked)'}"
    sentence = f"{title}: {', '.join(value.replace(' ', NO_BREAK) for value in values)}"
    print_line(console, textwrap.fill(sentence, console.width).replace(NO_BREAK, " "))
    for note in _notes([method], chosen_model(None)):
        console.print(Text(note, style="dim"))
    run = entry.path.parent.parent
    for line in (f"in {run}:", f"  {entry.path.relative_to(run)}", f"  {entry.samples.relative_to(run)}"):
        print_line(console, line)


def show_records(records: Iterable[tuple[Path, Record]], console: Console) -> None:
    """Prints all tables of the records, which are passed as `(file, record)` pairs."""
    for group in tables(records):
        _print_wide(console, group, chosen_model(None))


def markdown(records: Iterable[tuple[Path, Record]], model: EnergyModel | None = None) -> str:
    """Returns all tables of the records as deterministic Markdown.

    Args:
        records: Records as `(file, record)` pairs.
        model: Model of energy; None is the arithmetic.
    """
    model = model or chosen_model(None)
    lines = [_TITLE, "", "Measured results, rendered from records. Drafts have too few samples to rank.", "", MEANING]
    for group in tables(records):
        record = group[0].record
        lines += [
            "",
            f"## {escape(table_title(record))}",
            "",
            escape(f"{table_provenance(record)} {energy_meaning(model)}"),
            "",
        ]
        rows = table_rows(group, model)
        lines += [markdown_line(column_label(name, model) for name in rows[0]), markdown_line("---" for _ in rows[0])]
        for method, row in zip(group, rows, strict=True):
            lines += [markdown_line(map(str, part.values())) for part in (row, *seed_rows(method, row, model))]
        lines += [markdown_line(map(str, known.values())) for known in known_set_rows(record, rows[0])]
        lines += [part for note in _notes(group, model) for part in ("", escape(note))]
    return "\n".join(lines) + "\n"


def table_rows(group: list[Method], model: EnergyModel | None = None) -> list[dict[str, Cell]]:
    """Returns one row per method, as cells by column; all rows have the same columns.

    Args:
        group: Methods of the table.
        model: Model of energy; None is the arithmetic.
    """
    keys, model = shown_metrics(group), model or chosen_model(None)
    has_band = any(map(has_counts, group))
    return [
        {
            "#": _rank(position, method, rank),
            **_cells(method, keys, energy_cells(method, model, has_band)),
            "Record": _file_cell(method),
        }
        for position, (method, rank) in enumerate(zip(group, ranks(group), strict=True), 1)
    ]


def seed_rows(method: Method, row: dict[str, Cell], model: EnergyModel | None = None) -> list[dict[str, Cell]]:
    """Returns one row per training seed with the columns of the method's row; none if there is only one seed."""
    if len(method.entries) < 2:
        return []
    keys = {metric_name(key): key for entry in method.entries for key in entry.record.metrics}
    model = model or chosen_model(None)
    rows = []
    for entry in method.entries:
        part = Method((entry,))
        energies = energy_cells(part, model, ALL_MODELS in row)
        cells = {"#": Cell(""), **_cells(part, [keys[name] for name in row if name in keys], energies)}
        variant = "" if entry.record.variant == method.variant else entry.record.variant
        named = {"Method": Cell(seed_name(entry.record)), "Variant": Cell(variant), "Seeds": Cell("")}
        cells |= named | {"Record": _file_cell(part)}
        rows.append({name: cells.get(name, Cell("-")) for name in row})
    return rows


def seed_name(record: Record) -> str:
    """Returns the name of a row of one training seed."""
    seed = record.seeds.get("training")
    return "unseeded" if seed is None else f"seed {seed}"


def shown_metrics(group: list[Method]) -> list[str]:
    """Returns the keys of the metrics that have a column, in order."""
    found = (key for method in group for entry in method.entries for key in entry.record.metrics)
    return table_metrics(key for key in found if not HIDDEN.fullmatch(key))


def column_label(column: str, model: EnergyModel | None = None) -> str:
    """Returns the header of a column in pages and files, where the table shows a model of energy."""
    return energy_label(model or chosen_model(None)) if column == ENERGY else column


def _rank(position: int, method: Method, rank: tuple[int, int] | None) -> Cell:
    """Shows the ranks that a row may have; its position in the table sorts it."""
    if rank is None:
        return Cell("-" if method.is_ranked else method.status)
    first, last = rank
    return Cell(str(first) if first == last else f"{first}-{last}", position)


def _file_cell(method: Method) -> Cell:
    count = len(method.entries)
    return Cell(method.entries[0].path.name if count == 1 else f"{count} records")


def _cells(method: Method, keys: list[str], energies: dict[str, Cell]) -> dict[str, Cell]:
    record, cost = method.record, method.record.cost
    spiking = record.images is not None or (cost is not None and cost.firing_rate is not None)
    samples = max((v.num_samples for v in record.metrics.values()), default=0)
    count = len(method.entries)
    repeated = [entry.repeated.created[:10] for entry in method.entries if entry.repeated is not None]
    verified = [max(r.created for r in e.verified.values())[:10] for e in method.entries if e.verified]

    def mean(name: str, unit: float = 1.0) -> Cell:
        value = method.mean_cost(name)
        return number_cell(None if value is None else value / unit)

    return {
        "Method": Cell(method_name(record), note="; ".join(row_notes(method))),
        "Variant": Cell(method.variant),
        **{metric_name(key): metric_cell(key, method) for key in keys},
        "T": Cell(str(record.num_steps), record.num_steps) if spiking and record.num_steps else Cell("-"),
        "Rate": mean("firing_rate"),
        **energies,
        "Solver": Cell(record.solver or "-"),
        "NFE": Cell("-") if record.nfe is None else Cell(str(record.nfe), record.nfe),
        "G SOPs": mean("sops", 1e9),
        "M params": mean("parameters", 1e6),
        "Images/s": mean("images_per_second"),
        "Samples": Cell(f"{samples:,}", samples),
        "Seeds": Cell(str(count), count) if record.images is None else Cell("-"),
        "Repeated": _dates(repeated, count),
        "Verified": _dates(verified, count),
    }


def _dates(days: list[str], count: int) -> Cell:
    """Shows how many records of a row were repeated; the date if the row has one record."""
    if not days:
        return Cell("-")
    return Cell(days[0] if count == 1 else f"{len(days)} of {count}")


def table_title(record: Record) -> str:
    """Returns the title of the table of a record: dataset and protocol."""
    return f"{record.dataset.name}, {record.protocol.name}"


def table_provenance(r: Record) -> str:
    """Returns one line on the reference data, extractor and protocol of the table of a record."""
    successor = SUPERSEDED_BY.get(r.protocol.name)
    superseded = f", superseded by {successor}" if successor else ""
    fault = FAULTS.get((r.dataset.name, r.protocol.name))
    return (
        f"Reference: {r.dataset.fingerprint[:12]} from {r.dataset.source}. Extractor: {r.extractor.name} "
        f"({r.extractor.sha256[:8]}). Protocol: {r.protocol.sha256[:8]}{superseded}."
        f"{f' {fault}' if fault else ''}"
    )


def row_notes(method: Method) -> list[str]:
    """Returns the footnotes of a whole row: of its method, and of what keeps it from being ranked."""
    record = method.record
    notes = status_notes(method)
    if record.code.external:
        notes.append(f"external code: {', '.join(f'{name} {code}' for name, code in record.code.external.items())}.")
    return notes + ([method_note(record)] if record.images is None and method_note(record) else [])


def method_note(record: Record) -> str:
    """Returns the footnote of the method of a record, or nothing."""
    notes = [METHOD_NOTES.get(record.method, ""), CONDITIONAL_NOTE if record.conditional is not None else ""]
    return " ".join(filter(None, notes))


def status_notes(method: Method) -> list[str]:
    """Returns the footnotes on what keeps a row from being ranked."""
    record = method.record
    notes = [f"transfer: {difference}." for difference in record.transfers]
    if (made := record.images) is not None:
        notes.append("images: made by other code, so that `leaderboard verify` cannot repeat them.")
        notes[-1] += f" {made.copies:,} of {made.count:,} repeat another one." * bool(made.copies)
        notes[-1] += " Their cost is as its authors state it." * (record.cost is not None)
    return notes


def _notes(group: list[Method], model: EnergyModel) -> list[str]:
    entries = [entry for method in group for entry in method.entries]
    notes = {value.note for e in entries for key, value in e.record.metrics.items() if not HIDDEN.fullmatch(key)}
    notes |= {note for method in group for note in row_notes(method)}
    notes |= {incomplete_cost(entry.record.cost) for entry in entries}
    missing = missing_energy(group, model) if any(entry.record.cost for entry in entries) else ""
    return [f"* {note}" for note in sorted(notes - {""})] + [missing] * bool(missing)


def _print_wide(console: Console, group: list[Method], model: EnergyModel) -> None:
    """Prints the wide table: related cells are stacked (104 characters for a few metrics), files are listed below."""
    rows = table_rows(group, model)
    metrics = list(rows[0])[3 : list(rows[0]).index("T")]
    table = Table(
        title=Text(table_title(group[0].record)),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )
    shown = {*rows[0], "File"}
    stacks = [("#", "Seeds"), ("Method", "Variant"), *((m,) for m in metrics), *_STACKS]
    stacks = [tuple(name for name in stack if name in shown) for stack in stacks]
    for stack in stacks:
        header = (
            re.sub("_(?=[^_]+$)", "\n_", stack[0])
            if len(stack) == 1
            else "\n".join(_short_label(n, model) for n in stack)
        )
        min_width = max(len(str(row["Method"])) for row in rows) if stack[0] == "Method" else None
        justify: Literal["left", "right"] = "left" if stack[0] in ("#", "Method") else "right"
        table.add_column(header, justify=justify, overflow="fold", min_width=min_width)
    files: list[Entry] = []
    for number, (method, row) in enumerate(zip(group, rows, strict=True), 1):
        seeds = seed_rows(method, row, model)
        for entry, part in zip([None, *method.entries] if seeds else method.entries, [row, *seeds], strict=True):
            files += [entry] if entry else []
            cells = part | {"File": Cell(f"[{len(files)}]" if entry else "")}
            stacked = ["\n".join(str(cells[n]) for n in stack if str(cells[n]) or entry is None) for stack in stacks]
            last = part is ([row, *seeds])[-1] and number < len(group)
            table.add_row(
                *(Text(re.sub(r" (?=\(?±)", "\n", cell)) for cell in stacked),
                style="dim" if part is not row else None,
                end_section=last and method.is_ranked and not group[number].is_ranked,
            )
    for known in known_set_rows(group[0].record, rows[0]):
        cells = known | {"File": Cell("")}
        table.add_row(
            *(Text("\n".join(str(cells[n]) for n in stack if str(cells[n]) not in ("", "-"))) for stack in stacks)
        )
    console.print(table)
    listed = [f"[{n}] {entry.path}{_design(entry.record)}" for n, entry in enumerate(files, 1)]
    provenance = f"{table_provenance(group[0].record)} {energy_meaning(model)}"
    for line in (MEANING, provenance, *_notes(group, model), *listed):
        console.print(Text(line, style="dim"), soft_wrap=True)
    console.print()


def _design(record: Record) -> str:
    return "" if record.design is None else f", design {record.design.name} ({record.design.sha256[:8]})"


def short_rows(count: int, newest: int | None) -> list[int | None]:
    """Returns the indices of the rows of the short table; None marks a gap.

    They are the first rows, the row of the newest run and its neighbours.

    Args:
        count: Number of rows of the whole table.
        newest: Index of the row of the newest run.
    """
    if count <= SHORT_ROWS:
        return list(range(count))
    index = newest or 0
    if index < SHORT_ROWS - 1:
        return [*range(SHORT_ROWS - 1), None]
    first, last = index - 1, min(index + 1, count - 1)
    top = SHORT_ROWS - 1 - (last - first + 1) - (last < count - 1)
    return [*range(top), None, *range(first, last + 1), *[None] * (last < count - 1)]


def _short_label(column: str, model: EnergyModel) -> str:
    """Returns the header of a column in the terminal."""
    return f"{model.title} mJ" if column == ENERGY else column


def _wrapped(metric: str, width: int = 12) -> str:
    """Breaks the name of a metric before underscores into lines of at most `width` characters, if possible."""
    lines = [""]
    for part in re.findall("_?[^_]+", metric):
        lines = [*lines[:-1], lines[-1] + part] if len(lines[-1] + part) <= width else [*lines, part]
    return "\n".join(filter(None, lines))


def _print_short(
    console: Console, group: list[Method], newest: Entry | None, model: EnergyModel, has_band: bool, every_row: bool
) -> None:
    """Prints the short table, one line per row; marks the newest run and crops names that do not fit.

    Args:
        console: Where to print.
        group: Methods of the table.
        newest: Newest run.
        model: Model of energy.
        has_band: Whether to print the band of all models in place of the energy by one.
        every_row: Whether to print all rows and seeds.
    """
    rows, marked = table_rows(group, model), _row_of(newest, group)
    has_band = has_band and ALL_MODELS in rows[0]
    metrics = list(rows[0])[3 : list(rows[0]).index("T")][:1]
    numbers = [*metrics, "T", "Rate", "NFE", ENERGY, "Seeds"]
    title = table_title(group[0].record) + (f": best {metrics[0]} first" if math.isfinite(group[0].frechet) else "")
    lone = has_band and any(row[ALL_MODELS].value is None for row in rows)
    title += f", {LONE} arithmetic" if lone else ""
    title += ", > is the newest run" if marked is not None else ""
    console.print(Text(title, style="italic"), no_wrap=True, overflow="ellipsis")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("Method")
    for name in numbers:
        shown = ALL_MODELS if name == ENERGY and has_band else name
        header = _wrapped(name) if name in metrics else _short_label(shown, model)
        table.add_column(Text(header), justify="right", no_wrap=True)
    notes: list[str] = []

    def add(rank: str, name: str, row: dict[str, Cell], style: str | None) -> None:
        energy = str(row[ENERGY])
        if has_band and energy != "-":
            energy = f"{energy}{LONE}" if row[ALL_MODELS].value is None else str(row[ALL_MODELS])
        cells = [rank, name, *(energy if n == ENERGY else str(row[n]) for n in numbers)]
        table.add_row(*(Text(c, no_wrap=True, overflow="ellipsis") for c in cells), style=style)

    for index in range(len(group)) if every_row else short_rows(len(group), marked):
        if index is None:
            table.add_row("...")
            continue
        method, row = group[index], rows[index]
        add(f"{'> ' * (index == marked)}{row['#']}", method.name, row, "bold" if index == marked else None)
        found = [*(row[name].note for name in metrics), *status_notes(method)]
        notes += [note for note in found if note not in ("", *notes)]
        if every_row or index == marked:
            for entry, part in zip(method.entries, seed_rows(method, row, model), strict=False):
                if every_row or entry == newest:
                    is_newest = entry == newest
                    add("> " * is_newest, f"  {part['Method']}", part, "bold" if is_newest else "dim")
    for known in known_set_rows(group[0].record, rows[0])[: None if every_row else 1]:  # the first are real images
        add("", str(known["Method"]), known, "dim")
    console.print(table)
    for note in notes:
        console.print(Text(f"* {note}", style="dim"))
    if missing := missing_energy(group, model):
        console.print(Text(missing, style="dim"))
    console.print(Text(_meaning(group), style="dim"))


def _meaning(group: list[Method]) -> str:
    """Explains the ± and the ranks of a table in one line of 80 columns."""
    single = any(len(method.entries) < 2 for method in group)
    if all(len(method.entries) < 2 for method in group):
        return "(±): 95 %, of the evaluation; single seeds share all ranks"
    return "±: 95 % over seeds" + ", in parentheses of one evaluation" * single + "; equal ranks: cannot tell"


def markdown_line(cells: Iterable[str]) -> str:
    """Returns a row of a Markdown table."""
    return "| " + " | ".join(map(escape, cells)) + " |"


def escape(text: str) -> str:
    """Escapes text for Markdown and collapses whitespace."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))
