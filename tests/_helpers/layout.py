"""Command line for tests with several processes: random draws depend only on the image, and a process may be killed.

A network without BatchNorm then trains equally with any number of processes.
"""

from __future__ import annotations

import os
import signal
import sys
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmark.cli import main
from systems.base import DiffusionSystem
from systems.diffusion.gaussian import GaussianDiffusion


def loss(system: GaussianDiffusion, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Loss of a noise predictor, with `t` and noise seeded by each image."""
    generators = [torch.Generator().manual_seed(zlib.crc32(image.numpy().tobytes())) for image in images]
    noise = torch.stack([torch.randn(image.shape, generator=g) for image, g in zip(images, generators, strict=True)])
    t = torch.cat([torch.randint(1000, (1,), generator=g) for g in generators])
    return F.mse_loss(system.network(system.scheduler.add_noise(images, noise, t), t), noise)


def die(system: DiffusionSystem, batch: Tensor, batch_idx: int) -> None:
    """Kills the process of rank $DIES before its third step."""
    if system.global_rank == int(os.environ.get("DIES", -1)) and system.global_step == 2:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    GaussianDiffusion.loss = loss  # type: ignore[method-assign]
    DiffusionSystem.on_train_batch_start = die  # type: ignore[method-assign]
    main()
