from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from leaderboard.files import canonical_sha256
from leaderboard.protocols import OFFLINE_V1, Protocol
from leaderboard.record.records import Artefact, Code, Cost, Dataset, MetricValue, ProtocolEntry, Record


@pytest.fixture(scope="session")
def make_record() -> Callable[..., Record]:
    """Makes a complete record; keyword arguments replace fields, `protocol` and `fd` are given in short."""

    def make(fd: float = 1.5, protocol: Protocol = OFFLINE_V1, **fields: Any) -> Record:
        description = protocol.description()
        record = Record(
            method="SDDPM",
            variant="default",
            dataset=Dataset("digits", "f" * 64, "scikit-learn"),
            protocol=ProtocolEntry(protocol.name, description, canonical_sha256(description)),
            draft=False,
            config={"model": {"num_steps": 4}},
            config_sha256=canonical_sha256({"model": {"num_steps": 4}}),
            code=Code("0" * 40, False, {"torch": "2.8"}),
            seeds={"sampling": 0},
            checkpoint=Artefact("last.ckpt", "a" * 64),
            extractor=Artefact("digits", "b" * 64),
            hardware="CPU",
            created="2025-01-02T03:04:05+00:00",
            wall_time_seconds=12.5,
            metrics={
                "fd_digits": MetricValue(fd, 0.0123, 2000),
                "kd_digits": MetricValue(0.00321, 0.00045, 2000),
            },
            solver="ddim",
            nfe=50,
            num_steps=4,
            cost=Cost(63_470_000, 63_470_000, 50, 0.123, {"neuron": 0.123}, 3.2e9, 1.2e9, 3.3e9, 8.49, 5.25, 12.3),
        )
        return replace(record, **fields)

    return make
