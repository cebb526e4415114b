"""The same configuration and seed give the same weights bit for bit, in this process and in another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import SDDPM, equal, fit, weights

from benchmark.runs import newest_run

pytestmark = pytest.mark.usefixtures("uncompiled")
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


def test_in_another_process(first: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmark", "fit", *OPTIONS, f"--trainer.default_root_dir={tmp_path}"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # more threads sum in another order
    subprocess.run(command, env=os.environ | threads, check=True, capture_output=True, timeout=200)
    assert equal(weights(newest_run(tmp_path)), weights(first))
