"""Leaderboard records: one JSON file per evaluated run, validated against a strict schema and never overwritten."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from leaderboard.files import canonical_sha256, write_atomic
from leaderboard.protocols import LOCKED
from leaderboard.record.renamed import FORMER_METHOD, PRESENT_METHOD, with_present_name
from leaderboard.schema import SchemaError, from_json

SCHEMA_VERSION: Final = 1
LARGEST_FILE = 4 * 2**20
"""Maximum size of a record file in bytes; typical records are a few kilobytes."""
_NAME = re.compile(r"(?!.*\.\.)[\w .,:;=+()%-]*")
REDACTED = ".../"
"""Replaces the parent folders of a path outside the working folder."""
_OUTSIDE = re.compile(r"(?:^|(?<=\s))(?=[/\\]|~[^\s/\\]*[/\\]|\.\.[/\\]|[A-Za-z]:[/\\]).*[/\\](?=[^/\\])", re.DOTALL)


class RecordError(ValueError):
    """A record that violates the schema; the message names the file and the field."""


@dataclass(frozen=True)
class MetricValue:
    """A metric with its uncertainty.

    Args:
        value: The metric.
        uncertainty: One standard error or standard deviation (see the metric), in the unit of `value`.
        num_samples: Number of generated images it was computed from.
        note: Remark for the reader, such as a singular covariance; may be empty.
    """

    value: float
    uncertainty: float
    num_samples: int
    note: str = ""


@dataclass(frozen=True)
class Cost:
    """Cost per generated image over the whole denoising chain (counting rules: `leaderboard.evaluation.cost`).

    Args:
        parameters: Parameters of the network.
        trainable_parameters: Parameters that require gradients.
        nfe: Network evaluations per image.
        firing_rate: Mean over the neuron layers, weighted by number of neurons; `None` without neurons.
        firing_rates: Spikes per neuron and time step, by neuron layer.
        sops: Synaptic operations: accumulates caused by spikes.
        macs: Multiply-accumulates.
        acs: Accumulates: `sops` plus the biases of layers with spike inputs.
        energy_strict_mj: Energy in mJ at 45 nm; layers with real-valued inputs count as MACs.
        energy_paper_mj: Energy in mJ by SDDPM's formula: all layers but the first convolution count as ACs, for an ANN
            all as MACs; `None` if the network has neurons but no layer with spike inputs.
        images_per_second: Measured throughput on one device.
        peak_memory_bytes: Measured peak device memory during generation.
    """

    parameters: int
    trainable_parameters: int
    nfe: int
    firing_rate: float | None
    firing_rates: dict[str, float]
    sops: float
    macs: float
    acs: float
    energy_strict_mj: float
    energy_paper_mj: float | None
    images_per_second: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class ProtocolEntry:
    """Protocol of a record: name, full description and hash (see `leaderboard.protocols.Protocol`)."""

    name: str
    description: dict[str, Any]
    sha256: str


@dataclass(frozen=True)
class Artefact:
    """A file or set of arrays that the result depends on: a checkpoint or feature extractor."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Dataset:
    """Reference data: name, fingerprint of its content, and source."""

    name: str
    fingerprint: str
    source: str


@dataclass(frozen=True)
class Code:
    """Code and library versions; commit and dirty flag are `None` outside a git checkout."""

    git_commit: str | None
    git_dirty: bool | None
    versions: dict[str, str]


@dataclass(frozen=True)
class Record:
    """Result of one evaluated run, with its protocol, provenance and cost.

    Args:
        method: Class name of the method.
        variant: Distinguishes this result from others of the method; may be empty.
        dataset: Reference data.
        protocol: Evaluation protocol.
        draft: True if the run deviates from the protocol (`--draft`); drafts are listed last and never ranked.
        config: Resolved configuration of the run.
        config_sha256: `canonical_sha256(config)`.
        code: Code and library versions.
        seeds: Seeds by purpose, such as training (absent if not seeded) and sampling.
        checkpoint: Weights of the model; `None` for a model tested right after `fit`.
        extractor: Weights of the feature extractor.
        hardware: Name of the device.
        created: UTC time in ISO 8601.
        wall_time_seconds: Duration of the evaluation.
        metrics: Metrics by key.
        solver: Sampler of the denoising chain.
        nfe: Network evaluations per image.
        num_steps: SNN time steps `T`.
        cost: Operations, energy and throughput per image.
        conditional: Scale of guidance of a class-conditional model, 1 without guidance; None if it is unconditional.
        source: `"measured"`; published results are stored separately.
        schema_version: Version of this schema.
    """

    method: str
    variant: str
    dataset: Dataset
    protocol: ProtocolEntry
    draft: bool
    config: dict[str, Any]
    config_sha256: str
    code: Code
    seeds: dict[str, int]
    checkpoint: Artefact | None
    extractor: Artefact
    hardware: str
    created: str
    wall_time_seconds: float
    metrics: dict[str, MetricValue]
    solver: str
    nfe: int
    num_steps: int
    cost: Cost
    conditional: float | None = None
    source: Literal["measured"] = "measured"
    schema_version: Literal[1] = SCHEMA_VERSION


def write_record(record: Record, folder: str | Path) -> Path:
    """Writes a record atomically to a new file in `folder` and returns the path.

    Raises:
        RecordError: If the record violates the schema, for example with a non-finite number.
        FileExistsError: If the same record exists already.
    """
    name, text = _file(record)
    path = Path(folder) / name
    if path.exists():
        raise FileExistsError(f"{path} exists, and records are never overwritten; evaluate again to write a new one")
    write_atomic(path, text)
    return path


def record_name(record: Record) -> str:
    """Returns the file name that `write_record` chooses.

    Raises:
        RecordError: If the record violates the schema.
    """
    return _file(record)[0]


def record_text(record: Record) -> str:
    """Returns the file content that `write_record` writes.

    Raises:
        RecordError: If the record violates the schema.
    """
    return _file(record)[1]


def record_data(record: Record) -> dict[str, Any]:
    """Returns a record as the JSON object in its file; `conditional` is only in those of conditional models."""
    data = asdict(record)
    if record.conditional is None:
        del data["conditional"]
    return data


def _file(record: Record) -> tuple[str, str]:
    """Returns the file name and content of a record."""
    data = record_data(record)
    created = _check(data, f"new record of {record.method}")
    text = json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"
    short = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{created:%Y%m%dT%H%M%SZ}-{_slug(record.method)}-{_slug(record.dataset.name)}-{short}.json", text


def read_record(path: str | Path) -> Record:
    """Reads and validates one record; a method that has been renamed has its present name.

    Raises:
        RecordError: If the file is not valid JSON, violates the schema, or was edited so that a hash does not match.
    """
    path = Path(path)
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ValueError(f"{size:,} bytes, more than the maximum of {LARGEST_FILE:,}")
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object_without_duplicates)
    except SchemaError as error:
        raise RecordError(f"{path}: field {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path}: not a readable JSON file ({error})") from error
    _check(data, str(path))
    record = from_json(Record, data)
    config = with_present_name(record.config)
    if config is record.config or record.method != FORMER_METHOD:
        return record
    return replace(record, method=PRESENT_METHOD, config=config, config_sha256=canonical_sha256(config))


def redact_paths(record: Record) -> Record:
    """Removes folders of the measuring machine from the configuration and data source of a record.

    Paths outside the working folder (absolute, relative to a home folder, or starting with `..`) keep only their last
    component, prefixed with `REDACTED`.
    """
    config = _redact(record.config)
    source = _redact(record.dataset.source)
    return replace(
        record, config=config, config_sha256=canonical_sha256(config), dataset=replace(record.dataset, source=source)
    )


def _redact(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _redact(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_redact(item) for item in value]
    return _OUTSIDE.sub(REDACTED, value) if isinstance(value, str) else value


def check_name(field: str, name: str, required: bool = True) -> None:
    """Checks that a name is safe to show in tables, file names and pages: no markup, path or control character.

    Raises:
        SchemaError: If it has other characters, is longer than 100, or is empty although required.
    """
    if not _NAME.fullmatch(name) or not required <= len(name) <= 100:
        raise SchemaError(
            f"{field}: expected a name of {int(required)} to 100 letters, digits, spaces or any of . , : ; = + - _ ( ) "
            f"%, without '..', found {name[:100]!a}"
        )


def find_records(folders: Iterable[str | Path]) -> list[Path]:
    """Returns, sorted, the `*.json` files directly in each folder and in any `records` folder below it."""
    found: set[Path] = set()
    for folder in map(Path, folders):
        found.update(folder.glob("*.json"), folder.glob("**/records/*.json"))
    return sorted(found)


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object; rejects duplicate names, of which `json` would silently keep only the last value."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SchemaError(f"{twice[:100]!a}: the field occurs twice")
    return dict(pairs)


def _check(data: Any, where: str) -> datetime:
    """Validates the JSON form of a record and returns its creation time in UTC."""
    try:
        record = from_json(Record, data)
        check_name("method", record.method)
        check_name("variant", record.variant, required=False)
        check_name("dataset.name", record.dataset.name)
        check_name("protocol.name", record.protocol.name)
        check_name("extractor.name", record.extractor.name)
        for key in record.metrics:
            check_name("metrics", key)
        for field, value, expected in (
            ("protocol.sha256", record.protocol.sha256, canonical_sha256(record.protocol.description)),
            ("config_sha256", record.config_sha256, canonical_sha256(record.config)),
        ):
            if value != expected:
                raise SchemaError(f"{field}: {value} does not match the content, {expected}; the record was edited")
        _check_protocol(record.protocol)
        return _time(record.created)
    except SchemaError as error:
        raise RecordError(f"{where}: field {error}") from error


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
        utc = time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise SchemaError(f"created: expected an ISO 8601 time, found {text[:60]!r}") from None
    if time.tzinfo is None:
        raise SchemaError(f"created: expected a time with time zone (UTC), found {text[:60]!r}")
    return utc


def _check_protocol(protocol: ProtocolEntry) -> None:
    """Checks that the protocol is one of the published ones, unchanged."""
    if protocol.name not in LOCKED:
        raise SchemaError(f"protocol.name: {protocol.name!r} is unknown; expected one of: {', '.join(LOCKED)}")
    if protocol.sha256 != LOCKED[protocol.name]:
        raise SchemaError(
            f"protocol.sha256: {protocol.sha256[:8]} differs from {LOCKED[protocol.name][:8]} of the published "
            f"{protocol.name!r}; evaluate again under this protocol"
        )


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", text)
