from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leaderboard.files import canonical_sha256
from leaderboard.protocols import PROTOCOLS, Protocol
from leaderboard.record.records import (
    Code,
    Dataset,
    Design,
    MetricValue,
    Record,
    RecordError,
    find_records,
    read_record,
    redact_paths,
    write_record,
)

Make = Callable[..., Record]


def test_round_trip(make_record: Make, tmp_path: Path) -> None:
    record = make_record()
    path = write_record(record, tmp_path / "records")
    assert path.name.startswith("20250102T030405Z-SDDPM-digits-")
    assert read_record(path) == record
    assert list(path.parent.iterdir()) == [path]  # no temporary file remains


def test_conditional_records_say_so_and_others_are_as_before(make_record: Make, tmp_path: Path) -> None:
    plain, conditional = make_record(), make_record(conditional=1.5)
    assert "conditional" not in json.loads(write_record(plain, tmp_path).read_text())
    path = write_record(conditional, tmp_path)
    assert json.loads(path.read_text())["conditional"] == 1.5
    assert read_record(path) == conditional


def test_records_of_a_study_name_its_design(make_record: Make, tmp_path: Path) -> None:
    design = Design("track-v1", "0" * 64)
    path = write_record(make_record(design=design), tmp_path)
    assert json.loads(path.read_text())["design"] == {"name": "track-v1", "sha256": "0" * 64}
    assert read_record(path).design == design
    assert "design" not in json.loads(write_record(make_record(), tmp_path).read_text())
    with pytest.raises(RecordError, match=r"design\.name: expected a name"):
        write_record(make_record(design=Design("../x", "0")), tmp_path)


def test_absent_values_survive(make_record: Make, tmp_path: Path) -> None:
    record = make_record(checkpoint=None, code=Code(None, None, {}), variant="")
    assert read_record(write_record(record, tmp_path)) == record


def test_file_name_is_safe_and_in_utc(make_record: Make, tmp_path: Path) -> None:
    path = write_record(make_record(method="a,b c", created="2025-01-02T03:04:05+02:00"), tmp_path)
    assert path.name.startswith("20250102T010405Z-a_b_c-digits-")


def test_never_overwrites(make_record: Make, tmp_path: Path) -> None:
    write_record(make_record(), tmp_path)
    with pytest.raises(FileExistsError, match="never overwritten"):
        write_record(make_record(), tmp_path)
    write_record(make_record(variant="other"), tmp_path)
    assert len(find_records([tmp_path])) == 2


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("/home/alice/data/mnist", ".../mnist"),
        ("/data", ".../data"),
        ("~/my data/mnist/", ".../mnist/"),
        ("~alice/mnist", ".../mnist"),
        ("../../alice/mnist", ".../mnist"),
        (r"C:\Users\alice\mnist", ".../mnist"),
        (r"\\host\share\mnist", ".../mnist"),
        ("runs/digits/last.ckpt", "runs/digits/last.ckpt"),
        ("val/loss", "val/loss"),
        (".../mnist", ".../mnist"),
        ("/", "/"),
        ("ylecun/mnist, revision abc", "ylecun/mnist, revision abc"),
        (8, 8),
    ],
)
def test_redacted_record_names_no_folder_of_the_machine(
    make_record: Make, path: Any, kept: Any, tmp_path: Path
) -> None:
    config = {"data": {"root": path}, "trainer": [{"dirpath": path}, None]}
    record = make_record(
        config=config, config_sha256=canonical_sha256(config), dataset=Dataset("mnist", "f" * 64, f"files below {path}")
    )
    written = read_record(write_record(redact_paths(record), tmp_path))
    assert written.config == {"data": {"root": kept}, "trainer": [{"dirpath": kept}, None]}
    assert written.dataset.source == f"files below {kept}"
    assert redact_paths(written) == written


def _set(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        data = data[name]
    if value is ...:
        del data[last]
    else:
        data[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("solver", ..., "field solver: the field is missing"),
        ("metrics.fd_digits.value", ..., r"field metrics\.fd_digits\.value: the field is missing"),
        ("extra", 1, "field extra: unknown field; expected one of: method, "),
        ("cost.watts", 1, r"field cost\.watts: unknown field"),
        ("nfe", "50", r"field nfe: expected int, found '50' \(str\)"),
        ("nfe", 50.0, r"field nfe: expected int, found 50.0 \(float\)"),
        ("nfe", True, r"field nfe: expected int, found True \(bool\)"),
        ("draft", 0, r"field draft: expected bool, found 0 \(int\)"),
        ("seeds.sampling", None, r"field seeds\.sampling: expected int, found None"),
        ("dataset", "digits", "field dataset: expected an object, found 'digits'"),
        ("metrics", [], "field metrics: expected an object"),
        ("source", "published", "field source: expected 'measured', found 'published'"),
        ("schema_version", 2, "field schema_version: expected 1, found 2"),
        ("schema_version", True, "field schema_version: expected 1, found True"),
        ("created", "yesterday", "field created: expected an ISO 8601 time"),
        ("created", "2025-01-02T03:04:05", "field created: expected a time with time zone"),
        ("config.model.num_steps", 8, "field config_sha256: .* does not match the content"),
        ("protocol.description.num_samples", 8, r"field protocol\.sha256: .* the record was edited"),
        ("cost.sops", float("nan"), r"field cost\.sops: expected a finite number, found nan"),
        ("config.model.num_steps", float("inf"), r"field config\.model\.num_steps: expected a finite number"),
    ],
)
def test_broken_field_is_named_with_its_file(
    make_record: Make, tmp_path: Path, path: str, value: Any, message: str
) -> None:
    file = write_record(make_record(), tmp_path)
    data = json.loads(file.read_text())
    _set(data, path, value)
    file.write_text(json.dumps(data))
    with pytest.raises(RecordError, match=f"{file.name}: {message}"):
        read_record(file)


def test_edited_protocol_with_matching_hash_is_refused(make_record: Make, tmp_path: Path) -> None:
    file = write_record(make_record(), tmp_path)
    data = json.loads(file.read_text())
    data["protocol"]["description"]["num_samples"] = 8
    data["protocol"]["sha256"] = canonical_sha256(data["protocol"]["description"])
    file.write_text(json.dumps(data))
    with pytest.raises(
        RecordError, match=r"field protocol\.sha256: .* differs from .* of the published 'offline-v1'; evaluate again"
    ):
        read_record(file)
    _set(data, "protocol.name", "my-own")
    file.write_text(json.dumps(data))
    with pytest.raises(
        RecordError, match=r"protocol\.name: 'my-own' is unknown; expected one of: standard-v3, offline-v3, "
    ):
        read_record(file)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_every_protocol_survives_in_a_record(make_record: Make, tmp_path: Path, protocol: Protocol) -> None:
    record = make_record(protocol=protocol)
    assert read_record(write_record(record, tmp_path)) == record


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_file_without_a_record_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(RecordError, match=r"x\.json"):
        read_record(file)


def test_integers_are_numbers(make_record: Make, tmp_path: Path) -> None:
    record = make_record(wall_time_seconds=3)
    value = read_record(write_record(record, tmp_path)).wall_time_seconds
    assert value == 3.0
    assert isinstance(value, float)


def test_broken_record_is_not_written(make_record: Make, tmp_path: Path) -> None:
    record = make_record(metrics={"fid": MetricValue(float("nan"), 0.0, 10)})
    with pytest.raises(RecordError, match=r"new record of SDDPM: field metrics\.fid\.value: expected a finite number"):
        write_record(record, tmp_path)
    with pytest.raises(RecordError, match=r"field config\.path: expected a JSON value"):
        write_record(replace(record, metrics={}, config={"path": Path("x")}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_records_are_found_where_they_are_kept(make_record: Make, tmp_path: Path) -> None:
    direct = write_record(make_record(), tmp_path)
    nested = write_record(make_record(), tmp_path / "runs" / "a" / "records")
    write_record(make_record(), tmp_path / "elsewhere")
    assert find_records([tmp_path]) == sorted([direct, nested])
    assert find_records([tmp_path / "runs" / "a"]) == [nested]
    assert find_records([tmp_path / "nowhere"]) == []


def test_only_an_incomplete_cost_says_so(make_record: Callable[..., Record], tmp_path: Path) -> None:
    record = make_record()
    assert '"incomplete"' not in write_record(record, tmp_path).read_text()  # as before the field existed
    incomplete = replace(record, cost=replace(record.cost, incomplete={"mixer [_fft_r2c]": 3}))
    assert read_record(write_record(incomplete, tmp_path)).cost.incomplete == {"mixer [_fft_r2c]": 3}
