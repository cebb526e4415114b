"""The training data of a record, and how it differs from the evaluation data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leaderboard.add import find_problems
from leaderboard.record.differences import differences, provenance
from leaderboard.record.entries import RECORDS, Entry
from leaderboard.record.records import (
    Dataset,
    Record,
    RecordError,
    TrainingData,
    find_records,
    read_record,
    record_name,
    record_text,
    write_record,
)
from leaderboard.record.renamed import PRESENT_METHOD

Make = Callable[..., Record]
GEOMETRY = {"image_size": 8, "size": 8}
DIGITS = Dataset("digits", "f" * 64, "scikit-learn", GEOMETRY)


@pytest.mark.parametrize(
    ("data", "difference"),
    [
        (TrainingData("digits", "f" * 64, GEOMETRY, 1500), ""),
        (TrainingData("digits", "f" * 64, GEOMETRY, 1400), ""),  # others are held out for validation
        (TrainingData("digits", "f" * 64), ""),  # of a version that did not store the geometry
        (TrainingData("unknown"), ""),
        (TrainingData("mnist", "a" * 64, GEOMETRY), "trained on mnist (aaaaaaaa), evaluated on digits"),
        (TrainingData("digits", "a" * 64), "trained on other images of digits (aaaaaaaa, not ffffffff)"),
        (
            TrainingData("digits", "f" * 64, {"image_size": 16, "size": 8}),
            "trained on digits with image_size 16, evaluated with image_size 8",
        ),
        (
            TrainingData("digits", "f" * 64, GEOMETRY | {"center_crop": 140}),
            "trained on digits with center_crop 140, evaluated with center_crop None",
        ),
    ],
)
def test_differences_are_named(data: TrainingData, difference: str, make_record: Make, tmp_path: Path) -> None:
    record = make_record(dataset=DIGITS, training_data=(data,))
    assert record.transfers == [difference] * bool(difference)
    path = write_record(record, tmp_path)
    assert read_record(path) == record
    assert Entry(path, record).status == ("transfer" if difference else "measured")
    assert find_problems(record) == find_problems(make_record())


def test_one_of_several_data_is_enough(make_record: Make) -> None:
    """Such as a network that was trained on another dataset and tuned on this one."""
    history = (TrainingData("mnist", "a" * 64), TrainingData("unknown"), TrainingData("digits", "f" * 64))
    record = make_record(dataset=DIGITS, training_data=history)
    assert record.transfers == ["trained on mnist (aaaaaaaa), evaluated on digits"]
    assert provenance(record)["training data"] == "mnist (aaaaaaaa), then unknown, then digits (ffffffff)"


def test_verify_and_compare_name_other_training_data(make_record: Make) -> None:
    known = make_record(training_data=(TrainingData("digits", "f" * 64),))
    rows = differences(provenance(make_record()), provenance(known))
    assert rows == [("training data", "unknown", "digits (ffffffff)")]


def test_records_of_earlier_versions_keep_their_bytes() -> None:
    records = [(path, read_record(path)) for path in find_records([RECORDS])]
    assert sum(record.training_data is None for _, record in records) == 47
    for path, record in records:
        if record.method != PRESENT_METHOD:  # read under its present name
            assert (record_name(record), record_text(record)) == (path.name, path.read_text())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"name": "mnist<b>"}], "training_data: expected a name"),
        ([{"fingerprint": "a"}], r"training_data\.0\.name: the field is missing"),
        ("mnist", "training_data: expected a list"),
    ],
)
def test_malformed_training_data_are_refused(value: Any, message: str, make_record: Make, tmp_path: Path) -> None:
    path = write_record(make_record(), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"training_data": value}))
    with pytest.raises(RecordError, match=message):
        read_record(path)


def test_add_checks_the_fingerprints(make_record: Make) -> None:
    record = make_record(training_data=(TrainingData("unknown"), TrainingData("mnist", "12")))
    (problem,) = find_problems(record)[len(find_problems(make_record())) :]
    assert problem.startswith("training_data.1.fingerprint: expected a SHA-256")
