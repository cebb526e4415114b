"""Baselines of the regression check: records of several seeds and the comparison of a new record with them."""

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
"""Folder of the shipped baselines, `<configuration>/*.json`, one record per seed."""

SPREADS = 4.0
"""Tolerance around the mean of a baseline, in standard deviations over its seeds."""

FLOOR = 0.15
"""Minimum tolerance as a fraction of the mean, because a spread over few seeds can be small by chance."""

FEWEST_SEEDS = 3
"""Minimum number of seeds of a baseline."""

_RUN_PATHS = ("trainer.default_root_dir", "model.init_args.init_from", "data.init_args.cache_dir")
"""Configuration entries that differ between runs and are not compared."""


class Verdict(Enum):
    """Result of the comparison with a baseline."""

    OK = "ok"
    WORSE = "WORSE"
    BETTER = "better: why?"


@dataclass(frozen=True)
class Baseline:
    """Distances of one configuration, trained with several seeds.

    Rounding differs between processors and can change a training as much as another seed does. A baseline may
    therefore hold several records of a seed, measured on different processors.

    Args:
        records: One record or more per seed.
    """

    records: Sequence[Record]

    @property
    def values(self) -> list[float]:
        """Distance of each seed."""
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
        """Allowed deviation from the mean: `max(SPREADS * spread, FLOOR * mean)`."""
        return max(SPREADS * self.spread, FLOOR * self.mean)

    def judge(self, distance: float) -> Verdict:
        """Returns whether a distance is within the tolerance, above it or below it."""
        if distance > self.mean + self.tolerance:
            return Verdict.WORSE
        return Verdict.BETTER if distance < self.mean - self.tolerance else Verdict.OK

    def same_seed(self, record: Record) -> float | None:
        """Returns the nearest distance among the baseline's records with the same seeds, or None."""
        distance = headline(record)[1].value
        found = [v for r, v in zip(self.records, self.values, strict=True) if r.seeds == record.seeds]
        return min(found, key=lambda value: abs(value - distance), default=None)

    def miscounts(self, record: Record) -> list[str]:
        """Returns the differences in costs that do not depend on training.

        MACs are among these costs, because the network's structure determines which layers have real-valued inputs.
        """
        old, new = self.records[0].counted_cost, record.counted_cost
        counts = (
            ("parameters", new.parameters, old.parameters),
            ("network evaluations", new.nfe, old.nfe),
            ("MACs", new.macs, old.macs),
        )
        return [
            f"{name}: {now:,.0f}, but {then:,.0f} in the baseline"
            for name, now, then in counts
            if not math.isclose(now, then)
        ]

    def differences(self, record: Record) -> list[str]:
        """Returns the reasons why a record is not comparable: other data, extractor, protocol or configuration.

        Options that only one of the two has are ignored, because options may have been added in the meantime.
        """
        old = self.records[0]
        found = [
            f"{name} is {new}, but {then} in the baseline"
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
        FileNotFoundError: If it has fewer than `FEWEST_SEEDS` records.
        RecordError: If a record is broken.
    """
    records = [read_record(path) for path in find_records([folder])]
    if len(records) < FEWEST_SEEDS:
        raise FileNotFoundError(
            f"{folder} has {len(records)} records, but a baseline needs {FEWEST_SEEDS} seeds or more; create it with: "
            f"python -m benchmark regress --update --methods {folder.name}"
        )
    return Baseline(records)


def write_baseline(records: Sequence[Record], folder: Path) -> None:
    """Writes the baseline of a configuration and deletes the old one."""
    before = sorted(folder.glob("*.json"))
    for record in records:
        write_record(record, folder)
    for path in before:
        path.unlink()


def _explicit(config: Mapping[str, Any], part: str) -> Any:
    """Returns a part of a configuration; in older records, precision null means full precision."""
    options = config.get(part)
    if part == "trainer" and isinstance(options, Mapping):
        return {**options, "precision": options.get("precision") or "32-true"}
    return options


def _differences(new: Any, old: Any, where: str) -> Iterator[str]:
    if isinstance(new, dict) and isinstance(old, dict):
        for key in sorted(new.keys() & old.keys()):
            yield from _differences(new[key], old[key], f"{where}.{key}")
    elif new != old and where not in _RUN_PATHS:
        yield f"{where} is {new}, but {old} in the baseline"
