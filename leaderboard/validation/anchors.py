"""Anchors: what known sets of images score under a protocol, and the orders that each metric keeps or violates.

The committed anchors are the files `leaderboard/data/anchors/<dataset>-<protocol>.json` that `validate-metrics` writes.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from leaderboard.record.records import MetricValue
from leaderboard.schema import SchemaError, from_json
from leaderboard.validation.battery import GROSS, MILD, REAL, SEVERITIES, set_title

FOLDER = Path(__file__).parents[1] / "data" / "anchors"
"""Folder of the committed anchors."""

SIGNIFICANT = 2.0
"""Standard errors by which two values must differ to count as different."""


@dataclass(frozen=True)
class Anchor:
    """A known set and what it scores.

    Args:
        kind: Kind of fault, a key of `leaderboard.validation.battery.SEVERITIES`, or `"real"`.
        severity: How large the fault is; 0 for real images.
        images: Number of images.
        metrics: Metrics by key.
    """

    kind: str
    severity: float
    images: int
    metrics: dict[str, MetricValue]

    @property
    def title(self) -> str:
        """The set in words."""
        return set_title(self.kind, self.severity)


@dataclass(frozen=True)
class Anchors:
    """The anchors of a dataset and protocol.

    Args:
        dataset: Name of the dataset.
        fingerprint: Fingerprint of its content.
        protocol: Name of the protocol.
        protocol_sha256: Hash of its description.
        networks: Name and hash of each feature extractor.
        versions: Library versions.
        seconds: CPU time of feature extraction and metrics for the set of real images.
        peak_memory_bytes: Peak resident memory of the whole command.
        sets: The known sets, real images first.
    """

    dataset: str
    fingerprint: str
    protocol: str
    protocol_sha256: str
    networks: tuple[str, ...]
    versions: dict[str, str]
    seconds: float
    peak_memory_bytes: int
    sets: tuple[Anchor, ...]

    def text(self) -> str:
        """Returns the content of its file."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_anchors(path: Path) -> Anchors:
    """Reads a file of anchors.

    Raises:
        ValueError: If it is not one.
    """
    try:
        return from_json(Anchors, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, SchemaError) as error:
        raise ValueError(f"{path} has no anchors ({error}); write it again with validate-metrics") from error


def anchors(dataset: str, protocol: str, folder: Path = FOLDER) -> tuple[Anchor, ...]:
    """Returns the anchors of a dataset and protocol, real images first; empty if there are none.

    Args:
        dataset: Name of the dataset.
        protocol: Name of the protocol.
        folder: Folder of the files.
    """
    path = folder / f"{dataset}-{protocol}.json"
    return read_anchors(path).sets if path.is_file() else ()


Verdict = Literal["kept", "cannot tell", "violated"]


@dataclass(frozen=True)
class Order:
    """Two known sets in the order that a metric should have, and whether it has it.

    Args:
        key: Key of the metric.
        better: The better set.
        worse: The worse set.
        verdict: `"violated"` if the metric prefers the worse set by more than `SIGNIFICANT` standard errors,
            `"cannot tell"` if the sets differ by less. The sets share their images, so the errors, taken as those of
            independent sets, are rather too large.
    """

    key: str
    better: Anchor
    worse: Anchor
    verdict: Verdict


FIDELITY = r"(precision|density)(_.*)?"
"""Metrics that see whether images look real, but not whether some are missing."""
AUTHENTICITY = r"authenticity(_.*)?"
_HIGHER = rf"{FIDELITY}|{AUTHENTICITY}|(recall|coverage)(_.*)?|is_.*"


def is_better_higher(key: str) -> bool:
    """Whether higher values of a metric are better."""
    return re.fullmatch(_HIGHER, key) is not None


def orders(sets: tuple[Anchor, ...]) -> list[Order]:
    """Returns every order that each metric should have on known sets.

    Distances, coverage and recall should get worse with every severity of every fault but copies, which they cannot
    see; precision and density also cannot see missing classes; authenticity sees copies only. Besides, sets that are
    hardly distinguishable from real images should be better than sets of overlays or of one class.

    Args:
        sets: Known sets of one dataset and protocol.
    """
    by_set = {(anchor.kind, anchor.severity): anchor for anchor in sets}
    found = []
    for key in sorted({key for anchor in sets for key in anchor.metrics}):
        if re.fullmatch(r"is_.*", key):
            continue
        for better, worse in _expected(key):
            pair = by_set.get(better), by_set.get(worse)
            if pair[0] and pair[1] and key in pair[0].metrics and key in pair[1].metrics:
                found.append(Order(key, pair[0], pair[1], _verdict(key, pair[0].metrics[key], pair[1].metrics[key])))
    return found


def _expected(key: str) -> list[tuple[tuple[str, float], tuple[str, float]]]:
    """Returns pairs of a better and a worse set, by kind and severity."""
    if re.fullmatch(AUTHENTICITY, key):
        kinds: set[str] = {"copied"}
    else:
        kinds = set(SEVERITIES) - {"copied"} - ({"few classes"} if re.fullmatch(FIDELITY, key) else set())
    found = [
        pair
        for kind, severities in SEVERITIES.items()
        if kind in kinds
        for pair in pairwise([(REAL, 0.0), *((kind, float(severity)) for severity in severities)])
    ]
    found += [(mild, gross) for gross in GROSS for mild in MILD if {mild[0], gross[0]} <= kinds]
    return found


def _verdict(key: str, better: MetricValue, worse: MetricValue) -> Verdict:
    change = (worse.value - better.value) * (-1 if is_better_higher(key) else 1)
    if abs(change) <= SIGNIFICANT * math.hypot(better.uncertainty, worse.uncertainty):
        return "cannot tell"
    return "kept" if change > 0 else "violated"


def summary(found: list[Order]) -> dict[str, dict[Verdict, int]]:
    """Returns the number of orders with each verdict, by metric."""
    verdicts: tuple[Verdict, ...] = ("kept", "cannot tell", "violated")
    keys = dict.fromkeys(order.key for order in found)
    return {
        key: {verdict: sum(o.key == key and o.verdict == verdict for o in found) for verdict in verdicts}
        for key in keys
    }


def describe(order: Order) -> str:
    """Returns an order and the two values in words."""
    values: list[Any] = [anchor.metrics[order.key].value for anchor in (order.better, order.worse)]
    return f"{order.key}: {order.better.title} ({values[0]:.3g}), {order.worse.title} ({values[1]:.3g})"
