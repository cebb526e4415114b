from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import counts_by_hand
import pytest
from counts_by_hand import COUNTS, STEM

from benchmark.cli import main
from leaderboard.add import add, find_problems
from leaderboard.energy import strict_energy_mj
from leaderboard.files import canonical_sha256, write_atomic
from leaderboard.protocols import OFFLINE_V1, STANDARD_V1
from leaderboard.record.entries import Entry
from leaderboard.record.records import Artefact, MetricValue, Record, read_record, record_text, write_record

Make = Callable[..., Record]


@pytest.fixture
def sound(make_record: Make) -> Record:
    """A consistent record."""
    record = make_record()
    energy = strict_energy_mj(record.cost.macs, record.cost.acs)
    kept = {"precision_digits": MetricValue(0.7, 0.01, 2000), "recall_digits": MetricValue(0.6, 0.01, 2000)}
    cost = replace(record.cost, energy_strict_mj=energy)
    return replace(record, cost=cost, metrics=record.metrics | kept)


def with_metric(record: Record, key: str = "fd_digits", **fields: Any) -> Record:
    return replace(record, metrics=record.metrics | {key: replace(record.metrics["fd_digits"], **fields)})


def with_samples(record: Record, count: int) -> Record:
    return replace(record, metrics={k: replace(m, num_samples=count) for k, m in record.metrics.items()})


def with_config(record: Record, config: dict[str, Any]) -> Record:
    return replace(record, config=config, config_sha256=canonical_sha256(config))


def test_sample_grid_is_copied(sound: Record, tmp_path: Path) -> None:
    path = write_record(sound, tmp_path / "run" / "records")
    grid = tmp_path / "run" / "samples" / f"{path.stem}.png"
    grid.parent.mkdir()
    grid.write_bytes(b"a grid")
    main(["leaderboard", "add", str(path), f"--to={tmp_path / 'board' / 'records'}"])
    (added,) = (tmp_path / "board" / "samples").iterdir()
    assert added.read_bytes() == b"a grid"
    (record,) = (tmp_path / "board" / "records").iterdir()
    assert added.stem == record.stem


@pytest.mark.parametrize("value", [None, 1e6])
def test_repetition_that_agrees_is_copied(sound: Record, value: float | None, tmp_path: Path) -> None:
    path = write_record(sound, tmp_path / "run" / "records")
    repeated = sound if value is None else with_metric(sound, value=value)
    write_atomic(Entry(path, sound).repetition, record_text(repeated))
    write_atomic(Entry(path, sound).verification("A. Third"), record_text(repeated))
    main(["leaderboard", "add", str(path), f"--to={tmp_path / 'board' / 'records'}"])
    (added,) = (tmp_path / "board" / "records").iterdir()
    entry = Entry(added, read_record(added))
    assert entry.repeated == (repeated if value is None else None)
    assert entry.verified == ({"A. Third": repeated} if value is None else {})
    assert entry.repetition.exists() == entry.verification("A. Third").exists() == (value is None)


def test_sound_record_is_added_under_its_own_name(
    sound: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canonical = write_record(sound, tmp_path / "run")
    theirs = tmp_path / "theirs.json"
    theirs.write_text(json.dumps(json.loads(canonical.read_text())))  # on one line
    main(["leaderboard", "add", str(theirs), f"--to={tmp_path / 'board'}"])
    (added,) = (tmp_path / "board").iterdir()
    assert added.name == canonical.name
    assert added.read_bytes() == canonical.read_bytes()
    assert capsys.readouterr().out == f"added {added}\n"


def test_folders_of_the_machine_are_redacted(sound: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = with_config(sound, {"data": {"root": "/home/alice/mnist"}})
    record = replace(record, dataset=replace(record.dataset, source="parquet files below /home/alice/mnist"))
    theirs = str(write_record(record, tmp_path))
    add(theirs, str(tmp_path / "board"))
    (added,) = (tmp_path / "board").iterdir()
    assert "alice" not in added.read_text()
    assert read_record(added).dataset.source == "parquet files below .../mnist"
    with pytest.raises(SystemExit):
        add(theirs, str(tmp_path / "board"))
    assert "the same record exists already" in capsys.readouterr().err


def test_draft_is_added(sound: Record, tmp_path: Path) -> None:
    add(str(write_record(with_samples(replace(sound, draft=True), 300), tmp_path)), str(tmp_path / "board"))
    (added,) = (tmp_path / "board").iterdir()
    assert read_record(added).draft


def test_inception_and_optional_metrics_are_accepted(sound: Record) -> None:
    metrics = {key: MetricValue(2.0, 0.1, 50_000) for key in ("fid", "fad_published", "fad_eval")}
    metrics |= {key: MetricValue(0.1, 0.01, 10_000) for key in ("kid_mean", "precision", "recall")}
    metrics["reconstruction_mse"] = MetricValue(0.1, 0.01, 0)
    protocol = replace(sound.protocol, name=STANDARD_V1.name, sha256=STANDARD_V1.sha256)
    record = replace(sound, protocol=protocol, metrics=metrics, extractor=Artefact("inception-v3-compat", "b" * 64))
    assert find_problems(record) == []
    cifar10 = replace(record, dataset=replace(record.dataset, name="cifar10"))
    assert find_problems(cifar10) == ["metrics: is_mean required by standard-v1 but missing"]


FUTURE = (datetime.now(UTC) + timedelta(hours=1)).isoformat(timespec="seconds")
Change = Callable[[Record], Record]


def costing(**fields: Any) -> Change:
    return lambda record: replace(record, cost=replace(record.cost, **fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: with_samples(r, 1999), "draft: must be true, 1999 images are fewer than the 2000 of offline-v1"),
        (lambda r: with_samples(r, 10_001), "metrics: 10001 generated images exceed the maximum of 10000"),
        (
            lambda r: with_metric(r, "kd_digits", num_samples=1000),
            "metrics.kd_digits.num_samples: computed from only 1000 of",
        ),
        (
            lambda r: with_metric(r, "fad_eval", num_samples=5),
            "metrics.fad_eval.num_samples: computed from only 5 of",
        ),
        (lambda r: with_metric(r, "reconstruction_mse"), "a reconstruction uses no generated images"),
        (lambda r: with_metric(r, uncertainty=-0.1), "metrics.fd_digits.uncertainty: -0.1 is negative"),
        (lambda r: with_metric(r, "fid"), "metrics: fid not part of offline-v1"),
        (lambda r: with_metric(r, "fd_mnist"), "metrics: fd_mnist not part of"),
        (
            lambda r: replace(r, metrics={}),
            "metrics: fd_digits, kd_digits, precision_digits, recall_digits required",
        ),
        (
            lambda r: replace(r, extractor=Artefact("inception-v3-compat", "b" * 64)),
            "extractor.name: expected digits for offline-v1, found 'inception-v3-compat'",
        ),
        (
            lambda r: with_config(r, {"data": {"init_args": {"num_samples": 9000}}}),
            "metrics: 2000 generated images, but the configuration sets num_samples to 9000",
        ),
        (costing(energy_strict_mj=0.1), "cost.energy_strict_mj: 0.1 mJ, but its MACs and ACs amount to 8.49 mJ"),
        (costing(acs=1.0, energy_strict_mj=strict_energy_mj(1.2e9, 1.0)), "cost.acs: 1 accumulates, fewer than the"),
        (
            costing(firing_rates={"neuron": 1.5}, firing_rate=1.5),
            "cost.firing_rates.neuron: 1.5 is not between 0 and 1",
        ),
        (costing(firing_rate=0.5), "cost.firing_rate: the mean 0.5 is outside the range of the layers' rates"),
        (costing(firing_rate=None), "cost.firing_rate: expected both the mean and the rates of the layers"),
        (costing(images_per_second=-1.0), "cost.images_per_second: -1 is negative"),
        (costing(trainable_parameters=10**9), "cost.trainable_parameters: 1000000000 exceeds the 63470000 parameters"),
        (costing(nfe=1), "cost.nfe: 1 differs from nfe: 50"),
        (lambda r: replace(r, num_steps=0), "num_steps: 0 is below 1"),
        (lambda r: replace(r, wall_time_seconds=-1.0), "wall_time_seconds: -1 is negative"),
        (lambda r: replace(r, created=FUTURE), "is in the future"),
        (lambda r: replace(r, checkpoint=None), "checkpoint: missing, so the evaluation cannot be repeated"),
        (lambda r: replace(r, checkpoint=Artefact("x", "short")), "checkpoint.sha256: expected a SHA-256 of 64 hexa"),
    ],
)
def test_each_inconsistency_is_one_problem(sound: Record, change: Change, message: str) -> None:
    assert find_problems(sound) == []
    (problem,) = find_problems(change(sound))
    assert message in problem


def test_operations_by_layer_must_sum_to_the_totals(sound: Record) -> None:
    """Tables compute energy from them."""
    cost = replace(counts_by_hand.costing(), nfe=50)
    record = replace(sound, cost=cost)
    assert find_problems(record) == []

    def problems(**fields: Any) -> list[str]:
        return find_problems(replace(record, cost=replace(cost, counts=replace(COUNTS, **fields))))

    assert problems(layers={"stem": STEM}) == [
        "cost.counts: sops of all layers sum to 0, not to cost.sops = 1000",
        "cost.counts: macs of all layers sum to 1000, not to cost.macs = 1500",
        "cost.counts: acs of all layers sum to 0, not to cost.acs = 1100",
    ]
    negative = COUNTS.layers | {"stem": replace(STEM, effective_macs=-1.0)}
    assert problems(layers=negative) == ["cost.counts: stem.effective_macs: -1 is negative"]
    assert problems(additions={"sum": -2.0}) == ["cost.counts: sum: -2 is negative"]


def refusal(file: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        add(str(file), str(folder))
    assert stop.value.code == 1
    return capsys.readouterr().err.splitlines()


def test_refusals_are_one_line_each_and_add_nothing(
    sound: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_record(replace(with_samples(sound, 10), checkpoint=None), tmp_path)
    lines = refusal(file, tmp_path / "board", capsys)
    assert len(lines) == 2
    assert all(line.startswith(f"refused: {file}: ") for line in lines)
    assert not (tmp_path / "board").exists()


def test_broken_and_missing_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"method": NaN}')
    (line,) = refusal(broken, tmp_path / "board", capsys)
    assert line == f"refused: {broken}: field checkpoint: the field is missing"
    (line,) = refusal(tmp_path / "nowhere.json", tmp_path / "board", capsys)
    assert "nowhere.json: no such file; give the path of a record" in line


@pytest.mark.parametrize("name", ["a b.json", "\x1b[31m.json", ".hidden.json", "a..json", "record.txt", "-rf.json"])
def test_unsafe_file_name_is_refused(
    sound: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = write_record(sound, tmp_path).rename(tmp_path / name)
    (line,) = refusal(file, tmp_path / "board", capsys)
    assert "the file name is not safe" in line
    assert line.isprintable()


def test_same_record_under_another_name_is_refused(
    sound: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_record(sound, tmp_path)
    board = tmp_path / "board"
    add(str(file), str(board))
    (there,) = board.iterdir()
    (board / "broken.json").write_text("{}")  # is ignored
    (line,) = refusal(file, board, capsys)
    assert f"the same record exists already: {there}" in line
    other = there.rename(board / "other.json")
    (line,) = refusal(file, board, capsys)
    assert f"the same record exists already: {other}" in line
    assert len(list(board.iterdir())) == 2


def test_added_records_are_shown_by_default(
    sound: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    add(str(write_record(sound, tmp_path / "elsewhere")))
    main(["leaderboard"])
    assert "leaderboard/data/records/20250102T030405Z-SDDPM-digits-" in capsys.readouterr().out
    assert OFFLINE_V1.name in sound.protocol.name
