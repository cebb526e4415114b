"""Whether the repetition of an evaluation finds what its record says; `leaderboard verify` makes repetitions.

A metric agrees if it differs from the recorded one by no more than the recorded uncertainty, and a count of the cost if
by no more than 1 %, since rounding on another device may flip single spikes. On the same device and versions a
repetition is equal to the last digit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from leaderboard.record.differences import Row, differences, provenance
from leaderboard.record.records import MetricValue, Record

ROUNDING = 1e-6
"""Relative difference of equal metrics; for those whose uncertainty is 0."""
COUNTED = ("parameters", "nfe", "firing_rate", "sops", "macs", "acs", "energy_strict_mj", "energy_paper_mj")
"""Costs that a repetition has to find again; speed and memory belong to the device."""
COST_TOLERANCE = 0.01
_SHARED = ("dataset", "protocol sha256", "solver", "NFE", "SNN time steps")
"""What must not differ, whatever the metrics say."""


@dataclass(frozen=True)
class Repetition:
    """A record and the record of its repetition."""

    recorded: Record
    repeated: Record

    @cached_property
    def metrics(self) -> list[tuple[str, ...]]:
        """Name, both values, their difference, and whether they agree ("yes" or "no"), of each metric."""
        return list(_metrics(self.recorded, self.repeated))

    @cached_property
    def costs(self) -> list[tuple[str, ...]]:
        """The same of each count of the cost."""
        return list(_costs(self.recorded, self.repeated))

    @cached_property
    def provenance(self) -> list[Row]:
        """Names and both values of what else differs."""
        return differences(provenance(self.recorded), provenance(self.repeated))

    @property
    def agrees(self) -> bool:
        """Whether the repetition is of the same thing and found the same."""
        same = not any(name in _SHARED for name, *_ in self.provenance)
        return same and all(row[-1] == "yes" for row in (*self.metrics, *self.costs))


def agree(recorded: MetricValue | None, repeated: MetricValue | None) -> bool:
    """Whether a repetition found a metric again: from as many images, within the recorded uncertainty."""
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
        a, b = getattr(recorded.cost, name), getattr(repeated.cost, name)
        if a is None or b is None:
            if a is not b:
                yield name, str(a), str(b), "-", "no"
            continue
        yield name, f"{a:.8g}", f"{b:.8g}", f"{b - a:.3g}", "yes" if abs(b - a) <= COST_TOLERANCE * abs(a) else "no"
