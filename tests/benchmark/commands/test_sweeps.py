from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmark.cli import main
from benchmark.commands.sweeps import SOLVERS
from benchmark.runs import find_checkpoint, newest_run
from leaderboard.record.records import read_record
from systems.checkpoints import CheckpointMismatchError

FEW = ["--data.num_samples=24", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run of a tiny SDDPM of 100 diffusion steps, Gamma in its checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    main(
        [
            "fit",
            "--config=configs/quickstart.yaml",
            f"--trainer.default_root_dir={folder}",
            "--trainer.max_steps=3",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            "--model.base_channels=4",
            "--model.scheduler.num_train_timesteps=100",
            "--data.batch_size=256",
            "--monitor.every_n_epochs=0",
        ]
    )
    return folder


@pytest.fixture(scope="module")
def with_gamma(runs: Path) -> Path:
    main(["estimate-gamma", f"--trainer.default_root_dir={runs}", "--num_images=8"])
    return runs


def test_gamma_of_other_images_is_training_data(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(newest_run(runs), tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    main(["estimate-gamma", f"--ckpt_path={checkpoint}", "--num_images=8", "--data.image_size=12"])
    content = torch.load(checkpoint.with_name("last-gamma.ckpt"), weights_only=True)
    assert [data["geometry"]["image_size"] for data in content["training_data"]] == [8, 12]
    assert [data["name"] for data in content["training_data"]] == ["digits", "digits"]


def records(folder: Path) -> list:
    paths = (newest_run(folder) / "records").glob("*.json")
    return [read_record(path) for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)]


def test_analytic_sampler_asks_for_its_statistic(runs: Path) -> None:
    checkpoint = find_checkpoint(newest_run(runs))
    content = torch.load(checkpoint, weights_only=True)
    content.pop("gamma", None)
    plain = checkpoint.with_name("plain.ckpt")
    torch.save(content, plain)
    with pytest.raises(ValueError, match="python -m benchmark estimate-gamma"):
        main(["test", "--draft", f"--ckpt_path={plain}", "--model.scheduler=AnalyticDPMScheduler", *FEW])
    before = len(records(runs))
    with pytest.raises(ValueError, match="contains no Gamma for Analytic-DPM"):
        main(["sweep-solvers", "--draft", f"--ckpt_path={plain}", *FEW])
    assert len(records(runs)) == before
    plain.unlink()


def test_statistic_is_kept_in_the_checkpoint(with_gamma: Path) -> None:
    gamma = torch.load(find_checkpoint(newest_run(with_gamma)), weights_only=True)["gamma"]
    assert gamma["values"].shape == (100,)
    assert gamma["values"].dtype == torch.float64
    assert (gamma["values"] > 0).all()
    assert (gamma["num_images"], gamma["threshold"], gamma["num_steps"]) == (8, 1.0, 2)


def test_the_checkpoint_itself_is_left_as_it_was(with_gamma: Path) -> None:
    """So that records of it can be verified."""
    folder = newest_run(with_gamma) / "checkpoints"
    assert find_checkpoint(newest_run(with_gamma)).name == "last-gamma.ckpt"
    assert "gamma" not in torch.load(folder / "last.ckpt", weights_only=True)


def test_another_threshold_than_the_statistics_warns(with_gamma: Path) -> None:
    options = ["--model.scheduler=AnalyticDPMScheduler", "--model.num_inference_steps=2", "--model.threshold=0.9"]
    with pytest.warns(UserWarning, match=r"estimated with .*'threshold': 1\.0.*has .*'threshold': 0\.9"):
        main(["test", "--draft", f"--trainer.default_root_dir={with_gamma}", *options, *FEW])


def test_more_images_than_there_are_is_refused(runs: Path) -> None:
    with pytest.raises(ValueError, match=r"num_images=5000; give a number from 1 to the 1\d+ training images"):
        main(["estimate-gamma", f"--trainer.default_root_dir={runs}", "--num_images=5000"])


def test_solvers_are_compared_at_equal_evaluations(
    with_gamma: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(records(with_gamma))
    plot = tmp_path / "solvers.png"
    options = [f"--trainer.default_root_dir={with_gamma}", f"--output={plot}", *FEW]
    main(["sweep-solvers", "--draft", "--nfe", "3", *options])
    measured = records(with_gamma)[before:]
    assert [record.nfe for record in measured] == [3] * len(SOLVERS)
    assert len({record.solver for record in measured}) == len(SOLVERS)
    assert Image.open(plot).width > 600
    table = capsys.readouterr().out
    for name in SOLVERS:
        assert re.search(rf"│ {re.escape(name)} +│ +[\d.]+ \(±", table), name


def test_thresholds_change_the_firing_rate(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = len(records(runs))
    plot = tmp_path / "new" / "threshold.png"
    options = [f"--trainer.default_root_dir={runs}", f"--output={plot}", "--model.num_inference_steps=3", *FEW]
    main(["sweep-threshold", "--draft", "--thresholds", "0.5", "1.0", "1.5", *options])
    measured = records(runs)[before:]
    rates = [record.cost.firing_rate for record in measured]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 3
    assert [record.variant for record in measured] == ["threshold 0.5", "threshold 1", "threshold 1.5"]
    assert Image.open(plot).width > 600
    assert f"plot: {plot}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sweep-threshold", "--thresholds", "0"], "0 is not above 0"),
        (["sweep-threshold", "--thresholds", "one"], "invalid float value: 'one'"),
        (["sweep-solvers", "--nfe", "0"], "0 is not above 0"),
        (["sweep-solvers", "--solvers", "euler"], "invalid choice: 'euler'"),
        (["sweep-solvers", "--no-such-option"], "no-such-option"),
    ],
)
def test_wrong_options_end_with_code_2(
    args: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*args, f"--trainer.default_root_dir={runs}"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_solver_with_infinite_defaults_leaves_a_plain_record(runs: Path) -> None:
    options = ["--model.scheduler=DPMSolverMultistepScheduler", "--model.num_inference_steps=3"]
    main(["test", "--draft", f"--trainer.default_root_dir={runs}", *options, *FEW])
    paths = (newest_run(runs) / "records").glob("*.json")
    newest = max(paths, key=lambda path: path.stat().st_mtime_ns)
    config = json.loads(newest.read_text())["config"]
    assert config["model"]["init_args"]["scheduler"]["init_args"]["lambda_min_clipped"] == "-Infinity"


def test_another_process_than_in_training_is_refused(runs: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match="trained with prediction_type=sample but --model"):
        main(
            ["test", "--draft", f"--trainer.default_root_dir={runs}", "--model.scheduler.prediction_type=epsilon", *FEW]
        )
