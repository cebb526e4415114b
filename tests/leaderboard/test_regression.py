from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from leaderboard.files import canonical_sha256
from leaderboard.record.records import Artefact, Dataset, Record, write_record
from leaderboard.regression import Baseline, Verdict, read_baseline, write_baseline

MakeRecord = Callable[..., Record]


@pytest.fixture
def make_baseline(make_record: MakeRecord) -> Callable[[Sequence[float]], Baseline]:
    """Makes a baseline from distances, one per seed, with seeds 0, 1, ..."""

    def make(distances: Sequence[float]) -> Baseline:
        seeds = [{"training": seed, "sampling": 0} for seed in range(len(distances))]
        return Baseline([make_record(fd=d, seeds=s) for d, s in zip(distances, seeds, strict=True)])

    return make


def configured(record: Record, **model: object) -> Record:
    config = {
        "model": {"init_args": {"num_steps": 4, "init_from": "a.ckpt"} | model},
        "trainer": {"default_root_dir": "b"},
    }
    return replace(record, config=config, config_sha256=canonical_sha256(config))


@pytest.mark.parametrize(
    ("distances", "tolerance"),
    [((9.0, 10.0, 11.0), 4.0), ((9.9, 10.0, 10.1), 1.5)],  # four spreads of 1; the floor of 15 %
)
def test_tolerance(
    make_baseline: Callable[[Sequence[float]], Baseline], distances: Sequence[float], tolerance: float
) -> None:
    baseline = make_baseline(distances)
    assert baseline.mean == pytest.approx(10)
    assert baseline.tolerance == pytest.approx(tolerance)
    for distance, verdict in (
        (10 - 1.01 * tolerance, Verdict.BETTER),
        (10 - 0.99 * tolerance, Verdict.OK),
        (10 + 0.99 * tolerance, Verdict.OK),
        (10 + 1.01 * tolerance, Verdict.WORSE),
    ):
        assert baseline.judge(distance) is verdict


def test_the_same_seed_is_found(make_baseline: Callable[[Sequence[float]], Baseline], make_record: MakeRecord) -> None:
    baseline = make_baseline((1.0, 2.0, 3.0))
    assert baseline.same_seed(make_record(seeds={"training": 1, "sampling": 0})) == 2.0
    assert baseline.same_seed(make_record(seeds={"training": 7, "sampling": 0})) is None


def test_of_several_records_of_a_seed_the_nearest_is_found(make_record: MakeRecord) -> None:
    """Records of one seed that were measured on different processors."""
    seeds = {"training": 0, "sampling": 0}
    baseline = Baseline([make_record(fd=distance, seeds=seeds) for distance in (6.9, 8.9)])
    assert baseline.same_seed(make_record(fd=8.9, seeds=seeds)) == 8.9
    assert baseline.same_seed(make_record(fd=7.1, seeds=seeds)) == 6.9


def test_differences_are_named(make_record: MakeRecord) -> None:
    record = configured(make_record())
    baseline = Baseline([record] * 3)
    moved = replace(configured(record, init_from="elsewhere.ckpt", added_since=1), hardware="another")
    assert baseline.differences(moved) == []
    other = replace(record, extractor=Artefact("digits", "c" * 64), dataset=Dataset("digits", "e" * 64, "x"))
    assert baseline.differences(other) == [
        "extractor is cccccccc, but bbbbbbbb in the baseline",
        "dataset is eeeeeeee, but ffffffff in the baseline",
    ]
    (difference,) = baseline.differences(configured(record, num_steps=2))
    assert difference == "model.init_args.num_steps is 2, but 4 in the baseline"


def test_baselines_are_written_read_and_replaced(make_record: MakeRecord, tmp_path: Path) -> None:
    folder = tmp_path / "sddpm"
    write_baseline([make_record(fd=d) for d in (1.0, 2.0, 3.0)], folder)
    assert read_baseline(folder).mean == 2
    write_baseline([make_record(fd=d) for d in (4.0, 5.0, 6.0, 7.0)], folder)
    assert sorted(read_baseline(folder).values) == [4, 5, 6, 7]


def test_too_few_records_are_refused(make_record: MakeRecord, tmp_path: Path) -> None:
    write_record(make_record(), tmp_path / "sdm")
    command = r"create it with: python -m benchmark regress --update --methods sdm"
    with pytest.raises(FileNotFoundError, match=rf"sdm has 1 records, but a baseline needs 3 seeds or more; {command}"):
        read_baseline(tmp_path / "sdm")
