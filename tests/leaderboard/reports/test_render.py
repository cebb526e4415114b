from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from leaderboard.files import canonical_sha256
from leaderboard.record.entries import read_records
from leaderboard.record.records import Dataset, MetricValue, Record, read_record, write_record
from leaderboard.reports.published import read_published
from leaderboard.reports.render import COLUMNS, render, to_csv

Make = Callable[..., Record]
FILES = ("index.html", "leaderboard.csv", "leaderboard.json", "leaderboard.md")


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def test_same_records_give_the_same_bytes(make_record: Make, tmp_path: Path) -> None:
    records = [make_record(variant=name, fd=fd) for name, fd in (("a", 3.0), ("b", 2.0), ("c", 1.0))]
    for record in records:
        write_record(record, tmp_path / "runs" / "one" / "records")
    for record in reversed(records):
        write_record(record, tmp_path / "elsewhere")
    for folder, output in (("runs", "first"), ("runs", "second"), ("elsewhere", "third")):
        render([str(tmp_path / folder)], str(tmp_path / output))
    first = content(tmp_path / "first")
    assert tuple(first) == FILES
    assert content(tmp_path / "second") == first
    assert content(tmp_path / "third") == first


def test_files_name_no_data_folder(make_record: Make, tmp_path: Path) -> None:
    config = {"trainer": {"default_root_dir": "/home/alice/runs"}}
    dataset = Dataset("digits", "f" * 64, "parquet files below /home/alice/digits")
    write_record(make_record(config=config, config_sha256=canonical_sha256(config), dataset=dataset), tmp_path / "runs")
    render([str(tmp_path / "runs")], str(tmp_path / "page"))
    written = content(tmp_path / "page")
    assert not [name for name, text in written.items() if "alice" in text]
    assert "parquet files below .../digits" in written["leaderboard.md"].replace("\\", "")


def test_csv_has_one_line_per_value(make_record: Make) -> None:
    published = read_published()
    records = [(Path("a.json"), make_record()), (Path("b.json"), make_record(fd=9.0, draft=True))]
    lines = list(csv.DictReader(io.StringIO(to_csv(records, published))))
    assert len(lines) == 4 + sum(len(result.metrics) for result in published.results)
    first = lines[0]
    assert list(first) == list(COLUMNS)
    wanted = {
        "source": "measured",
        "rank_first": "1",
        "rank_last": "1",
        "metric": "fd_digits",
        "value": "1.5",
        "uncertainty": "0.0123",
    }
    assert {key: first[key] for key in wanted} == wanted
    assert [(line["source"], line["rank_first"]) for line in lines[2:4]] == [("draft", "")] * 2
    retrained = next(line for line in lines if line["value"] == "46.21")
    assert (retrained["source"], retrained["rank_first"], retrained["uncertainty"]) == ("published", "", "")
    assert retrained["reproduced"] == "not tried"


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_csv_contains_no_formula(make_record: Make, name: str) -> None:
    published = read_published()
    text = to_csv([(Path("a.json"), make_record(variant=name, metrics={"fid": MetricValue(-1.5, 0, 1)}))], published)
    line = next(csv.DictReader(io.StringIO(text)))
    assert line["variant"] == f"'{name}"
    assert line["value"] == "-1.5"  # numbers are not escaped


def test_json_contains_complete_records(make_record: Make, tmp_path: Path) -> None:
    path = write_record(make_record(), tmp_path / "records")
    render([str(tmp_path)], str(tmp_path / "out"))
    data = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    (table,) = data["measured"]
    (method,) = table["methods"]
    (entry,) = method["entries"]
    assert (table["dataset"], method["rank"], entry["file"]) == ("digits", [1, 1], path.name)
    assert method["metrics"]["fd_digits"] == {"mean": 1.5, "half_width_95": None, "seeds": 1}
    assert entry["record"] == json.loads(path.read_text())
    assert len(data["published"]["results"]) == len(read_published().results)


def test_markdown_keeps_published_apart(make_record: Make, tmp_path: Path) -> None:
    write_record(make_record(solver="a|b"), tmp_path / "records")
    render([str(tmp_path)], str(tmp_path / "out"))
    measured, published = (tmp_path / "out" / "leaderboard.md").read_text().split("\n# Published numbers\n")
    assert r"a\|b" in measured
    assert "SDiT" not in measured
    assert "## cifar10, paper-sddpm (published)" in published
    assert "| SDDPM (1, 4, 5, 6, 7) |" in published
    assert "19.73 ±?" in published
    assert "https://arxiv.org/abs/2402.11588" in published


def test_published_numbers_are_rendered_without_any_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render([str(tmp_path)], str(tmp_path / "out"))
    assert tuple(content(tmp_path / "out")) == FILES
    shown = capsys.readouterr().out
    assert f"0 records and {len(read_published().results)} published results" in shown
    assert f"page: {tmp_path / 'out' / 'index.html'}" in shown


def test_broken_record_is_named_and_the_rest_rendered(
    make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(make_record(method="Whole"), tmp_path)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(SystemExit) as error:
        render([str(tmp_path)], str(tmp_path / "out"))
    assert error.value.code == 1
    assert "broken.json: field checkpoint: the field is missing" in capsys.readouterr().out
    assert "Whole" in (tmp_path / "out" / "index.html").read_text()


def test_copy_of_a_record_is_shown_once_with_its_samples(make_record: Make, tmp_path: Path) -> None:
    copy = write_record(make_record(), tmp_path / "a")
    original = write_record(make_record(), tmp_path / "b" / "records")
    samples = tmp_path / "b" / "samples" / f"{original.stem}.png"
    samples.parent.mkdir()
    samples.write_bytes(b"")
    entries, broken = read_records([tmp_path / "a", tmp_path])
    assert entries == [(original, read_record(copy))]
    assert not broken


def test_lone_surrogate_is_rendered(make_record: Make, tmp_path: Path) -> None:
    config = {"name": "\ud800"}
    write_record(make_record(config=config, config_sha256=canonical_sha256(config)), tmp_path)
    render([str(tmp_path)], str(tmp_path / "out"))
    assert tuple(content(tmp_path / "out")) == FILES
