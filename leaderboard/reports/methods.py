"""Rows of the tables: methods with their training seeds."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from leaderboard.protocols import SUPERSEDED_BY
from leaderboard.record.entries import STATUSES, Entry, Status, headline
from leaderboard.record.records import Record
from leaderboard.reports.statistics import Group, rank_intervals

_PER_RUN_KEYS = {"default_root_dir", "init_from", "ckpt_path", "seed_everything", "root", "cache_dir", "variant"} | {
    "fad_dir",
    "inception_weights",
    "torchvision_weights",
    "extractor",  # whose hash distinguishes tables
    "keep_samples",
}
"""Configuration keys that may differ between the seeds of one row."""


@dataclass(frozen=True)
class Method:
    """Records of one table that differ only in the training seed.

    Args:
        entries: Newest record of each training, by seed; two tests of one training are not independent.
        older: Other records of the same trainings.
    """

    entries: tuple[Entry, ...]
    older: tuple[Entry, ...] = ()

    @property
    def record(self) -> Record:
        """Record of the first seed."""
        return self.entries[0].record

    @property
    def status(self) -> Status:
        """Whether the row is ranked, or why it is not."""
        return self.entries[0].status

    @property
    def is_ranked(self) -> bool:
        """True if the row is comparable with the others of its table by rank."""
        return self.entries[0].is_ranked

    @property
    def variant(self) -> str:
        """Variant without the seed."""
        return _seedless(self.record.variant)

    @property
    def name(self) -> str:
        """Method, variant and the mark of code outside the suite on one line."""
        named = self.variant not in ("", "default")
        external = bool(self.record.code.external)
        parts = [method_name(self.record), *[self.variant] * named, *["external code"] * external]
        return " ".join(", ".join(parts).split())

    @cached_property
    def frechet(self) -> float:
        """Mean Fréchet distance, by which rows are sorted; infinite if not measured."""
        return statistics.fmean(entry.frechet for entry in self.entries)

    @property
    def trainings(self) -> list[Hashable]:
        """Identifies each training, by its seed if it has one."""
        return [_training(entry) for entry in self.entries]

    def values(self, key: str) -> Group:
        """Returns the values of a metric by training."""
        return {_training(e): e.record.metrics[key].value for e in self.entries if key in e.record.metrics}

    def mean_cost(self, name: str) -> float | None:
        """Returns the mean of a cost per image, a field of `Cost`, over the trainings that have it."""
        found = [value for e in self.entries if (value := getattr(e.record.cost, name, None)) is not None]
        return statistics.fmean(found) if found else None


def tables(records: Iterable[tuple[Path, Record]]) -> list[list[Method]]:
    """Groups comparable records, which are passed as `(file, record)` pairs.

    Returns:
        One list of rows per table, sorted by status, then by mean Fréchet distance. Of a dataset, the tables under the
        newest protocols come first.
    """
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for pair in records:
        groups.setdefault(Entry(*pair).table_key, []).append(Entry(*pair))
    newest_first = sorted(groups, key=lambda key: (key[0], _successors(key[1]), key))
    return [fold(groups[key]) for key in newest_first]


def _successors(protocol: str) -> int:
    """Returns how often a protocol was superseded."""
    return 1 + _successors(SUPERSEDED_BY[protocol]) if protocol in SUPERSEDED_BY else 0


def fold(entries: Iterable[Entry]) -> list[Method]:
    """Folds the seeds of comparable entries into rows."""
    rows: dict[str, list[Entry]] = {}
    for entry in entries:
        rows.setdefault(row_key(entry), []).append(entry)
    methods = [_method(members) for members in rows.values()]
    return sorted(methods, key=lambda m: (STATUSES.index(m.status), m.frechet, m.entries[0].path.name))


def _method(entries: Iterable[Entry]) -> Method:
    ordered = sorted(entries, key=lambda e: (e.time(), e.path.name))
    newest = {_training(entry): entry for entry in ordered}
    kept = sorted(newest.values(), key=lambda e: (e.record.seeds.get("training", math.inf), e.path.name))
    return Method(tuple(kept), tuple(entry for entry in reversed(ordered) if entry not in kept))


def ranks(methods: Sequence[Method]) -> list[tuple[int, int] | None]:
    """Returns the first and last rank of each row of a table by Fréchet distance; None for rows without a rank."""
    ranked = [method for method in methods if method.is_ranked and math.isfinite(method.frechet)]
    groups = [method.values(headline(method.record)[0]) for method in ranked]
    found = iter(rank_intervals(groups))
    return [next(found) if method in ranked else None for method in methods]


def method_name(record: Record) -> str:
    """Returns the method, marked if it is conditional, with the scale of guidance unless that is off."""
    if record.conditional is None:
        return record.method
    scale = "" if record.conditional == 1 else f", guidance {record.conditional:g}"
    return f"{record.method} (conditional{scale})"


def row_key(entry: Entry) -> str:
    """Returns a key that is equal for entries that differ only in the training seed."""
    record = entry.record
    made = record.images.fingerprint if record.images else None
    parts = [entry.status, method_name(record), _seedless(record.variant), record.solver, made, _shared(record.config)]
    return json.dumps(parts, sort_keys=True)


def _training(entry: Entry) -> Hashable:
    """Returns what identifies a training: its seed; without one, its checkpoint or file."""
    record = entry.record
    if (seed := record.seeds.get("training")) is not None:
        return seed
    return record.checkpoint.sha256 if record.checkpoint else entry.path.name


def _seedless(variant: str) -> str:
    """Removes a seed, such as ", seed 3", from the name of a variant."""
    return re.sub(r"[\s,;_-]*\bseed[\s=_]*\d+\b", "", variant)


def _shared(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _shared(value) for key, value in config.items() if key not in _PER_RUN_KEYS}
    return [_shared(value) for value in config] if isinstance(config, list) else config
