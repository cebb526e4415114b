from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from leaderboard.files import canonical_sha256
from leaderboard.protocols import OFFLINE_V1, STANDARD_V1
from leaderboard.record.entries import Entry
from leaderboard.record.records import Artefact, Code, Dataset, MetricValue, Record, write_record
from leaderboard.reports.compare import compare, incomparable

Make = Callable[..., Record]


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")


def shown(a: Record, b: Record, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """Returns the words of each output line, keyed by the first word."""
    compare(str(write_record(a, folder / "a")), str(write_record(b, folder / "b")))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {words[0]: words[1:] for words in lines if words}


def test_differences_are_shown(make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_record()
    config = {"model": {"num_steps": 8, "note": "\x1b[2J"}, "data": {"root": "x"}}
    b = make_record(
        variant="eight steps",
        config=config,
        config_sha256=canonical_sha256(config),
        code=Code("1" * 40, True, {"torch": "2.9", "numpy": "2"}),
        num_steps=8,
        cost=replace(a.cost, sops=6.4e9, peak_memory_bytes=100),
        metrics={
            "fd_digits": MetricValue(1.2, 0.0123, 2000),
            "kd_digits": MetricValue(0.0034, 0.00045, 2000),
            "is_mean": MetricValue(2.0, 0.1, 2000),
        },
    )
    rows = shown(a, b, tmp_path, capsys)
    assert rows["model.num_steps"] == ["4", "8"]
    assert rows["data.root"] == ["-", '"x"']
    assert rows["model.note"] == ["-", '"\\u001b[2J"']
    assert rows["version"] == ["of", "numpy", "-", "2"]
    assert rows["code"][:1] == ["commit"]
    assert rows["sops"] == ["3.2e+09", "6.4e+09", "(2", "of", "A)"]
    assert rows["peak_memory_bytes"] == ["-", "100"]
    assert "macs" not in rows
    assert rows["fd_digits"] == ["1.5", "±0.012", "1.2", "±0.012", "-0.3", "±0.017", "B", "yes", "(17.2)"]
    assert rows["kd_digits"][-3:] == ["A", "no", "(0.3)"]
    assert rows["is_mean"] == ["-", "2", "±0.1", "-", "-", "-"]
    assert "warning:" not in rows


@pytest.mark.parametrize(
    ("key", "better"),
    [
        *((key, "A") for key in ("fid", "fd_digits", "kid_mean", "fad_eval", "fid_svd", "reconstruction_mse")),
        *((key, "B") for key in ("is_mean", "is_torchvision", "precision", "recall_digits", "reconstruction_ssim")),
    ],
)
def test_which_is_better(
    make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, better: str
) -> None:
    a, b = (make_record(metrics={key: MetricValue(value, 0.0, 2000)}) for value in (1.0, 2.0))
    assert shown(a, b, tmp_path, capsys)[key][-2:] == [better, "yes"]


def test_equal_records_have_no_differences(
    make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = shown(make_record(), make_record(), tmp_path, capsys)
    assert rows["configuration:"] == rows["cost"][-2:] == ["the", "same"]
    assert rows["fd_digits"][-3:] == ["0", "equal", "no"]


def test_records_of_different_tables_are_incomparable(
    make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = make_record()
    for change, message in (
        ({"protocol": STANDARD_V1}, "protocol offline-v1 against standard-v1"),
        ({"protocol": replace(OFFLINE_V1, sample_seed=7)}, "protocol sha256"),
        ({"dataset": replace(a.dataset, name="mnist")}, "dataset digits against mnist"),
        ({"dataset": Dataset("digits", "e" * 64, "x")}, "data fingerprint"),
        ({"extractor": Artefact("digits", "c" * 64)}, "extractor sha256"),
    ):
        b = make_record(**change)
        assert message in "; ".join(incomparable(a, b))
        assert Entry(Path(), a).table_key != Entry(Path(), b).table_key
    assert incomparable(a, make_record(variant="x", hardware="y")) == []
    few = make_record(metrics={"fd_digits": MetricValue(1.0, 0.1, 300)})
    assert incomparable(a, few) == ["2,000 generated images against 300"]
    assert shown(a, few, tmp_path, capsys)["warning:"][:5] == ["the", "metrics", "cannot", "be", "compared:"]
