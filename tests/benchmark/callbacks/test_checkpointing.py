"""Trainings that are killed, stopped or run out of disk space keep their checkpoints and resume exactly."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import yaml
from tiny import SDDPM, SPIKING_DIFFUSION, equal, fit, forked, kill_after, resume, weights
from torch import Tensor

from benchmark.callbacks.checkpointing import DivergenceError, LastCheckpoint
from benchmark.runs import find_checkpoint, newest_run
from datamodules import Digits
from systems import SDDPM as SDDPM_System
from systems.checkpoints import load_checkpoint, save_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*fork.*"), pytest.mark.usefixtures("uncompiled")]
METHODS = {"sddpm": [*SDDPM, "--data.flip=true"], "spiking-diffusion": SPIKING_DIFFUSION}


@pytest.fixture(scope="module")
def undisturbed(uncompiled: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, float]]:
    """Trains a method once, and returns the run that nothing disturbed and its seconds."""

    @cache
    def train(method: str) -> tuple[Path, float]:
        fit(tmp_path_factory.mktemp("warm"), *METHODS[method])
        start = time.perf_counter()
        run = fit(tmp_path_factory.mktemp("undisturbed"), *METHODS[method])
        return run, time.perf_counter() - start

    return train


def steps_of(folder: Path) -> int:
    """Steps of the last checkpoint below a folder, after every file there was found whole; -1 if there is none."""
    for path in folder.glob("*/config.yaml"):
        assert "model" in yaml.safe_load(path.read_text())
    found = {path.name: load_checkpoint(path)["global_step"] for path in folder.glob("*/checkpoints/*.ckpt")}
    return found.get("last.ckpt", -1)


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_training_goes_on_to_the_same_weights(
    method: str, undisturbed: Callable[[str], tuple[Path, float]], kills: int, tmp_path: Path
) -> None:
    options, (whole, seconds) = METHODS[method], undisturbed(method)
    chance, log = random.Random(0), tmp_path / "log"
    count = finished = 0
    while count < kills:
        folder, often = tmp_path / str(count + finished), f"--last.every_n_train_steps={chance.choice([1, 2, 3])}"
        killed = kill_after(forked(partial(fit, folder, *options, often), log), chance.uniform(0.2, 0.8) * seconds)
        steps = steps_of(folder)
        again = partial(fit, folder, *options) if steps < 0 else partial(resume, folder)
        killed += kill_after(forked(again, log), chance.uniform(0.2, 0.8) * seconds)
        assert steps_of(folder) >= steps  # nothing finished is lost
        if steps_of(folder) < 0:
            fit(folder, *options)
        else:
            resume(folder)
        assert equal(weights(newest_run(folder)), weights(whole)), log.read_text()
        count, finished = count + killed, finished + 2 - killed
        if not killed:
            seconds /= 2  # the machine was busier when the undisturbed training was timed
    print(f"{method}: {count} were killed, {finished} finished before")


def test_a_checkpoint_is_whole_whenever_its_writer_is_killed(kills: int, tmp_path: Path) -> None:
    chance, path = random.Random(0), tmp_path / "last.ckpt"

    def write(last: int) -> None:
        for step in range(last + 1, 10**6):
            save_checkpoint({"step": step, "weight": torch.full((10**6,), float(step))}, path)

    save_checkpoint({"step": 0, "weight": torch.zeros(10**6)}, path)
    step = 0
    for _ in range(kills):
        assert kill_after(forked(partial(write, step), tmp_path / "log"), chance.uniform(0.02, 0.3))
        content = load_checkpoint(path)
        assert content["step"] >= step
        step = content["step"]
        assert (content["weight"] == step).all()
    assert len(list(tmp_path.iterdir())) <= 3  # with the log, and at most one part


def test_a_cache_is_whole_whenever_its_builder_is_killed(kills: int, tmp_path: Path) -> None:
    chance = random.Random(0)
    start = time.perf_counter()
    whole = Digits(cache_dir=str(tmp_path / "whole"))
    expected = whole.fingerprint
    seconds = time.perf_counter() - start
    for trial in range(kills):
        cache = str(tmp_path / str(trial))
        kill_after(forked(Digits(cache_dir=cache).prepare_data, tmp_path / "log"), chance.uniform(0, 1) * seconds)
        again = Digits(cache_dir=cache)
        assert again.fingerprint == expected
        assert torch.equal(again.labelled("train")[0], whole.labelled("train")[0])


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[Tensor], Tensor]) -> None:
    """Does something with the loss of one training step."""
    training_step = SDDPM_System.training_step

    def disturbed(system: SDDPM_System, batch: Tensor, batch_idx: int) -> Tensor:
        loss = training_step(system, batch, batch_idx)
        return action(loss) if system.global_step == step else loss

    monkeypatch.setattr(SDDPM_System, "training_step", disturbed)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 2), (signal.SIGINT, 4)])  # 4 ends the epoch
def test_a_signal_saves_and_leaves(
    undisturbed: Callable[[str], tuple[Path, float]],
    number: signal.Signals,
    step: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(loss: Tensor) -> Tensor:
        for _ in range(2):  # as a terminal and a launcher pass it on
            os.kill(os.getpid(), number)
        return loss

    with monkeypatch.context() as patch:
        at_step(patch, step, stop)
        process = forked(partial(fit, tmp_path, *METHODS["sddpm"]), tmp_path / "log")
        process.join(60)
    assert process.exitcode == 128 + number
    last = newest_run(tmp_path) / "checkpoints" / "last.ckpt"
    said = (tmp_path / "log").read_text()
    assert f"stopped by {number.name} after step {step + 1}; resume with `python -m benchmark fit --ckpt_path" in said
    assert "Traceback" not in said
    assert load_checkpoint(last)["global_step"] == step + 1
    resume(tmp_path)
    assert equal(weights(newest_run(tmp_path)), weights(undisturbed("sddpm")[0]))


def test_a_second_signal_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(loss: Tensor) -> Tensor:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return loss

    at_step(monkeypatch, 2, stop)
    monkeypatch.setattr("benchmark.callbacks.checkpointing.SAME_SIGNAL", 0.1)
    process = forked(partial(fit, tmp_path, *SDDPM), tmp_path / "log")
    process.join(60)
    assert process.exitcode == -signal.SIGTERM
    assert not list(tmp_path.glob("*/checkpoints/last.ckpt"))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_ends_the_training(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 7, lambda loss: loss * float(value))
    with pytest.raises(
        DivergenceError,
        match=rf"^the loss is {value} at step 7 \(epoch 1, batch 2, process 0 of 1, seed_everything 42\); "
        r"the last good checkpoint is \S+/checkpoints/last.ckpt. Lower the learning rate",
    ):
        fit(tmp_path, *SDDPM)
    last = load_checkpoint(find_checkpoint(newest_run(tmp_path)))
    assert last["global_step"] == 5
    assert all(tensor.isfinite().all() for tensor in last["state_dict"].values() if tensor.is_floating_point())


def test_weights_that_are_no_numbers_reach_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(system: SDDPM_System, *args: object) -> None:
        if system.global_step == 10:
            next(system.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(SDDPM_System, "on_train_batch_end", spoil)
    with pytest.raises(
        DivergenceError, match=r"^network\.\S+ is not finite after step 9 \(epoch 1, batch 4.*last.ckpt"
    ):
        fit(tmp_path, *SDDPM, "--data.val_size=0")
    assert load_checkpoint(find_checkpoint(newest_run(tmp_path)))["global_step"] == 5


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(loss: Tensor) -> Tensor:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # bytes that a file may have
        return loss

    at_step(monkeypatch, 7, fill)
    process = forked(partial(fit, tmp_path, *SDDPM), tmp_path / "log")
    process.join(60)
    assert process.exitcode == 1
    said = (tmp_path / "log").read_text().splitlines()[-1]
    assert re.search(r"last\.ckpt \(.* MiB\) cannot be written \(File too large\); the previous", said)
    checkpoints = newest_run(tmp_path) / "checkpoints"
    assert load_checkpoint(checkpoints / "last.ckpt")["global_step"] == 5
    assert not list(checkpoints.glob(".*"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"\(File exists\); there is no previous one; free disk space or make"):
        save_checkpoint({}, tmp_path / "file" / "last.ckpt")
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write to folders that are read-only")
        with pytest.raises(OSError, match=r"cannot be written \(Permission denied\)"):
            save_checkpoint({}, tmp_path / "last.ckpt")
    finally:
        tmp_path.chmod(0o700)


def test_a_checkpoint_every_few_steps_protects_a_long_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(
        "benchmark.callbacks.checkpointing.save_checkpoint",
        lambda content, path: saved.append(int(content["global_step"])),
    )
    with contextlib.suppress(FileNotFoundError):  # no checkpoint, no newest run
        fit(tmp_path, *SDDPM, "--last.every_n_train_steps=2", "--data.val_size=0")
    assert saved == [2, 4, 5, 6, 8, 10]
    with pytest.raises(ValueError, match=r"--last.every_n_train_steps=0; give 1 or more"):
        LastCheckpoint(0)
