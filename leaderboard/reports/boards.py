"""Tables of the leaderboard page: columns, rows, row details and plots."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from PIL import Image

from leaderboard.energy import read_models
from leaderboard.files import canonical_sha256
from leaderboard.pictures import excerpt
from leaderboard.record.differences import training_data
from leaderboard.record.entries import Entry, Status, order_metrics
from leaderboard.record.records import Record, record_json
from leaderboard.reports import pareto
from leaderboard.reports.cells import Cell, direction, metric_name
from leaderboard.reports.energies import (
    ALL_MODELS,
    band_cell,
    energy_label,
    model_cell,
)
from leaderboard.reports.energy_plots import AS_PUBLISHED, energy_plots, plots_of
from leaderboard.reports.known_sets import known_set_rows
from leaderboard.reports.methods import Method, tables
from leaderboard.reports.published import Published, PublishedResult
from leaderboard.reports.table import (
    column_label,
    row_notes,
    seed_name,
    seed_rows,
    shown_metrics,
    table_provenance,
    table_rows,
    table_title,
)

UNKNOWN = "?"
"""Shown as the uncertainty of published values."""

MEANINGS = {
    "±": "half of the 95 % interval of the mean over the training seeds (Student's t); in parentheses, (±), of the "
    "evaluation of a single training, which does not include the spread of trainings",
    "#": "interval of ranks by Fréchet distance; rows that the seeds cannot tell apart share ranks: t-tests, paired "
    "over shared seeds, corrected by Holm for all pairs of the table. A single seed cannot be told apart",
    "Kind": "spiking (SNN) or artificial (ANN) network",
    "T": "SNN time steps",
    "Rate": "firing rate: spikes / (neurons x T)",
    "Solver": "sampler of the denoising chain",
    "NFE": "network evaluations per image",
    "Steps": "diffusion steps of the chain",
    "G SOPs": "10^9 synaptic operations per image: accumulates caused by spikes",
    **{energy_label(model): f"energy in millijoules per image. {model.about}" for model in read_models().values()},
    ALL_MODELS: "energy in millijoules per image, from the lowest to the highest of all models",
    "mJ, published": "energy in millijoules as counted by the paper; see the footnotes",
    "M params": "parameters in millions",
    "Images/s": "measured throughput",
    "Samples": "generated images",
    "Seeds": "number of trainings, each with its own seed",
    "Repeated": "the same people, usually on the same machine, evaluated the checkpoint again and reproduced the "
    "record; not an independent verification",
    "Verified": "a third party evaluated the checkpoint again and reproduced the record",
    "Reproduced": "whether this suite has reproduced the published figure",
    "Pixels": "side of the compared images in pixels",
    "FID": "Fréchet Inception distance",
    "1000 KID": "kernel Inception distance times 1000",
    "IS": "Inception score",
}
"""Explanations of the columns."""
_THUMBNAIL_COLUMNS = 4
"""Number of images in a thumbnail of a sample grid."""
_LARGEST_PICTURE = 300_000
"""Size in bytes above which the page embeds a PNG as WebP."""


@dataclass(frozen=True)
class Column:
    """Header of a column; `better` is the better direction of a metric."""

    name: str
    numeric: bool
    meaning: str = ""
    better: Literal["lower", "higher", ""] = ""
    is_metric: bool = False

    @property
    def label(self) -> str:
        """The header as shown."""
        return column_label(self.name)


@dataclass(frozen=True)
class Picture:
    """A sample grid and a thumbnail with its first images, as data URIs."""

    thumbnail: str
    whole: str


@dataclass(frozen=True)
class Detail:
    """One record, or the source of a published result."""

    anchor: str
    name: str
    facts: dict[str, str]
    file: str
    json: str
    config: str = ""
    picture: Picture | None = None
    nearest: Picture | None = None
    cells: dict[str, Cell] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One method with the details of its trainings, or one published result; `energies` are cells by model."""

    anchor: str
    source: Status | Literal["published", "known"]
    method: str
    cells: dict[str, Cell]
    details: list[Detail]
    link: tuple[str, str] | None = None
    caveats: list[str] = field(default_factory=list)
    energies: dict[str, Cell] = field(default_factory=dict)

    @property
    def pictures(self) -> list[Detail]:
        """The trainings with a sample grid."""
        return [detail for detail in self.details if detail.picture]

    @property
    def method_key(self) -> str:
        """Method name normalised for filtering: lower case, only letters and digits."""
        return re.sub(r"[^a-z0-9]", "", self.method.casefold()) or self.method

    @property
    def name(self) -> str:
        """Method and variant on one line."""
        variant = self.cells["Variant"].text if "Variant" in self.cells else ""
        method = self.cells["Method"].text
        return f"{method}, {variant}" if variant and variant != "default" else method


@dataclass(frozen=True)
class Board:
    """One table with its plots by model of energy, each for screens and for phones."""

    dataset: str
    title: str
    source: Literal["measured", "published"]
    lead: str
    protocol: str
    columns: list[Column]
    rows: list[Row]
    footnotes: list[str]
    plots: dict[str, list[pareto.Plot]]

    @property
    def anchor(self) -> str:
        """HTML id of the table; depends only on its rows."""
        return f"table-{_digest([row.anchor for row in self.rows])}"

    @property
    def lead_columns(self) -> int:
        """Number of leading columns that identify a result: rank, method and variant."""
        return sum(column.name in ("#", "Method", "Variant") for column in self.columns)

    @property
    def has_pictures(self) -> bool:
        """True if any row has a sample grid."""
        return any(row.pictures for row in self.rows)

    def marks(self, row: Row) -> list[int]:
        """Numbers of the footnotes of a row."""
        return sorted(self.footnotes.index(caveat) + 1 for caveat in row.caveats)

    def mark(self, cell: Cell) -> int:
        """Number of the footnote of a cell."""
        return self.footnotes.index(cell.note) + 1


def measured_boards(records: Iterable[tuple[Path, Record]]) -> list[Board]:
    """Returns one table per group of comparable records, which are passed as `(file, record)` pairs."""
    return [_measured(group) for group in tables(records)]


def _measured(group: list[Method]) -> Board:
    rows = [_measured_row(method, cells) for method, cells in zip(group, table_rows(group), strict=True)]
    record = group[0].record
    known = [_known_row(record, found) for found in known_set_rows(record, rows[0].cells)]
    cells = [cell for row in rows + known for name, cell in row.cells.items() if name != "Method"]
    return Board(
        dataset=record.dataset.name,
        title=table_title(record),
        source="measured",
        lead=table_provenance(record),
        protocol=_pretty(record.protocol.description),
        columns=_columns(rows, shown_metrics(group)),
        rows=rows + known,
        footnotes=sorted({cell.note for cell in cells if cell.note} | {note for row in rows for note in row.caveats}),
        plots=energy_plots([(method, row.name, row.anchor) for method, row in zip(group, rows, strict=True)]),
    )


def _measured_row(method: Method, cells: dict[str, Cell]) -> Row:
    parts = seed_rows(method, cells) or [cells]
    details = [_detail(entry, part) for entry, part in zip(method.entries, parts, strict=True)]
    single = len(details) == 1
    return Row(
        anchor=details[0].anchor if single else f"method-{_digest([detail.anchor for detail in details])}",
        source=method.status,
        method=method.record.method,
        cells={name: cell for name, cell in cells.items() if name != "Record"},
        details=details,
        caveats=row_notes(method),
        energies={name: model_cell(method, model) for name, model in read_models().items()},
    )


def _known_row(record: Record, cells: dict[str, Cell]) -> Row:
    """Returns the row of a known set of images in the table of a record."""
    values = {name: str(cell) for name, cell in cells.items() if cell.value is not None}
    name = cells["Method"].text
    anchor = f"known-{_digest([table_title(record), name, values])}"
    facts = {"Set": f"{name}, measured in place of generated images by validate-metrics", **values}
    return Row(
        anchor=anchor,
        source="known",
        method=name,
        cells=cells | {"#": Cell("-")},
        details=[Detail(anchor=anchor, name="", facts=facts, file=f"{anchor}.json", json=_pretty(facts))],
    )


def _detail(entry: Entry, cells: dict[str, Cell]) -> Detail:
    record = entry.record
    data = record_json(record)
    return Detail(
        anchor=f"record-{_digest(data)}",
        name=seed_name(record),
        facts=_facts(record) | _repetitions(entry),
        file=entry.path.name,
        json=_pretty(data),
        config=yaml.safe_dump(record.config, allow_unicode=True),
        picture=picture(entry.samples, record.conditional is not None),
        nearest=picture(entry.nearest, record.conditional is not None),
        cells=cells,
    )


def _facts(record: Record) -> dict[str, str]:
    """Returns the key facts of a record, by name."""
    cost, code = record.cost, record.code
    state = {True: ", with uncommitted changes", False: "", None: ""}[code.git_dirty]
    facts = {
        "Created": f"{record.created}, {record.wall_time_seconds:,.0f} s on {record.hardware}",
        "Code": f"{code.git_commit or 'not a git checkout'}{state}",
        "Versions": ", ".join(f"{name} {version}" for name, version in sorted(code.versions.items())),
        "Seeds": ", ".join(f"{name} {seed}" for name, seed in sorted(record.seeds.items())),
        "Checkpoint": f"{record.checkpoint.name}, sha256 {record.checkpoint.sha256}" if record.checkpoint else "none",
        "Extractor": f"{record.extractor.name}, sha256 {record.extractor.sha256}",
        "Dataset": f"{record.dataset.name} from {record.dataset.source}, fingerprint {record.dataset.fingerprint}",
        "Training data": training_data(record),
        "Protocol": f"{record.protocol.name}, sha256 {record.protocol.sha256}",
        "Configuration": f"sha256 {record.config_sha256}",
    }
    if record.design is not None:
        facts["Design"] = f"{record.design.name}, sha256 {record.design.sha256}"
    if (made := record.images) is not None:
        copies = f"{made.copies:,} of which repeat another one" if made.copies else "all different"
        facts["Images"] = f"{made.count:,} from {made.source}, {copies}, sha256 {made.fingerprint}"
        facts |= {"Address": made.url} if made.url else {}
    if cost is not None:
        found = {name: model.energy(cost) for name, model in read_models().items()}
        energies = {name: band_cell(band).text for name, band in found.items() if band is not None}
        facts |= {
            "Per image": f"{cost.sops:.4g} SOPs, {cost.macs:.4g} MACs, {cost.acs:.4g} ACs",
            "Energy": ", ".join(f"{text} mJ by {name}" for name, text in energies.items()),
            "Parameters": f"{cost.parameters:,}, of which {cost.trainable_parameters:,} trainable",
        }
        if cost.peak_memory_bytes is not None:
            facts["Peak memory"] = f"{cost.peak_memory_bytes / 2**20:,.0f} MiB"
    notes = sorted({f"{metric_name(key)}: {value.note}" for key, value in record.metrics.items() if value.note})
    return facts | ({"Notes": "; ".join(notes)} if notes else {})


def _repetitions(entry: Entry) -> dict[str, str]:
    """Returns the key facts of the repetitions that agree."""
    facts = {} if entry.repeated is None else {"Repeated": _repetition(entry.repeated)}
    return facts | {f"Verified by {name}": _repetition(record) for name, record in entry.verified.items()}


def _repetition(record: Record) -> str:
    code = record.code.git_commit or "from outside a git checkout"
    return f"{record.created} on {record.hardware}, with code {code}: all metrics and counts agree"


def published_boards(published: Published) -> list[Board]:
    """Returns one table per dataset and protocol of the published results, in the order of their file."""
    groups: dict[tuple[str, str], list[PublishedResult]] = {}
    for result in published.results:
        groups.setdefault((result.dataset, result.protocol), []).append(result)
    return [_published(dataset, protocol, group, published) for (dataset, protocol), group in groups.items()]


def _published(dataset: str, protocol: str, group: Sequence[PublishedResult], published: Published) -> Board:
    keys = order_metrics(key for result in group for key in result.metrics)
    rows = [_published_row(result, keys, published) for result in group]
    kept = [name for name in rows[0].cells if any(row.cells[name].text not in ("-", "") for row in rows)]
    rows = [Row(**{**vars(row), "cells": {name: row.cells[name] for name in kept}}) for row in rows]
    points = [
        pareto.Point(result.energy_mj, result.metrics["fid"], 0.0, row.method, _label(result, row), row.anchor)
        for result, row in zip(group, rows, strict=True)
        if result.energy_mj is not None and "fid" in result.metrics
    ]
    plots = plots_of(points, "FID", "energy as published (mJ)")
    return Board(
        dataset=dataset,
        title=f"{dataset}, {protocol}",
        source="published",
        lead=published.protocols[protocol],
        protocol="",
        columns=_columns(rows, keys),
        rows=rows,
        footnotes=list(dict.fromkeys(caveat for row in rows for caveat in row.caveats)),
        plots={AS_PUBLISHED: plots} if plots else {},
    )


def _label(result: PublishedResult, row: Row) -> str:
    return row.name if result.num_steps is None else f"{row.name}, T = {result.num_steps}"


def _published_row(result: PublishedResult, keys: Sequence[str], published: Published) -> Row:
    source = published.sources[result.source]
    values = {key: _printed(number)._replace(uncertainty=UNKNOWN) for key, number in result.metrics.items()}
    data = {k: v for k, v in asdict(result).items() if v not in (None, "", ())} | {
        "source": asdict(source),
        "protocol": published.protocols[result.protocol],
        "caveats": [published.caveats[name] for name in result.caveats],
    }
    facts = {
        "Source": f"{source.citation}; {result.table}",
        "Also in": result.also_in,
        "Protocol": f"{result.protocol}: {data['protocol']}",
        "Note": result.note,
    }
    anchor = f"published-{_digest(data)}"
    return Row(
        anchor=anchor,
        source="published",
        method=result.method,
        cells={
            "Method": Cell(result.method),
            "Variant": Cell(result.variant),
            "Kind": Cell(result.kind),
            **{metric_name(key): values.get(key, Cell("-")) for key in keys},
            "T": _whole(result.num_steps),
            "Solver": Cell(result.solver or "-"),
            "Steps": _whole(result.sampling_steps),
            "mJ, published": _printed(result.energy_mj),
            "M params": _printed(result.parameters_m),
            "Pixels": _whole(result.resolution),
            "Reproduced": Cell(result.reproduced),
            "Source": Cell(f"{source.name}, {result.table}"),
        },
        details=[
            Detail(
                anchor=anchor,
                name="",
                facts={name: text for name, text in facts.items() if text},
                file=f"{anchor}.json",
                json=_pretty(data),
            )
        ],
        link=None if source.url is None else ("Source", source.url),
        caveats=data["caveats"],
    )


def _printed(value: float | None) -> Cell:
    """Formats a published number with all its digits and at least two decimals."""
    if value is None:
        return Cell("-")
    return Cell(f"{value:.2f}" if round(value, 2) == value else f"{value:.12g}", value)


def _whole(value: int | None) -> Cell:
    return Cell("-") if value is None else Cell(f"{value:,}", value)


def _columns(rows: Sequence[Row], keys: Sequence[str]) -> list[Column]:
    directions = {metric_name(key): direction(key) for key in keys}
    return [
        Column(
            name,
            name == "#" or any(row.cells[name].value is not None for row in rows),
            MEANINGS.get(column_label(name), ""),
            directions.get(name, ""),
            name in directions,
        )
        for name in rows[0].cells
    ]


def picture(path: Path, by_class: bool = False) -> Picture | None:
    """Reads a sample grid with eight columns; returns None if the file is missing or unreadable.

    Args:
        path: File of the grid.
        by_class: Whether each row shows one class.
    """
    if not path.is_file():
        return None
    try:
        with Image.open(path, formats=["PNG"]) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return None
    strip = Image.fromarray(excerpt(image, 1, _THUMBNAIL_COLUMNS, by_class))
    content = path.read_bytes()
    if len(content) <= _LARGEST_PICTURE:
        return Picture(_uri(strip, "png"), f"data:image/png;base64,{base64.b64encode(content).decode()}")
    return Picture(_uri(strip, "png"), _uri(image, "webp", quality=85))


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _pretty(data: Any) -> str:
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


def _digest(data: Any) -> str:
    return canonical_sha256(data)[:10]
