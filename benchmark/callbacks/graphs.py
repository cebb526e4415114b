"""Training of small networks on a GPU, which the CPU would be too slow to launch operation by operation."""

from __future__ import annotations

from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from systems.base import DiffusionSystem
from systems.ops.cuda_graphs import TrainingReplay


class TrainingGraphs(Callback):
    """Replays the network's forward and backward pass of training as CUDA graphs (experimental).

    The arithmetic is the same, and compared once in each training; the graphs keep memory of their own.

    Args:
        enabled: Whether to.
    """

    def __init__(self, enabled: bool = False) -> None:
        self.enabled = enabled

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the system train its network through a replay.

        Raises:
            ValueError: If there is no single GPU, gradients of several batches are added up, the method steps its
                optimisers itself, or there is dropout, whose random numbers a graph draws in another order.
        """
        if not self.enabled:
            return
        device, batches = pl_module.device.type, trainer.accumulate_grad_batches
        reasons = {
            f"training is on {device}": device != "cuda",
            f"training is on {trainer.world_size} devices": trainer.world_size > 1,
            f"--trainer.accumulate_grad_batches is {batches}": batches > 1,
            f"{type(pl_module).__name__} trains two networks": not pl_module.automatic_optimization,
            "the network has dropout": any(isinstance(m, nn.Dropout) and m.p > 0 for m in pl_module.modules()),
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise ValueError(
                "--graphs.enabled true is for one GPU, one batch per step and one network without dropout, but "
                f"{', '.join(found)}; leave it out"
            )
        system = cast(DiffusionSystem, pl_module)
        system.replay = TrainingReplay(system.network)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Frees the graphs."""
        cast(DiffusionSystem, pl_module).replay = None
