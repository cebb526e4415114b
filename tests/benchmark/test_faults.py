"""Trainings that are killed, stopped or run out of room lose nothing that was finished, and go on as if not stopped."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny import SDDPM, SPIKING_DIFFUSION, equal, fit, forked, resume, weights

from benchmark.runs import find_checkpoint, newest_run
from datamodules import Digits
from systems.checkpoints import load_checkpoint, save_checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore:.*fork.*"), pytest.mark.usefixtures("uncompiled")]
METHODS = {"sddpm": SDDPM, "spiking-diffusion": SPIKING_DIFFUSION}


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--kills"))


@pytest.fixture(scope="module", params=METHODS)
def undisturbed(
    request: pytest.FixtureRequest, uncompiled: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path, float]:
    """Options of a training, the run that nothing disturbed, and its seconds."""
    options = METHODS[request.param]
    folder = tmp_path_factory.mktemp("undisturbed")
    fit(folder / "warm", *options)
    start = time.perf_counter()
    run = fit(folder / "run", *options)
    return options, run, time.perf_counter() - start


def kill_after(process: object, seconds: float) -> bool:
    """Kills a process; returns whether it was still alive."""
    process.join(seconds)  # type: ignore[attr-defined]
    alive = process.exitcode is None  # type: ignore[attr-defined]
    process.kill()  # type: ignore[attr-defined]
    process.join()  # type: ignore[attr-defined]
    assert process.exitcode in (0, -signal.SIGKILL)  # type: ignore[attr-defined]
    return alive


def steps_of(folder: Path) -> int:
    """Steps of the last checkpoint below a folder, after every file there was found whole; -1 if there is none."""
    for path in folder.glob("*/config.yaml"):
        assert "model" in yaml.safe_load(path.read_text())
    found = {path.name: load_checkpoint(path)["global_step"] for path in folder.glob("*/checkpoints/*.ckpt")}
    return found.get("last.ckpt", -1)


def test_a_killed_training_goes_on_to_the_same_weights(
    undisturbed: tuple[list[str], Path, float], kills: int, tmp_path: Path
) -> None:
    options, whole, seconds = undisturbed
    chance = random.Random(0)
    killed = 0
    for trial in range(kills):
        folder, log = tmp_path / str(trial), tmp_path / "log"
        often = f"--last.every_n_train_steps={chance.choice([1, 3, 7])}"

        def start(folder: Path = folder, often: str = often) -> None:
            fit(folder, *options, often)

        killed += kill_after(forked(start, log), chance.uniform(0.1, 1) * seconds)
        steps = steps_of(folder)
        if steps >= 0:
            killed += kill_after(forked(lambda folder=folder: resume(folder), log), chance.uniform(0.1, 1) * seconds)
            assert steps_of(folder) >= steps  # nothing finished is lost
            resume(folder)
        else:
            fit(folder, *options)
        assert equal(weights(newest_run(folder)), weights(whole)), log.read_text()
    assert killed
    print(f"{killed} kills")
