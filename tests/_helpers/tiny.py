"""Trainings of a second or less, and helpers to run them in forked processes, which need no imports."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmark.cli import main
from benchmark.runs import find_checkpoint, newest_run

CALM = [
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.num_sanity_val_steps=0",
    "--monitor.every_n_epochs=0",
]
SDDPM = [
    "--config=configs/quickstart.yaml",
    *CALM,
    "--trainer.max_steps=-1",
    "--trainer.max_epochs=2",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.log_every_n_steps=2",
    "--model.base_channels=4",
    "--model.channel_mult=[1]",
    "--data.batch_size=256",
    "--data.num_samples=20",
]
"""Two epochs of five steps."""
SPIKING_DIFFUSION = [
    "--config=configs/spiking_diffusion_mnist.yaml",
    *CALM,
    "--trainer.log_every_n_steps=2",
    "--model.num_codes=16",
    "--model.code_channels=4",
    "--model.autoencoder_channels=8",
    "--model.base_channels=8",
    "--model.num_steps=2",
    "--model.num_train_timesteps=4",
    "--model.num_inference_steps=null",
    "--model.autoencoder_epochs=2",
    "--model.denoiser_epochs=2",
    "--data=Digits",
    "--data.image_size=8",
    "--data.batch_size=256",
    "--data.val_size=100",
]
"""Two epochs of five steps in each stage."""


def fit(folder: Path, *options: str) -> Path:
    """Trains, and returns the run folder."""
    main(["fit", *options, f"--trainer.default_root_dir={folder}"])
    return newest_run(folder)


def resume(folder: Path, *options: str) -> None:
    """Resumes the newest run in a folder."""
    main(["fit", "--ckpt_path=last", f"--trainer.default_root_dir={folder}", *options])


def weights(run: Path) -> dict[str, Tensor]:
    """Weights of the last checkpoint."""
    return torch.load(find_checkpoint(run), weights_only=True)["state_dict"]


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether weights are bit-equal."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def forked(work: Callable[[], Any], log: Path) -> multiprocessing.Process:
    """Runs `work` in a fork of this process; an error is written to `log` and gives exit code 1."""

    def child() -> None:
        with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                work()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                traceback.print_exc(file=file)
                code = 1
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def kill_after(process: BaseProcess, seconds: float) -> bool:
    """Kills a process; returns whether it was still alive."""
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0
