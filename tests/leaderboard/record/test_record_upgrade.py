"""A record of schema version 1, written by a real run (tests/benchmark/upgrade/make.py), stays readable."""

from __future__ import annotations

from pathlib import Path

from leaderboard.record.records import read_record


def test_a_record_of_version_1_is_read() -> None:
    record = read_record(Path(__file__).with_name("record_v1.json"))
    assert record.schema_version == 1
    assert (record.method, record.dataset.name, record.protocol.name) == ("sddpm", "digits", "offline-v1")
    assert record.metrics["fd_digits"].num_samples == 60
    assert record.seeds == {"training": 42, "sampling": 0}
    assert record.draft
