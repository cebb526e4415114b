"""Leaderboard records: one JSON file per evaluated run, validated against a strict schema and never overwritten."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import Any, Final, Literal

from leaderboard.files import canonical_sha256, write_atomic
from leaderboard.protocols import LOCKED
from leaderboard.record.counts import OperationCounts
from leaderboard.record.external import ExternalCode
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
        parameters: Parameters of the network and of all other modules that generate.
        trainable_parameters: Parameters that require gradients.
        nfe: Network evaluations per image.
        firing_rate: Mean over the neuron layers, weighted by number of neurons; `None` without neurons.
        firing_rates: Spikes per neuron and time step, by spiking layer.
        sops: Synaptic operations: accumulates caused by spikes.
        macs: Multiply-accumulates.
        acs: Accumulates: `sops` plus the biases of layers with spike inputs.
        energy_strict_mj: Energy in mJ at 45 nm; layers with real-valued inputs count as MACs.
        energy_paper_mj: Energy in mJ by SDDPM's formula: all layers but the first convolution count as ACs, for an ANN
            all as MACs; `None` if the network has neurons but no layer with spike inputs.
        images_per_second: Measured throughput on one device.
        peak_memory_bytes: Measured peak device memory during generation.
        incomplete: Calls of products of matrices that could not be counted, by name; `None` if all were counted.
        counts: Operations by layer; `None` in records of versions that did not store them.
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
    incomplete: dict[str, int] | None = None
    counts: OperationCounts | None = None


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
    """Evaluation data: name, fingerprint of its content, source, and geometry of the images the model generates."""

    name: str
    fingerprint: str
    source: str
    geometry: dict[str, Any] | None = None


@dataclass(frozen=True)
class TrainingData:
    """Data that the weights were trained on.

    Args:
        name: Name of the dataset; `"unknown"` for weights of unknown origin, whose other fields are empty.
        fingerprint: Fingerprint of its content.
        geometry: Settings that the pixels the model sees depend on, such as their size.
        images: Number of training images.
    """

    name: str
    fingerprint: str = ""
    geometry: dict[str, Any] | None = None
    images: int | None = None

    def difference(self, dataset: Dataset) -> str:
        """Describes in words how this data differs from the evaluation data; empty if it does not, or is unknown."""
        if not self.fingerprint:
            return ""
        if self.name != dataset.name:
            return f"trained on {self}, evaluated on {dataset.name}"
        if self.fingerprint != dataset.fingerprint:
            return f"trained on other images of {self.name} ({self.fingerprint[:8]}, not {dataset.fingerprint[:8]})"
        seen, compared = self.geometry or {}, dataset.geometry or {}
        changed = [key for key in sorted(seen.keys() | compared.keys()) if seen.get(key) != compared.get(key)]
        if self.geometry is None or dataset.geometry is None or not changed:
            return ""
        before, now = (", ".join(f"{key} {part.get(key)}" for key in changed) for part in (seen, compared))
        return f"trained on {self.name} with {before}, evaluated with {now}"

    def __str__(self) -> str:
        return f"{self.name} ({self.fingerprint[:8]})" if self.fingerprint else self.name


@dataclass(frozen=True)
class ImageSet:
    """Images made by other code, which were measured without their model.

    Args:
        fingerprint: SHA-256 of their pixels, in order.
        count: Number of images.
        copies: Number of images that repeat an earlier one exactly.
        source: File or folder and file formats they were read from.
        url: Web address of the code or paper; may be empty.
    """

    fingerprint: str
    count: int
    copies: int
    source: str
    url: str = ""


@dataclass(frozen=True)
class Code:
    """Code and library versions; commit and dirty flag are `None` outside a git checkout.

    `external` contains the packages outside the suite that the result depends on, by import name.
    """

    git_commit: str | None
    git_dirty: bool | None
    versions: dict[str, str]
    external: dict[str, ExternalCode] | None = None


@dataclass(frozen=True)
class Design:
    """Design of a study that a result belongs to: its name, and a hash of its files, which are fixed beforehand."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Record:
    """Result of one evaluated run, with its protocol, provenance and cost.

    A record of kind *images only* has `images`. Its model did not run: it has no checkpoint and no seeds, and what its
    authors do not state (solver, cost) is empty or `None`.

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
        images: The images, if they were made by other code; `None` if the suite ran the model.
        training_data: Data that the weights were trained on, oldest first; `None` in records of versions that did not
            store it.
        conditional: Scale of guidance of a class-conditional model, 1 without guidance; None if it is unconditional.
        nearest: Index in the reference of the training image nearest to each of the first generated images, by their
            features; `None` where it was not measured.
        design: Design of the study whose configuration the model was trained with; `None` outside of studies.
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
    nfe: int | None
    num_steps: int | None
    cost: Cost | None
    images: ImageSet | None = None
    training_data: tuple[TrainingData, ...] | None = None
    conditional: float | None = None
    nearest: tuple[int, ...] | None = None
    design: Design | None = None
    source: Literal["measured"] = "measured"
    schema_version: Literal[1] = SCHEMA_VERSION

    @property
    def counted_cost(self) -> Cost:
        """Cost of a model that the suite ran.

        Raises:
            ValueError: If the record is of kind *images only* and states no cost.
        """
        if self.cost is None:
            raise ValueError(f"the record of {self.method} is of images only and states no cost")
        return self.cost

    @property
    def transfers(self) -> list[str]:
        """Differences between training and evaluation data in words; empty where both are the same or unknown."""
        return [difference for data in self.training_data or () if (difference := data.difference(self.dataset))]


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


_ADDED = (
    ("images",),
    ("conditional",),
    ("training_data",),
    ("nearest",),
    ("design",),
    ("dataset", "geometry"),
    ("code", "external"),
    ("cost", "incomplete"),
    ("cost", "counts"),
)
"""Paths of optional fields that earlier versions did not have; files omit them where they are `None`."""


def record_json(record: Record) -> dict[str, Any]:
    """Returns the JSON form of a record, as in its file."""
    data = asdict(record)
    for *parents, name in _ADDED:
        part: dict[str, Any] | None = reduce(dict.__getitem__, parents, data)
        if part is not None and part[name] is None:
            del part[name]
    return data


def _file(record: Record) -> tuple[str, str]:
    """Returns the file name and content of a record."""
    data = record_json(record)
    created = _check(data, f"new record of {record.method}")
    text = json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"
    short = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{created:%Y%m%dT%H%M%SZ}-{_slug(record.method)}-{_slug(record.dataset.name)}-{short}.json", text


def read_record(path: str | Path) -> Record:
    """Reads and validates one record; a method that has been renamed has its present name.

    Raises:
        RecordError: If the file does not exist, is not valid JSON, violates the schema, or was edited so that a hash
            does not match.
    """
    path = Path(path)
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ValueError(f"{size:,} bytes, more than the maximum of {LARGEST_FILE:,}")
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object_without_duplicates)
    except SchemaError as error:
        raise RecordError(f"{path}: field {error}") from error
    except FileNotFoundError as error:
        raise RecordError(
            f"{path}: no such file; give the path of a record, such as runs/RUN/records/NAME.json"
        ) from error
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
    images = record.images and replace(record.images, source=_redact(record.images.source))
    dataset = replace(record.dataset, source=source)
    return replace(record, config=config, config_sha256=canonical_sha256(config), dataset=dataset, images=images)


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


def check_url(field: str, url: str) -> None:
    """Checks that a web address is one, or empty.

    Raises:
        SchemaError: If it is neither.
    """
    if not re.fullmatch(r"(https?://[^\s<>\"']+)?", url):
        raise SchemaError(f"{field}: expected an http(s) address, found {url[:100]!a}")


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
        for data_name in (data.name for data in record.training_data or ()):
            check_name("training_data", data_name)
        check_name("protocol.name", record.protocol.name)
        check_name("extractor.name", record.extractor.name)
        if record.design is not None:
            check_name("design.name", record.design.name)
        for key in record.metrics:
            check_name("metrics", key)
        for field, value, expected in (
            ("protocol.sha256", record.protocol.sha256, canonical_sha256(record.protocol.description)),
            ("config_sha256", record.config_sha256, canonical_sha256(record.config)),
        ):
            if value != expected:
                raise SchemaError(f"{field}: {value} does not match the content, {expected}; the record was edited")
        _check_protocol(record.protocol)
        _check_model(record)
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


def _check_model(record: Record) -> None:
    """Checks that solver, steps and cost are known if the suite ran the model."""
    if record.images is None:
        for field, value in (("nfe", record.nfe), ("num_steps", record.num_steps), ("cost", record.cost)):
            if value is None:
                raise SchemaError(f"{field}: null, which only a record with `images` may have")
    elif record.checkpoint is not None:
        raise SchemaError("checkpoint: a record with `images` was measured without a model; expected null")
    else:
        check_url("images.url", record.images.url)


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
