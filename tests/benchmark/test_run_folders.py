"""Run folders: which checkpoint is chosen, which files are written, and that nothing of others is replaced."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from tiny import SDDPM, fit

from benchmark.cli import main
from benchmark.command_line import complete_loggers
from benchmark.runs import find_checkpoint, newest_run
from leaderboard.files import free_path
from leaderboard.record.entries import read_records
from leaderboard.record.records import find_records, read_record, write_record
from systems.checkpoints import save_checkpoint


class Stub(CSVLogger):
    """A logger of another package, with a folder of its own by default."""

    def __init__(self, save_dir: str = ".", project: str = "none") -> None:
        super().__init__(save_dir, name=project)


def best(folder: Path, scores: dict[int, float], mode: str = "min", callback: str = "BestCheckpoint") -> None:
    """Writes checkpoints as a callback does, in the order of `scores`."""
    kept: dict[str, Any] = {}
    for step, score in scores.items():
        kept[f"/elsewhere/best-step={step}.ckpt"] = torch.tensor(score)
        key = f"{callback}{ {'monitor': 'val/loss', 'mode': mode} }"
        content = {"state_dict": {}, "global_step": step, "callbacks": {key: {"best_k_models": dict(kept)}}}
        save_checkpoint(content, folder / "checkpoints" / f"best-step={step}.ckpt")


@pytest.mark.parametrize(("mode", "expected"), [("min", "best-step=2.ckpt"), ("max", "best-step=1.ckpt")])
def test_best_has_the_best_value_not_the_latest_time(mode: str, expected: str, tmp_path: Path) -> None:
    best(tmp_path, {1: 0.9, 2: 0.3, 3: 0.5}, mode)
    save_checkpoint({"state_dict": {}, "global_step": 4}, tmp_path / "checkpoints" / "last.ckpt")
    assert find_checkpoint(tmp_path, "best").name == expected


def test_best_is_not_of_another_callback(tmp_path: Path) -> None:
    best(tmp_path, {1: 0.9, 2: 0.8})
    best(tmp_path, {3: 0.1}, callback="ModelCheckpoint")
    assert find_checkpoint(tmp_path, "best").name == "best-step=2.ckpt"


def test_last_has_the_most_steps(tmp_path: Path) -> None:
    for time, (name, step) in enumerate({"last-v1": 20, "last": 10, "last-gamma": 8, "best-step=30": 30}.items()):
        path = tmp_path / "checkpoints" / f"{name}.ckpt"
        save_checkpoint({"state_dict": {}, "global_step": step}, path)
        os.utime(path, (time, time))
    assert find_checkpoint(tmp_path).name == "last-v1.ckpt"
    (tmp_path / "checkpoints" / "last-v1.ckpt").unlink()
    assert find_checkpoint(tmp_path).name == "last.ckpt"  # last-gamma is of an earlier one
    save_checkpoint({"state_dict": {}, "global_step": 10}, tmp_path / "checkpoints" / "last-gamma.ckpt")
    assert find_checkpoint(tmp_path).name == "last-gamma.ckpt"


def test_free_names(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        path = free_path(tmp_path / "plot.png")
        path.touch()
        names.append(path.name)
    assert names == ["plot.png", "plot-2.png", "plot-3.png"]


@pytest.fixture(scope="module")
def run(uncompiled: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of one epoch."""
    return fit(tmp_path_factory.mktemp("runs"), *SDDPM, "--trainer.max_epochs=1", "--model.num_inference_steps=2")


def test_predict_replaces_no_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "000009.png").write_text("a user's")
    predict = ["predict", f"--trainer.default_root_dir={run.parent}", "--data.num_samples=4"]
    given = [*predict, f"--png.folder={tmp_path}"]
    main(given)
    first = {path: path.read_bytes() for path in tmp_path.iterdir()}
    main([*given, "--data.sample_seed=4"])
    assert {path: path.read_bytes() for path in first} == first
    assert {path.name for path in tmp_path.iterdir()} - {path.name for path in first} == {
        *(f"{seed:06d}.png" for seed in range(4, 8)),
        "grid-000004.png",
    }
    with pytest.raises(FileExistsError, match=r"already contains 000009\.png of these seeds"):
        main([*given, "--data.sample_seed=8"])
    assert (tmp_path / "000009.png").read_text() == "a user's"
    main(predict)
    main(predict)
    for name in ("samples", "samples-2"):
        assert {path.name for path in (run / name).iterdir()} >= {"000000.png", "000003.png", "grid.png"}


@pytest.mark.parametrize(
    ("logger", "metrics"),
    [
        ("false", []),
        ("CSVLogger", ["lightning_logs/version_0/metrics.csv"]),
        ("[CSVLogger,TensorBoardLogger]", ["lightning_logs/version_0/metrics.csv", "hparams.yaml"]),
        ("test_run_folders.Stub", ["none/version_0/metrics.csv"]),
    ],
)
def test_a_run_is_one_folder_with_any_logger(
    logger: str, metrics: list[str], uncompiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Path("configs/quickstart.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("a user's")
    options = [option for option in SDDPM if not option.startswith("--config")]
    main(["fit", f"--config={config}", *options, "--trainer.max_epochs=1", f"--trainer.logger={logger}"])
    (folder,) = Path("runs").iterdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "runs"]
    assert Path("config.yaml").read_text() == "a user's"
    assert all((folder / path).is_file() for path in metrics)
    for file in folder.rglob("hparams.yaml"):
        assert yaml.safe_load(file.read_text())["model"]["init_args"]["base_channels"] == 4
    assert find_checkpoint(newest_run(Path("runs"))) == folder / "checkpoints" / "last.ckpt"
    assert str(folder) not in (folder / "config.yaml").read_text()


def test_the_folder_of_a_logger_is_the_users_choice() -> None:
    given = [
        "fit",
        "--trainer.logger={class_path: CSVLogger, init_args: {save_dir: mine}}",
        "--trainer.logger",
        "false",
    ]
    assert complete_loggers(given) == given


@pytest.mark.parametrize(
    "option",
    [
        "--trainer.accumulate_grad_batches=0",
        "--trainer.check_val_every_n_epoch=0",
        "--trainer.val_check_interval=0",
        "--trainer.log_every_n_steps=-1",
        "--trainer.gradient_clip_val=-1",
        "--trainer.num_sanity_val_steps=-2",
        "--trainer.devices=-1",
        "--data.batch_size=0",
        "--data.cache_dir=/dev/null/x",
        "--trainer.limit_train_batches=-1",
    ],
)
def test_a_refused_fit_leaves_no_folder(option: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=option.partition("=")[0].split(".")[1] if "cache" not in option else "cache"):
        main(["fit", *SDDPM, option, f"--trainer.default_root_dir={tmp_path}"])
    assert list(tmp_path.iterdir()) == []


def test_no_logged_step(uncompiled: None, tmp_path: Path) -> None:
    assert fit(tmp_path, *SDDPM, "--trainer.max_epochs=1", "--trainer.log_every_n_steps=0").is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model.optimizer=null", "--model.optimizer.lr=0.01"],
            "--model.optimizer.lr needs the class that has this option, for example: --model.optimizer "
            "torch.optim.Adam --model.optimizer.lr 0.01",
        ),
        (["--model.optimizer.rate=1"], "--model.optimizer.rate: torch.optim.Adam has no option 'rate'"),
        (["--model.optimizer.lr=fast"], "--model.optimizer.lr=fast: not a value that torch.optim.Adam accepts"),
        (["--trainer.logger.name=x"], "--trainer.logger.name needs the class"),
        (["--trainer.callbacks.decay=0.9"], "--trainer.callbacks+=EMAWeightAveraging --trainer.callbacks.decay 0.9"),
        (["--trainer.logger=CVSLogger"], "give the class of a logger, such as CSVLogger"),
    ],
)
def test_messages_say_what_to_type(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config=configs/quickstart.yaml", *options])
    said = capsys.readouterr().err
    assert message in said
    assert "NestedArg" not in said
    assert "collections.abc" not in said


def test_equal_records_are_one_row(tmp_path: Path) -> None:
    path = find_records(["leaderboard/data/records"])[0]
    record = read_record(path)
    write_record(record, tmp_path)
    again = replace(record, created="2027-01-01T00:00:00+00:00", wall_time_seconds=1.0)
    again = replace(again, cost=replace(record.cost, images_per_second=1.0))
    newest = write_record(again, tmp_path)
    assert [entry for entry, _ in read_records([tmp_path])[0]] == [newest]
    write_record(replace(again, nfe=record.nfe + 1), tmp_path)
    assert len(read_records([tmp_path])[0]) == 2
    assert len(find_records([tmp_path])) == 3
