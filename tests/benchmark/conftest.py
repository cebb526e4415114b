from __future__ import annotations

from pathlib import Path

import pytest

from benchmark.cli import main

TINY = [
    "--config=configs/quickstart.yaml",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_steps=6",
    "--model.base_channels=8",
    "--model.num_inference_steps=3",
    "--data.batch_size=256",
    "--data.num_samples=60",
    "--data.sample_batch_size=8",
    "--monitor.every_n_epochs=0",
]


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    """Kills that a test tries."""
    return int(request.config.getoption("--kills"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run of six steps, to be copied by those who add to it."""
    folder = tmp_path_factory.mktemp("trained")
    main(["fit", *TINY, f"--trainer.default_root_dir={folder}"])
    return folder
