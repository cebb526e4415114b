"""Malformed and malicious record files: each raises one error that names the file and the field."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from leaderboard.files import canonical_sha256
from leaderboard.record.records import LARGEST_FILE, Record, RecordError, read_record, write_record
from leaderboard.reports.table import markdown, show_records

Make = Callable[..., Record]

NESTED: Any = 1
for _ in range(40):
    NESTED = {"a": NESTED}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records") / "hostile.json"


@pytest.fixture
def valid(make_record: Make, tmp_path: Path) -> dict[str, Any]:
    return json.loads(write_record(make_record(), tmp_path / "valid").read_text())


def put(data: dict[str, Any], path: str, value: Any) -> None:
    """Replaces one field and updates the hash of the configuration."""
    *parents, last = path.split("/")
    for name in parents:
        data = data[name]
    data[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("method", "a\x1b[31m", r"method: expected text without control characters, found 'a\\x1b\[31m'"),
        ("variant", "two\nlines", "variant: expected text without control characters"),
        ("dataset/name", "digits\u202e", "dataset.name: expected text without control characters"),
        ("hardware", "\ud800", "hardware: expected text without control characters"),
        ("metrics/fd_digits/note", "\x07", r"metrics\.fd_digits\.note: expected text without control"),
        ("metrics/a\x00b", {"value": 1.0, "uncertainty": 0.0, "num_samples": 1}, "metrics: expected text without"),
        ("cost/firing_rates/\x1b", 0.5, r"cost\.firing_rates: expected text without control"),
        ("method", "<script>", "method: expected a name of 1 to 100 letters.* found '<script>'"),
        ("variant", "[bold]x", "variant: expected a name of 0 to 100"),
        ("method", "../../etc/passwd", r"method: expected a name .* found '\.\./\.\./etc/passwd'"),
        ("dataset/name", "..", "dataset.name: expected a name"),
        ("protocol/name", "", "protocol.name: expected a name of 1 to 100"),
        ("extractor/name", "x" * 101, "extractor.name: expected a name"),
        ("metrics/<b>", {"value": 1.0, "uncertainty": 0.0, "num_samples": 1}, "metrics: expected a name"),
        ("solver", "x" * 5000, "solver: expected at most 4096 characters, found 5000"),
        ("cost/sops", float("-inf"), r"cost\.sops: expected a finite number"),
        ("cost/sops", 1e300, r"cost\.sops: expected a number of magnitude up to 1e\+30, found 1e\+300"),
        ("cost/sops", 10**4000, r"cost\.sops: expected a 64-bit integer, found one of 13288 bits"),
        ("nfe", 2**63, "nfe: expected a 64-bit integer"),
        ("config/model", 10**4000, r"config\.model: expected a 64-bit integer"),
        ("config/model", float("nan"), r"config\.model: expected a finite number"),
        ("config/model", NESTED, r"config\.model\.a\.a.*: expected at most 32 nested levels"),
        ("config/\x1b[2J", 1, "config: expected text without control"),
        ("config/model/\x1b[2J", float("nan"), r"config\.model\.'\\x1b\[2J' \(str\): expected a finite number"),
        ("protocol/description/deep", NESTED, r"protocol\.description\.deep\.a.*: expected at most 32 nested levels"),
        ("created", "0001-01-01T00:00:00+14:00", "created: expected an ISO 8601 time"),
        ("metrics", {"fd_digits": None}, r"metrics\.fd_digits: expected an object, found None"),
        ("config", "{}", r"config: expected an object, found '\{\}'"),
        ("checkpoint", [], "checkpoint: expected an object"),
        ("code/versions/torch", 2, r"code\.versions\.torch: expected str, found 2"),
    ],
)
def test_value_is_refused(valid: dict[str, Any], file: Path, path: str, value: Any, message: str) -> None:
    put(valid, path, value)
    file.write_text(json.dumps(valid))
    with pytest.raises(RecordError, match=rf"hostile\.json: field {message}") as refusal:
        read_record(file)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable JSON file"),
        (b"\xff\xfe{}", "not a readable JSON file .*utf-8"),
        (b"\xef\xbb\xbf{}", "not a readable JSON file"),
        (b"{" * 100_000, "not a readable JSON file"),
        (b"[" * 200_000 + b"]" * 200_000, "not a readable JSON file .*recursion"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "not a readable JSON file .*recursion"),
        (b'{"nfe": 1, "nfe": 2}', "field 'nfe': the field occurs twice"),
        (b'{"a": {"\\u001b": 1, "\\u001b": 2}}', r"field '\\x1b': the field occurs twice"),
        (b"1" * 5000, "not a readable JSON file"),
        (b"null", "field the top level: expected an object, found None"),
        (b'"' + b"x" * 5000 + b'"', "field the top level: expected an object"),
        (b" " * (LARGEST_FILE + 1), "not a readable JSON file .4,194,305 bytes, more than the maximum of 4,194,304"),
    ],
)
def test_file_is_refused(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    with pytest.raises(RecordError, match=rf"hostile\.json: {message}") as refusal:
        read_record(file)
    assert len(str(refusal.value)) < 1000


def test_folder_and_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="not a readable JSON file"):
        read_record(tmp_path)
    with pytest.raises(RecordError, match=r"nowhere\.json: no such file; give the path of a record"):
        read_record(tmp_path / "nowhere.json")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([10**400, "..", "\x1b"])
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
QUICK = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read_or_refuse(file: Path) -> None:
    """A record is either refused with a clear error or complete enough for every table."""
    entries = []
    with contextlib.suppress(RecordError):
        entries.append((file, read_record(file)))
    markdown(entries)
    show_records(entries, Console(quiet=True))


@QUICK
@given(content=st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_content_is_a_record_or_an_error(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    read_or_refuse(file)


@QUICK
@given(data=st.data())
def test_any_change_is_a_record_or_an_error(file: Path, valid: dict[str, Any], data: st.DataObject) -> None:
    record = json.loads(json.dumps(valid))
    where = record
    while True:
        name = data.draw(st.sampled_from(sorted(where)) | st.text(max_size=5))
        if not isinstance(where.get(name), dict) or data.draw(st.booleans()):
            break
        where = where[name]
    if data.draw(st.booleans()):
        where[name] = data.draw(JSON)
    else:
        where.pop(name, None)
    for field, content in (("config", record), ("protocol", record.get("protocol"))):
        if isinstance(content, dict):  # matching hashes, so that later checks are reached
            key, value = (
                ("config_sha256", content.get(field)) if field == "config" else ("sha256", content.get("description"))
            )
            with contextlib.suppress(ValueError, RecursionError):
                content[key] = canonical_sha256(value)
    file.write_text(json.dumps(record))
    read_or_refuse(file)
