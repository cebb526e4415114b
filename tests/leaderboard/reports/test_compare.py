from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from counts_by_hand import COUNTS, STEM, costing
from scipy.stats import ttest_rel

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
    assert rows["fd_digits"] == [
        "1.500",
        "(±0.024)",
        "1.200",
        "(±0.024)",
        "-0.3",
        "(±0.034)",
        "-",
        "-",
        "cannot",
        "tell",
    ]
    assert rows["is_mean"] == ["-", "2.00", "(±0.20)", "-", "-", "-", "-"]
    assert rows["A"][:5] == ["single", "training", "cannot", "be", "told"]
    assert "warning:" not in rows


@pytest.mark.parametrize(
    ("key", "better"),
    [
        *((key, "A") for key in ("fid", "fd_digits", "kid_mean", "fad_eval", "fid_svd", "reconstruction_mse")),
        *((key, "B") for key in ("is_mean", "is_torchvision", "precision", "coverage", "reconstruction_ssim")),
        ("recall_digits", "B is higher"),
    ],
)
def test_which_is_better(
    make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, better: str
) -> None:
    for name, mean in (("a", 1.0), ("b", 2.0)):
        for seed, noise in enumerate((-0.01, 0.0, 0.02)):
            metrics = {key: MetricValue(mean + noise * mean, 0.5, 2000)}
            write_record(make_record(metrics=metrics, seeds={"training": seed}), tmp_path / name)
    compare(str(tmp_path / "a"), str(tmp_path / "b"))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith(key))
    assert line.strip().split("  ")[-1].strip() == better


def group(make_record: Make, folder: Path, values: dict[int, float], **fields: object) -> str:
    """Writes one record per training seed and returns their folder."""
    for seed, fd in values.items():
        metrics = {"fd_digits": MetricValue(fd, 0.01, 2000), "kd_digits": MetricValue(fd / 10 + seed, 0.01, 2000)}
        write_record(make_record(metrics=metrics, seeds={"training": seed}, **fields), folder)
    return str(folder)


def metrics_of(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    lines = [line.split() for line in capsys.readouterr().out.partition("\nmetrics")[2].splitlines()]
    return {words[0]: words[1:] for words in lines if words}


def test_groups_are_paired_by_seed_and_corrected(
    make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = group(make_record, tmp_path / "a", {0: 3.2, 1: 3.1, 2: 3.4})
    b = group(make_record, tmp_path / "b", {2: 2.81, 1: 2.5, 0: 2.6}, variant="longer")
    compare(a, b)
    found = metrics_of(capsys)
    p = float(ttest_rel([2.6, 2.5, 2.81], [3.2, 3.1, 3.4]).pvalue)
    assert found["fd_digits"][4:] == ["-0.5967", "±0.014", f"{p:.2g}", f"{2 * p:.2g}", "B"]
    assert found["kd_digits"][4:] == ["-0.05967", "±0.0014", f"{p:.2g}", f"{2 * p:.2g}", "B"]


def test_two_seeds_of_one_method_are_not_called_different(
    make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six errors of an evaluation apart, as two seeds of one method can be."""
    a, b = (group(make_record, tmp_path / name, {seed: fd}) for name, seed, fd in (("a", 1, 3.067), ("b", 2, 3.444)))
    compare(a, b)
    assert metrics_of(capsys)["fd_digits"][4:] == ["+0.377", "(±0.028)", "-", "-", "cannot", "tell"]


def test_a_group_is_one_method(make_record: Make, tmp_path: Path) -> None:
    a = group(make_record, tmp_path / "a", {0: 3.2, 1: 3.1})
    group(make_record, tmp_path / "a", {2: 3.0}, variant="longer")
    with pytest.raises(ValueError, match=r"its 3 records differ in more than the training seed \(.*SDDPM longer"):
        compare(a, a)
    with pytest.raises(FileNotFoundError, match="'nowhere' is neither a file, a folder, a pattern"):
        compare(a, "nowhere", records=[str(tmp_path)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: the folder contains no record"):
        compare(a, str(tmp_path / "empty"))


def test_groups_are_rows_or_patterns_or_lists(
    make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group(make_record, tmp_path / "a" / "records", {0: 3.2, 1: 3.1, 2: 3.4})
    group(make_record, tmp_path / "b" / "records", {0: 2.6, 1: 2.5, 2: 2.81}, variant="longer, tdBN")
    compare("SDDPM", "SDDPM, longer, tdBN", records=[str(tmp_path)])
    by_name = capsys.readouterr().out
    assert "B: SDDPM, longer, tdBN, digits, offline-v1, seeds 0, 1, 2" in by_name
    compare(f"{tmp_path}/a/records/*.json", ",".join(map(str, (tmp_path / "b" / "records").iterdir())))
    assert capsys.readouterr().out == by_name
    compare("SDDPM", f"{tmp_path}/b", records=[str(tmp_path)])
    assert capsys.readouterr().out == by_name
    group(make_record, tmp_path / "c" / "records", {0: 1.0}, dataset=Dataset("mnist", "f" * 64, "hub"))
    group(make_record, tmp_path / "d" / "records", {0: 1.0}, dataset=Dataset("mnist", "f" * 64, "hub"), method="SDM")
    compare("SDDPM", "SDM", records=[str(tmp_path)])  # in one table only
    group(make_record, tmp_path / "e" / "records", {0: 1.0}, method="SDM")
    with pytest.raises(ValueError, match=r"several tables \(digits, offline-v1; mnist, offline-v1\): add --data NAME"):
        compare("SDDPM", "SDM", records=[str(tmp_path)])
    compare("SDDPM", "SDM", data="mnist", records=[str(tmp_path)])
    group(make_record, tmp_path / "f" / "records", {0: 1.0}, method="SDM", solver="fast")
    with pytest.raises(
        ValueError, match=r"'SDM' is the name of 2 rows of digits, offline-v1: SDM, .*, 50; SDM, .*, 50"
    ):
        compare("SDDPM", "SDM", data="digits", records=[str(tmp_path)])
    compare("SDDPM", "SDM, fast, 50", data="digits", records=[str(tmp_path)])


def test_energy_differs_by_model(make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = replace(COUNTS, layers=COUNTS.layers | {"stem": replace(STEM, effective_macs=1000)})
    a, b = (make_record(cost=costing(counts)) for counts in (COUNTS, dense))
    compare(str(write_record(a, tmp_path / "a")), str(write_record(b, tmp_path / "b")))
    out = capsys.readouterr().out
    assert "counts" not in out
    lines = {words[2]: words[3:] for line in out.splitlines() if (words := line.split())[:2] == ["mJ", "by"]}
    assert set(lines) == {"neurobench-45nm", "quantised-45nm", "memory-45nm"}  # zeros are charged by the others
    assert lines["neurobench-45nm"] == ["5.87e-06", "6.79e-06"]  # 4.6 (800 + 300) + 0.9 x 900 pJ, and 200 MACs more


def test_equal_records_have_no_differences(
    make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = shown(make_record(), make_record(), tmp_path, capsys)
    assert rows["configuration:"] == rows["cost"][-2:] == ["the", "same"]
    assert rows["fd_digits"][-3:] == ["-", "-", "equal"]


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
