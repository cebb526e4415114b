"""Comparison of a record with its repetition by `leaderboard verify`.

A metric agrees if it differs from the recorded value by at most the recorded uncertainty, and a cost if it differs by
at most 1 %, because rounding on another device may flip single spikes. On the same device with the same versions a
repetition is bit-equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from leaderboard.record.differences import Row, differences, provenance
from leaderboard.record.records import MetricValue, Record

ROUNDING = 1e-6
"""Relative tolerance of metrics, which matters if the recorded uncertainty is 0."""
COUNTED = ("parameters", "nfe", "firing_rate", "sops", "macs", "acs", "energy_strict_mj", "energy_paper_mj")
"""Costs that a repetition must reproduce; speed and memory depend on the device."""
COST_TOLERANCE = 0.01
"""Relative tolerance of these costs."""
_SHARED = ("dataset", "protocol sha256", "solver", "NFE", "SNN time steps", "conditional")
"""Entries of `provenance` that must be equal in any case."""


@dataclass(frozen=True)
class Repetition:
    """A record and the record of its repetition."""

    recorded: Record
    repeated: Record

    @cached_property
    def metrics(self) -> list[tuple[str, ...]]:
        """Name, both values, difference and agreement ("yes" or "no") of each metric."""
        return list(_metrics(self.recorded, self.repeated))

    @cached_property
    def costs(self) -> list[tuple[str, ...]]:
        """Name, both values, difference and agreement ("yes" or "no") of each cost in `COUNTED`."""
        return list(_costs(self.recorded, self.repeated))

    @cached_property
    def provenance(self) -> list[Row]:
        """Name and both values of everything else that differs."""
        return differences(provenance(self.recorded), provenance(self.repeated))

    @property
    def agrees(self) -> bool:
        """True if the repetition used the same data, protocol and sampler and all metrics and costs agree."""
        same = not any(name in _SHARED for name, *_ in self.provenance)
        return same and all(row[-1] == "yes" for row in (*self.metrics, *self.costs))


def agree(recorded: MetricValue | None, repeated: MetricValue | None) -> bool:
    """Returns whether a metric was reproduced: same number of images, within the recorded uncertainty."""
    if recorded is None or repeated is None or recorded.num_samples != repeated.num_samples:
        return False
    tolerance = max(recorded.uncertainty, ROUNDING * abs(recorded.value))
    return abs(repeated.value - recorded.value) <= tolerance


def _metrics(recorded: Record, repeated: Record) -> Iterator[tuple[str, ...]]:
    for key in sorted(recorded.metrics.keys() | repeated.metrics.keys()):
        a, b = recorded.metrics.get(key), repeated.metrics.get(key)
        counts = " of {:,}" * (a is not None and b is not None and a.num_samples != b.num_samples)
        shown = [f"{m.value:.8g} ±{m.uncertainty:.2g}{counts.format(m.num_samples)}" if m else "-" for m in (a, b)]
        yield key, *shown, f"{b.value - a.value:.3g}" if a and b else "-", "yes" if agree(a, b) else "no"


def _costs(recorded: Record, repeated: Record) -> Iterator[tuple[str, ...]]:
    for name in COUNTED:
        a, b = getattr(recorded.counted_cost, name), getattr(repeated.counted_cost, name)
        if a is None or b is None:
            if a is not b:
                yield name, str(a), str(b), "-", "no"
            continue
        yield name, f"{a:.8g}", f"{b:.8g}", f"{b - a:.3g}", "yes" if abs(b - a) <= COST_TOLERANCE * abs(a) else "no"
