"""`python -m benchmark leaderboard add`: adds an external record after checking its schema and consistency."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from leaderboard.energy import strict_energy_mj
from leaderboard.files import canonical_sha256, write_atomic
from leaderboard.metrics.generation import metric_keys
from leaderboard.protocols import PROTOCOLS
from leaderboard.record.counts import LayerCounts, NeuronCounts
from leaderboard.record.entries import RECORDS, Entry
from leaderboard.record.records import Cost, Record, RecordError, find_records, read_record, redact_paths, write_record

_OPTIONAL = "fid_newton_schulz"
"""Metric that is missing from records in which its iteration diverged."""
_ROUNDING = 1e-6
"""Relative tolerance of recomputed numbers."""


def add(file: str, to: str = RECORDS) -> None:
    """Checks a record and copies it into the leaderboard under its canonical name, or prints why it is refused.

    The sample grid, the training images nearest to it and the repetitions kept by `leaderboard verify --keep` are
    copied with it.

    The checks cover the schema, the hashes, the protocol and the consistency of the numbers. Only `leaderboard verify`
    checks that the numbers can be reproduced.

    Args:
        file: Record to add.
        to: Folder of the records.

    Raises:
        SystemExit: With code 1 if the record is refused.
    """
    path = Path(file)
    try:
        record = redact_paths(read_record(path))
        problems = [*_name_problems(path), *find_problems(record), *_duplicates(record, Path(to))]
    except RecordError as error:
        problems = [str(error).removeprefix(f"{path}: ")]
    if problems:
        for problem in problems:
            print(f"refused: {ascii(file)[1:-1]}: {problem}", file=sys.stderr)
        raise SystemExit(1)
    added = write_record(record, to)
    print(f"added {added}")
    for name, code in (record.code.external or {}).items():
        print(f"external code: {name} {code}")
    old, new = Entry(path, record), Entry(added, record)
    for picture, target in ((old.samples, new.samples), (old.nearest, new.nearest)):
        if picture.is_file():
            write_atomic(target, picture.read_bytes())
    copied = {new.repetition: old.repetition} if old.repeated else {}
    copied |= {new.verification(name): old.verification(name) for name in old.verified}
    for target, repetition in copied.items():
        write_atomic(target, repetition.read_bytes())


def find_problems(record: Record) -> list[str]:
    """Returns the inconsistencies of a record, one line each."""
    return [
        *_metric_problems(record),
        *_sample_problems(record),
        *_cost_problems(record),
        *_provenance_problems(record),
    ]


def _name_problems(path: Path) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*\.json", path.name) or ".." in path.name:
        yield "the file name is not safe; use only letters, digits and . _ + -, and the suffix .json"


def _duplicates(record: Record, folder: Path) -> Iterator[str]:
    """Yields the files with the same content; ignores broken files in the folder."""
    content = canonical_sha256(asdict(record))
    for path in find_records([folder]):
        try:
            if canonical_sha256(asdict(read_record(path))) == content:
                yield f"the same record exists already: {path}"
        except RecordError:
            continue


def _metric_problems(record: Record) -> Iterator[str]:
    protocol, dataset = PROTOCOLS[record.protocol.name], record.dataset.name
    views = {view.extractor_name(dataset): view.metrics_for(dataset) for view in protocol.views}
    views = {extractor: families for extractor, families in views.items() if families}
    if record.extractor.name != " + ".join(views):
        yield f"extractor.name: expected {' + '.join(views)} for {protocol.name}, found {record.extractor.name!r}"
        return
    known = {key for name, families in views.items() for family in families for key in metric_keys(family, name)}
    if missing := sorted(known - record.metrics.keys() - {_OPTIONAL}):
        yield f"metrics: {', '.join(missing)} required by {protocol.name} but missing"
    if unknown := sorted(record.metrics.keys() - known - {*protocol.fad, *protocol.reconstruction}):
        yield f"metrics: {', '.join(unknown)} not part of {protocol.name}"
    for key, metric in record.metrics.items():
        if metric.uncertainty < 0:
            yield f"metrics.{key}.uncertainty: {metric.uncertainty:g} is negative"


def _sample_problems(record: Record) -> Iterator[str]:
    protocol = PROTOCOLS[record.protocol.name]
    if not record.metrics:
        return
    counts = {key: metric.num_samples for key, metric in record.metrics.items()}
    most = max(counts.values())
    if not record.draft and most < protocol.num_samples:
        yield f"draft: must be true, {most} images are fewer than the {protocol.num_samples} of {protocol.name}"
    if most > protocol.max_samples:
        yield f"metrics: {most} generated images exceed the maximum of {protocol.max_samples} of {protocol.name}"
    configured = _configured_samples(record.config)
    if not record.draft and configured not in (None, most):
        yield f"metrics: {most} generated images, but the configuration sets num_samples to {configured}"
    kept = min((view.kept_images for view in protocol.views if view.kept_images), default=most)
    bounded = {  # use no more generated images than there are real ones
        key
        for view in protocol.views
        for family, options in view.metrics.items()
        if "images" in options
        for key in metric_keys(family, view.extractor_name(record.dataset.name))
    }
    for key, count in counts.items():
        if key.startswith("reconstruction_"):
            if count != 0:
                yield f"metrics.{key}.num_samples: {count}, expected 0: a reconstruction uses no generated images"
        elif key not in bounded and count < min(most, kept):
            yield f"metrics.{key}.num_samples: computed from only {count} of the {most} generated images"


def _configured_samples(config: Any) -> Any:
    """Returns the number of images set in a configuration, or None."""
    for name in ("data", "init_args", "num_samples"):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _count_problems(cost: Cost) -> Iterator[str]:
    """Checks the operations by layer, from which tables compute energy, against the totals."""
    if cost.counts is None:
        return
    counts = cost.counts
    parts: dict[str, LayerCounts | NeuronCounts] = {**counts.layers, **counts.neurons}
    numbers = {f"{name}.{key}": value for name, part in parts.items() for key, value in asdict(part).items()}
    for name, value in (numbers | counts.additions | {"footprint_bytes": counts.footprint_bytes}).items():
        if value < 0:
            yield f"cost.counts: {name}: {value:g} is negative"
    for name in ("sops", "macs", "acs"):
        total, found = getattr(cost, name), counts.total(name)
        if not math.isclose(total, found, rel_tol=_ROUNDING):
            yield f"cost.counts: {name} of all layers sum to {found:g}, not to cost.{name} = {total:g}"


def _cost_problems(record: Record) -> Iterator[str]:
    if (cost := record.cost) is None:
        return
    for name, value in asdict(cost).items():
        if isinstance(value, int | float) and value < 0:
            yield f"cost.{name}: {value:g} is negative"
    yield from _count_problems(cost)
    energy = strict_energy_mj(cost.macs, cost.acs)
    if not math.isclose(cost.energy_strict_mj, energy, rel_tol=_ROUNDING):
        yield f"cost.energy_strict_mj: {cost.energy_strict_mj:g} mJ, but its MACs and ACs amount to {energy:g} mJ"
    if cost.acs < cost.sops * (1 - _ROUNDING):
        yield f"cost.acs: {cost.acs:g} accumulates, fewer than the {cost.sops:g} synaptic operations they include"
    if cost.trainable_parameters > cost.parameters:
        yield f"cost.trainable_parameters: {cost.trainable_parameters} exceeds the {cost.parameters} parameters"
    if record.images is None or cost.firing_rates:  # others may state the mean only
        yield from _rate_problems(cost.firing_rate, cost.firing_rates)


def _rate_problems(mean: float | None, rates: dict[str, float]) -> Iterator[str]:
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            yield f"cost.firing_rates.{name}: {rate:g} is not between 0 and 1"
    if mean is None or not rates:
        if mean is not None or rates:
            yield "cost.firing_rate: expected both the mean and the rates of the layers, or neither"
    elif not min(rates.values()) - _ROUNDING <= mean <= max(rates.values()) + _ROUNDING:
        yield f"cost.firing_rate: the mean {mean:g} is outside the range of the layers' rates"


def _provenance_problems(record: Record) -> Iterator[str]:
    if record.cost is not None and record.nfe != record.cost.nfe:
        yield f"cost.nfe: {record.cost.nfe} differs from nfe: {record.nfe}"
    for name, count in (
        ("nfe", record.nfe),
        ("num_steps", record.num_steps),
        ("cost.parameters", record.cost and record.cost.parameters),
    ):
        if isinstance(count, int) and count < 1:
            yield f"{name}: {count} is below 1"
    if record.wall_time_seconds < 0:
        yield f"wall_time_seconds: {record.wall_time_seconds:g} is negative"
    if datetime.fromisoformat(record.created) > datetime.now(UTC):
        yield f"created: {record.created} is in the future"
    if record.images is not None:
        most = max((metric.num_samples for metric in record.metrics.values()), default=0)
        if record.images.count != most:
            yield f"images.count: {record.images.count}, but the metrics are of {most} images"
        if not 0 <= record.images.copies < max(record.images.count, 1):
            yield f"images.copies: {record.images.copies} of {record.images.count} images"
    elif record.checkpoint is None:
        yield "checkpoint: missing, so the evaluation cannot be repeated; test a saved checkpoint with --ckpt_path"
    hashes = {"dataset.fingerprint": record.dataset.fingerprint, "extractor.sha256": record.extractor.sha256}
    if record.images is not None:
        hashes["images.fingerprint"] = record.images.fingerprint
    for i, data in enumerate(record.training_data or ()):
        if data.name != "unknown":
            hashes[f"training_data.{i}.fingerprint"] = data.fingerprint
    if record.checkpoint is not None:
        hashes["checkpoint.sha256"] = record.checkpoint.sha256
    for name, text in hashes.items():
        if not re.fullmatch(r"[0-9a-f]{64}", text):
            yield f"{name}: expected a SHA-256 of 64 hexadecimal digits, found {text[:80]!a}"
