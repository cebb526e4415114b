"""Leaderboard records: one JSON file per evaluated run, checked against a strict schema and never overwritten."""

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
from leaderboard.schema import SchemaError, from_json

SCHEMA_VERSION: Final = 1
LARGEST_FILE = 4 * 2**20
"""Bytes of a record file; usual ones take some thousands."""
_NAME = re.compile(r"(?!.*\.\.)[\w .,:;=+()%-]*")
ELSEWHERE = ".../"
"""Stands in a record for the folders of a file or folder that lay outside the working folder."""
_OUTSIDE = re.compile(r"(?:^|(?<=\s))(?=[/\\]|~[^\s/\\]*[/\\]|\.\.[/\\]|[A-Za-z]:[/\\]).*[/\\](?=[^/\\])", re.DOTALL)


class RecordError(ValueError):
    """A record that breaks the schema; the message names the file and the field."""


@dataclass(frozen=True)
class MetricValue:
    """A metric with its uncertainty (one standard error or spread, as the metric says) and generated images behind it.

    Args:
        value: The metric.
        uncertainty: Its uncertainty, in the same unit.
        num_samples: Generated images that it was computed from.
        note: What a reader should know, such as a singular covariance; empty if nothing.
    """

    value: float
    uncertainty: float
    num_samples: int
    note: str = ""


@dataclass(frozen=True)
class Cost:
    """Cost of one generated image over its whole denoising chain (rules of counting: `leaderboard.evaluation.cost`).

    Args:
        parameters: Parameters of the network.
        trainable_parameters: Those that require gradients.
        nfe: Network evaluations per image.
        firing_rate: Mean over the neuron layers weighted by their neurons; `None` without neurons.
        firing_rates: Spikes per neuron and step of each neuron layer.
        sops: Synaptic operations: connections that a spike passed.
        macs: Multiply-accumulates.
        acs: Accumulates: `sops` and the biases of spike-fed layers.
        energy_strict_mj: Millijoules at 45 nm, layers fed by real values counted as MACs.
        energy_paper_mj: Millijoules by SDDPM's formula, all but the first convolution as ACs, of an ANN all as MACs;
            `None` if there are neurons but no layer is fed by spikes.
        images_per_second: Measured throughput of one device.
        peak_memory_bytes: Measured peak memory of the device while it generates.
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
    """Protocol of a record: its name, full description and hash (see `leaderboard.protocols.Protocol`)."""

    name: str
    description: dict[str, Any]
    sha256: str


@dataclass(frozen=True)
class Artefact:
    """A file or set of arrays that the result depends on: a checkpoint or an extractor."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Dataset:
    """Data of the reference: name, fingerprint of its content, and where it came from."""

    name: str
    fingerprint: str
    source: str


@dataclass(frozen=True)
class Code:
    """Versions that ran; commit and dirty flag are `None` outside a git checkout."""

    git_commit: str | None
    git_dirty: bool | None
    versions: dict[str, str]


@dataclass(frozen=True)
class Record:
    """One evaluated run: what was measured, how, with which code, data and weights, and at what cost.

    Args:
        method: Class name of the method.
        variant: What tells this entry from others of the method; may be empty.
        dataset: Reference data.
        protocol: How it was measured.
        draft: Whether the protocol was not kept to the letter (`--draft`); drafts are shown last and never ranked.
        config: Resolved configuration of the run.
        config_sha256: `canonical_sha256(config)`.
        code: Versions of everything that ran.
        seeds: Seeds by purpose, such as training (absent where it was not seeded) and sampling.
        checkpoint: Weights of the model; `None` for a model tested right after `fit`.
        extractor: Weights of the feature extractor.
        hardware: Device in words.
        created: UTC time in ISO 8601.
        wall_time_seconds: Time of the evaluation.
        metrics: Values by metric key.
        solver: Sampler of the denoising chain.
        nfe: Network evaluations per image.
        num_steps: SNN time steps `T`.
        cost: Operations, energy and throughput per image.
        source: `"measured"`; published numbers are kept elsewhere.
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
    source: Literal["measured"] = "measured"
    schema_version: Literal[1] = SCHEMA_VERSION


def write_record(record: Record, folder: str | Path) -> Path:
    """Writes a record to its own new file in `folder`, in one step, and returns the path.

    Raises:
        RecordError: If the record breaks the schema, for example by a number that is not finite.
        FileExistsError: If this very record is there already.
    """
    name, text = _file(record)
    path = Path(folder) / name
    if path.exists():
        raise FileExistsError(f"{path} exists; a record is never overwritten; evaluate again to write a new one")
    write_atomic(path, text)
    return path


def record_name(record: Record) -> str:
    """Returns the name of the file that `write_record` writes.

    Raises:
        RecordError: If the record breaks the schema.
    """
    return _file(record)[0]


def record_text(record: Record) -> str:
    """Returns the content of the file that `write_record` writes.

    Raises:
        RecordError: If the record breaks the schema.
    """
    return _file(record)[1]


def _file(record: Record) -> tuple[str, str]:
    """Returns name and content of a record's file."""
    data = asdict(record)
    created = _check(data, f"new record of {record.method}")
    text = json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"
    short = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{created:%Y%m%dT%H%M%SZ}-{_slug(record.method)}-{_slug(record.dataset.name)}-{short}.json", text


def read_record(path: str | Path) -> Record:
    """Reads and checks one record.

    Raises:
        RecordError: If the file is no JSON, breaks the schema, or was edited so that a hash no longer fits.
    """
    path = Path(path)
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ValueError(f"{size:,} bytes, a record has at most {LARGEST_FILE:,}")
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except SchemaError as error:
        raise RecordError(f"{path}: field {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path}: not a readable JSON file ({error})") from error
    _check(data, str(path))
    return from_json(Record, data)


def portable(record: Record) -> Record:
    """Returns a record whose configuration and data source name no folder of the machine that measured it.

    Of a path outside the working folder (absolute, of a home, or upwards) the last name stays, behind `ELSEWHERE`.
    """
    config = _without_places(record.config)
    source = _without_places(record.dataset.source)
    return replace(
        record, config=config, config_sha256=canonical_sha256(config), dataset=replace(record.dataset, source=source)
    )


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_places(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    return _OUTSIDE.sub(ELSEWHERE, value) if isinstance(value, str) else value


def check_name(field: str, name: str, required: bool = True) -> None:
    """Checks a name that tables, files and pages will show: no markup, no path, no control character.

    Raises:
        SchemaError: If it could do harm, is longer than 100 characters, or empty although required.
    """
    if not _NAME.fullmatch(name) or not required <= len(name) <= 100:
        raise SchemaError(
            f"{field}: expected a name of {int(required)} to 100 letters, digits, spaces or any of . , : ; = + - _ ( ) "
            f"%, without '..', found {name[:100]!a}"
        )


def find_records(folders: Iterable[str | Path]) -> list[Path]:
    """Returns the record files of each folder, sorted: its own `*.json` and those of any `records` folder below it."""
    found: set[Path] = set()
    for folder in map(Path, folders):
        found.update(folder.glob("*.json"), folder.glob("**/records/*.json"))
    return sorted(found)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object; of a name met twice, one value would else be lost without a word."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SchemaError(f"{twice[:100]!a}: the field is there twice")
    return dict(pairs)


def _check(data: Any, where: str) -> datetime:
    """Checks the JSON form of a record and returns its time of creation."""
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
                raise SchemaError(f"{field}: {value} is not the hash of the content, {expected}; the record was edited")
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
        raise SchemaError(f"created: expected a time with its zone (UTC), found {text[:60]!r}")
    return utc


def _check_protocol(protocol: ProtocolEntry) -> None:
    """Refuses what was not measured under a published protocol."""
    if protocol.name not in LOCKED:
        raise SchemaError(f"protocol.name: {protocol.name!r} is unknown; the protocols are: {', '.join(LOCKED)}")
    if protocol.sha256 != LOCKED[protocol.name]:
        raise SchemaError(
            f"protocol.sha256: {protocol.sha256[:8]} is not {protocol.name!r} as published, "
            f"{LOCKED[protocol.name][:8]}; evaluate again under the protocol"
        )


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", text)
