"""Baselines of the regression check: records of several seeds, and whether a new record is as good as they are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from leaderboard.record.entries import headline
from leaderboard.record.records import Record, find_records, read_record, write_record

BASELINES = Path(__file__).parent / "data" / "baselines"
"""Folder of the shipped baselines, `<configuration>/*.json`, one record for each seed."""

SPREADS = 4.0
"""Standard deviations over the seeds of a baseline by which a distance may differ from its mean."""

FLOOR = 0.15
"""Share of the mean by which it may always differ: a spread over few seeds can be small by chance."""

FEWEST_SEEDS = 3
"""Seeds that a spread is measured with, at least."""

_PLACES = ("trainer.default_root_dir", "model.init_args.init_from", "data.init_args.cache_dir")
"""Entries of a configuration that change from run to run."""


class Verdict(Enum):
    """What a comparison with a baseline says."""

    OK = "ok"
    WORSE = "WORSE"
    BETTER = "better: why?"


@dataclass(frozen=True)
class Baseline:
    """Distances of one configuration, trained with several seeds.

    Args:
        records: One record for each seed.
    """

    records: Sequence[Record]

    @property
    def values(self) -> list[float]:
        """The distance of each seed."""
        return [headline(record)[1].value for record in self.records]

    @property
    def mean(self) -> float:
        """Mean distance."""
        return statistics.mean(self.values)

    @property
    def spread(self) -> float:
        """Sample standard deviation over the seeds."""
        return statistics.stdev(self.values)

    @property
    def tolerance(self) -> float:
        """How far a distance may lie from the mean: `SPREADS` standard deviations, at least `FLOOR` of the mean."""
        return max(SPREADS * self.spread, FLOOR * self.mean)

    def judge(self, distance: float) -> Verdict:
        """Says whether a distance lies within the tolerance, above or below."""
        if distance > self.mean + self.tolerance:
            return Verdict.WORSE
        return Verdict.BETTER if distance < self.mean - self.tolerance else Verdict.OK

    def same_seed(self, record: Record) -> float | None:
        """Returns the distance of the baseline's record of the same training seed, if there is one."""
        found = [v for r, v in zip(self.records, self.values, strict=True) if r.seeds == record.seeds]
        return found[0] if found else None

    def miscounts(self, record: Record) -> list[str]:
        """Names what no training changes in the cost of a configuration, and yet differs.

        Multiply-accumulates are among it: which layers see real values is a property of the network.
        """
        old, new = self.records[0].cost, record.cost
        counts = (
            ("parameters", new.parameters, old.parameters),
            ("network evaluations", new.nfe, old.nfe),
            ("MACs", new.macs, old.macs),
        )
        return [
            f"{name}: {now:,.0f}, in the baseline {then:,.0f}"
            for name, now, then in counts
            if not math.isclose(now, then)
        ]

    def differences(self, record: Record) -> list[str]:
        """Names what keeps a record from being compared: other data, extractor, protocol or configuration.

        Options that only one of the two has, such as one that was added since, do not count.
        """
        old = self.records[0]
        found = [
            f"{name} is {new}, in the baseline {then}"
            for name, new, then in (
                ("extractor", record.extractor.sha256[:8], old.extractor.sha256[:8]),
                ("dataset", record.dataset.fingerprint[:8], old.dataset.fingerprint[:8]),
                ("protocol", record.protocol.name, old.protocol.name),
                ("metric", headline(record)[0], headline(old)[0]),
            )
            if new != then
        ]
        for part in ("model", "data", "trainer"):
            found += _differences(_explicit(record.config, part), _explicit(old.config, part), part)
        return found


def read_baseline(folder: Path) -> Baseline:
    """Reads the baseline of a configuration.

    Raises:
        FileNotFoundError: If it has too few records.
        RecordError: If one is broken.
    """
    records = [read_record(path) for path in find_records([folder])]
    if len(records) < FEWEST_SEEDS:
        raise FileNotFoundError(
            f"{folder} has {len(records)} records, a baseline takes {FEWEST_SEEDS} seeds or more; measure it with: "
            f"python -m benchmark regress --update --methods {folder.name}"
        )
    return Baseline(records)


def write_baseline(records: Sequence[Record], folder: Path) -> None:
    """Replaces the baseline of a configuration."""
    before = find_records([folder])
    for record in records:
        write_record(record, folder)
    for path in before:
        path.unlink()


def _explicit(config: Mapping[str, Any], part: str) -> Any:
    """Returns a part of a configuration; null was full precision before a precision was chosen for each device."""
    options = config.get(part)
    if part == "trainer" and isinstance(options, Mapping):
        return {**options, "precision": options.get("precision") or "32-true"}
    return options


def _differences(new: Any, old: Any, where: str) -> Iterator[str]:
    if isinstance(new, dict) and isinstance(old, dict):
        for key in sorted(new.keys() & old.keys()):
            yield from _differences(new[key], old[key], f"{where}.{key}")
    elif new != old and where not in _PLACES:
        yield f"{where} is {new}, in the baseline {old}"
