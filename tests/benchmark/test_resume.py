"""Evaluations that are killed, each in its own process, resume."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import forked, kill_after

from benchmark.cli import main
from benchmark.runs import new_run, newest_run
from leaderboard.evaluation.callback import Evaluation
from leaderboard.evaluation.chunks import Chunks
from leaderboard.record.records import Record, find_records, read_record, write_record

BATCHES = 8  # the last of 4 images


@pytest.fixture(scope="module")
def runs(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run of six steps."""
    return shutil.copytree(trained, tmp_path_factory.mktemp("runs") / "runs")


@pytest.fixture(scope="module")
def expected(runs: Path) -> tuple[Record, bytes]:
    """Record and grid of a test that nobody disturbs."""
    main(["test", "--draft", f"--trainer.default_root_dir={runs}"])
    assert not (newest_run(runs) / "evaluation").exists()
    return newest(runs)


def newest(runs: Path) -> tuple[Record, bytes]:
    run = newest_run(runs)
    path = max((run / "records").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return read_record(path), (run / "samples" / f"{path.stem}.png").read_bytes()


def chunks(runs: Path) -> list[Path]:
    return sorted(newest_run(runs).glob("evaluation/*/chunk-*.npz"))


def assert_same(found: tuple[Record, bytes], expected: tuple[Record, bytes]) -> None:
    (record, grid), (whole, whole_grid) = found, expected
    assert grid == whole_grid
    for name in Record.__dataclass_fields__:
        if name not in ("created", "wall_time_seconds", "cost", "config", "config_sha256", "variant"):
            assert getattr(record, name) == getattr(whole, name), name
    assert without_speed(record) == without_speed(whole)
    assert record.cost.images_per_second
    assert record.cost.images_per_second > 0


def without_speed(record: Record) -> dict[str, Any]:
    return vars(record.cost) | {"images_per_second": None}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def test_killed_command_goes_on(runs: Path, expected: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "benchmark", "test", "--draft", f"--trainer.default_root_dir={runs}"]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: len(chunks(runs)) >= 2)
        process.kill()
    done = chunks(runs)
    assert 2 <= len(done) <= BATCHES
    written = [path.stat().st_mtime_ns for path in done]
    main(["test", "--draft", f"--trainer.default_root_dir={runs}", "--evaluation.keep_samples=true"])
    assert f"resumes after {len(done)} finished batches" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in done] == written  # nothing was generated twice
    assert_same(newest(runs), expected)

    kept = chunks(runs)
    assert len(kept) == BATCHES
    kept[3].write_bytes(kept[3].read_bytes()[:-50])
    with pytest.warns(UserWarning, match=f"{kept[3].name} is damaged"):
        main(["test", "--draft", f"--trainer.default_root_dir={runs}"])
    assert_same(newest(runs), expected)
    assert chunks(runs) == []


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_killed_again_and_again_at_random_moments(trained: Path, kills: int, tmp_path: Path) -> None:
    runs, log, chance = shutil.copytree(trained, tmp_path / "runs"), tmp_path / "log", random.Random(0)
    test = ["test", "--draft", "--data.sample_batch_size=3", f"--trainer.default_root_dir={runs}"]  # 20 batches
    start = time.perf_counter()
    whole = forked(partial(main, test), log)
    whole.join()
    seconds, expected = time.perf_counter() - start, newest(runs)
    count = finished = 0
    while count < kills:
        before, records = whole_batches(runs), records_of(runs)
        count += kill_after(forked(partial(main, test), log), chance.uniform(0.1, 1) * seconds)
        new = records_of(runs) - records
        assert records <= records_of(runs)  # nothing finished is lost
        if new:
            finished += 1
            assert_same(newest(runs), expected)
        else:
            assert before.items() <= whole_batches(runs).items()
    main(test)
    assert_same(newest(runs), expected)
    assert newest(runs)[0].config == expected[0].config
    assert not (newest_run(runs) / "evaluation").exists()
    print(f"{count} kills of a test of {seconds:.1f} s, {finished} finished between them")


def records_of(runs: Path) -> set[str]:
    """The records of a run, after each and its picture were found whole."""
    paths = list(newest_run(runs).glob("records/*.json"))
    for path in paths:
        read_record(path)
        Image.open(newest_run(runs) / "samples" / f"{path.stem}.png").load()
    return {path.name for path in paths}


def whole_batches(runs: Path) -> dict[Path, bytes]:
    """The finished batches of a run, after each was found whole."""
    with warnings.catch_warnings(action="error"):
        for path in chunks(runs):
            assert Chunks(path.parent).read(int(path.stem.removeprefix("chunk-")), 3)
    return {path: path.read_bytes() for path in chunks(runs)}


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_records_are_whole_whenever_their_writer_is_killed(
    runs: Path, expected: Any, kills: int, tmp_path: Path
) -> None:
    folder, chance, record = tmp_path / "records", random.Random(0), expected[0]

    def write(first: int) -> None:
        for k in range(first, 10**6):
            write_record(replace(record, wall_time_seconds=float(k)), folder)

    started = time.perf_counter()
    write_record(record, tmp_path / "timed")
    seconds = max(time.perf_counter() - started, 0.01)
    found: dict[str, float] = {}
    for _ in range(kills):
        assert kill_after(forked(partial(write, len(found)), tmp_path / "log"), chance.uniform(2, 20) * seconds)
        names = {path.name for path in find_records([folder])}
        assert names >= found.keys()  # nothing is lost
        found |= {name: read_record(folder / name).wall_time_seconds for name in names - found.keys()}
        assert sorted(found.values()) == list(range(len(found)))
    assert len(found) >= kills
    parts = len(list(folder.glob(".*.part")))
    print(f"{len(found)} records, {parts} of {kills} kills within the writing of a file")


def test_two_processes_go_on_from_one(runs: Path, expected: tuple[Record, bytes]) -> None:
    main(["test", "--draft", f"--trainer.default_root_dir={runs}", "--evaluation.keep_samples=true"])
    chunks(runs)[2].unlink()
    command = [sys.executable, "-m", "benchmark", "test", "--draft", f"--trainer.default_root_dir={runs}"]
    processes = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    with subprocess.Popen([*command, *processes], cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: process.poll() is not None)
    assert chunks(runs) == []
    (record, grid), (whole, whole_grid) = newest(runs), expected
    assert grid == whole_grid
    assert record.cost.firing_rates == pytest.approx(whole.cost.firing_rates, rel=1e-12)  # sums in another order
    assert record.cost.energy_strict_mj == pytest.approx(whole.cost.energy_strict_mj, rel=1e-12)
    for key, metric in record.metrics.items():
        assert metric.value == pytest.approx(whole.metrics[key].value, rel=1e-9)
        assert metric.num_samples == whole.metrics[key].num_samples


def test_options_that_change_images_take_up_nothing(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = ["test", "--draft", f"--trainer.default_root_dir={runs}", "--evaluation.keep_samples=true"]
    main([*test, "--data.num_samples=2000", "--data.sample_batch_size=30", "--trainer.limit_test_batches=0.02"])
    record, _ = newest(runs)
    assert record.draft  # fewer than asked for
    assert record.metrics["fd_digits"].num_samples == 30
    main([*test, "--data.num_samples=30", "--data.sample_batch_size=30", "--model.num_inference_steps=2"])
    assert "resumes" not in capsys.readouterr().out
    assert newest(runs)[0].nfe == 2
    main([*test, "--data.num_samples=40", "--data.sample_batch_size=30", "--evaluation.variant=kept"])
    assert "resumes after 1 finished batches" in capsys.readouterr().out
    assert newest(runs)[0].metrics["fd_digits"].num_samples == 40


def test_model_without_a_file_leaves_no_batches(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmark.stages import run_stage

    run = newest_run(runs)
    cli = run_stage(
        ["test", "--draft", f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"]
    )
    monkeypatch.setattr("leaderboard.evaluation.chunks.Chunks.write", None)
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    (evaluation,) = (c for c in cli.trainer.callbacks if isinstance(c, Evaluation))  # type: ignore[attr-defined]
    assert evaluation.record is not None
    assert evaluation.record.checkpoint is None


def test_checkpoint_from_elsewhere_always_has_the_same_folder(tmp_path: Path) -> None:
    checkpoint = tmp_path / "imported.ckpt"
    checkpoint.write_bytes(b"1")
    first = new_run(tmp_path, "digits", "sddpm", checkpoint)
    assert first == new_run(tmp_path, "digits", "sddpm", checkpoint) == tmp_path / "digits-sddpm-6b86b273"
    checkpoint.write_bytes(b"2")
    assert new_run(tmp_path, "digits", "sddpm", checkpoint) != first
