"""The same configuration and seed give the same weights bit for bit, in this process and in another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import CALM, SDDPM, equal, fit, weights

from benchmark.cli import main
from benchmark.commands.regress import METHODS
from benchmark.runs import find_checkpoint, newest_run
from leaderboard.record.records import find_records, read_record

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("uncompiled")]
OPTIONS = [*SDDPM, "--trainer.max_epochs=1", "--data.batch_size=32", "--trainer.limit_train_batches=5"]


@pytest.fixture(scope="module")
def first(uncompiled: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("first"), *OPTIONS)


@pytest.mark.parametrize(
    ("options", "same"), [([], True), (["--trainer.deterministic=true"], True), (["--seed_everything=43"], False)]
)
def test_in_one_process(options: list[str], same: bool, first: Path, tmp_path: Path) -> None:
    try:
        assert equal(weights(fit(tmp_path, *OPTIONS, *options)), weights(first)) == same
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - METHODS.values()))  # others are where these start
def test_every_method_has_deterministic_algorithms(method: str, tmp_path: Path) -> None:
    """Torch refuses an operation that has none; training and sampling are the same twice."""
    base = METHODS[method]
    start, runs = [], []
    try:
        if base is not None:
            run = fit(tmp_path / "base", *small(base), "--trainer.deterministic=true")
            start = [f"--model.init_from={find_checkpoint(run)}"]
        for name in ("first", "second"):
            runs.append(fit(tmp_path / name, *small(method), *start, "--trainer.deterministic=true"))
            main(["test", "--draft", f"--trainer.default_root_dir={tmp_path / name}"])
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert equal(*map(weights, runs))
    first, second = (read_record(path).metrics for path in find_records(runs))
    assert first == second


def small(method: str) -> list[str]:
    """Options of a run of two steps."""
    two = "--trainer.limit_train_batches=1" if method == "spiking_diffusion" else "--trainer.max_steps=2"
    epochs = ["--model.autoencoder_epochs=1", "--model.denoiser_epochs=1"] * (method == "spiking_diffusion")
    data = ["--data.batch_size=32", "--data.num_samples=20", "--data.val_size=0", "--model.num_inference_steps=2"]
    return [f"--config=configs/regress/{method}.yaml", *CALM, *data, two, *epochs]


def test_in_another_process(first: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmark", "fit", *OPTIONS, f"--trainer.default_root_dir={tmp_path}"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # more threads sum in another order
    subprocess.run(command, env=os.environ | threads, check=True, capture_output=True, timeout=200)
    assert equal(weights(newest_run(tmp_path)), weights(first))
