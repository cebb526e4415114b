"""Base class of the methods: a system generates images from seeds and is trained by a loss on images."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from systems.checkpoints import check_method, check_state
from systems.figures import Figure

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
LRSchedulerFactory = Callable[[Optimizer], LRScheduler]
Batch = Tensor | tuple[Tensor, Tensor]
"""Training images `(B, C, H, W)`; with their classes `(B,)` for a method that asks for them."""


def images_of(batch: Batch) -> Tensor:
    """Returns the images of a training batch."""
    return batch if isinstance(batch, Tensor) else batch[0]


class DiffusionSystem(L.LightningModule):
    """Base of the methods.

    Subclasses implement `loss` and `trajectory`; the four Lightning stages are built on them. The test and prediction
    loaders yield seeds, one for each image to generate.

    Args:
        optimizer: Creates the optimiser from the parameters.
        lr_scheduler: Creates a learning-rate schedule that is stepped after every optimiser step; None keeps the rate
            constant.
    """

    method: str
    """Name of the method in records and run folders."""
    num_steps: int
    """SNN time steps `T`."""
    num_inference_steps: int
    """Diffusion steps of the sampler."""
    threshold: float | None = None
    """Firing threshold of all neurons, where the method has one."""
    network: nn.Module
    """Network that generates the images; its parameters and operations are counted."""
    conditional: float | None = None
    """Scale of guidance of a method that generates images of given classes, 1 without guidance; else None."""
    is_generated = False
    """True while `test_step` should skip generation because this batch was restored from an interrupted test."""
    trains_in_parts: bool = False
    """Whether a training step leaves some parameters without gradient (needs DDP's `find_unused_parameters`)."""

    def __init__(self, optimizer: OptimizerFactory, lr_scheduler: LRSchedulerFactory | None = None) -> None:
        super().__init__()
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler

    @abstractmethod
    def loss(self, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        """Returns the scalar loss of a batch; `generator` makes it reproducible.

        Args:
            batch: Images `(B, C, H, W)` in [-1, 1], or images and their classes for a method that asks for them.
            generator: Source of all random draws.
        """

    @abstractmethod
    def trajectory(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Iterator[Tensor]:
        """Yields the images `(B, C, H, W)` at the start and after each diffusion step; the last are the samples.

        Args:
            seeds: One seed per image, `(B,)`. Only `seeds[k]` determines the noise of image `k`, so that it does not
                depend on its batch or on the number of devices (up to rounding).
            image_shape: `(C, H, W)`.
        """

    @property
    @abstractmethod
    def solver(self) -> str:
        """Name and settings of the sampler, for records."""

    @property
    @abstractmethod
    def nfe(self) -> int:
        """Network evaluations per image."""

    def labels(self, seeds: Tensor) -> Tensor | None:
        """Returns the class of the image of each seed, `(B,)`; None for a method without classes."""
        return None

    @torch.no_grad()
    def sample(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
        """Returns one image per seed, `(B, C, H, W)`; values may lie slightly outside [-1, 1]."""
        return deque(self.trajectory(seeds, image_shape), maxlen=1)[0]

    @property
    def generates(self) -> bool:
        """Whether training has reached the part that generates, so that samples are meaningful."""
        return True

    def reconstruction_metrics(self, batches: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
        """Returns reconstruction metrics of the method's autoencoder, each with its uncertainty.

        Methods without an autoencoder return none.

        Args:
            batches: Images `(B, C, H, W)` in [-1, 1].
        """
        return {}

    def figures(self) -> dict[str, Figure]:
        """Returns plots of learned quantities by name; they are drawn together with the samples during training."""
        return {}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds the random draws of a step from seed, epoch, batch and process only.

        A resumed training therefore draws the same numbers as an uninterrupted one, and a step can be repeated.
        """
        if seed := os.environ.get("PL_GLOBAL_SEED"):  # set by `seed_everything`, unless it is disabled
            step = f"{seed} {self.current_epoch} {batch_idx} {self.global_rank}"
            number = int.from_bytes(hashlib.sha256(step.encode()).digest()[:8], "big")
            torch.default_generator.manual_seed(number)  # torch.manual_seed is 100 times slower
            if self.device.type != "cpu":
                torch.get_device_module(self.device).manual_seed(number)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of a batch of images."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(images_of(batch)))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the loss with the same random draws in every epoch, for any number of processes.

        Batches are distributed over the processes in turn; batches that only pad the last turn have weight 0.
        """
        index = batch_idx * self.trainer.world_size + self.global_rank  # global batch index across all processes
        loader: Any = self.trainer.val_dataloaders
        images = images_of(batch)
        weight = len(images) if index * loader.batch_size < len(loader.dataset) else 0
        generator = torch.Generator(images.device).manual_seed(index)
        self.log("val/loss", self.loss(batch, generator), prog_bar=True, sync_dist=True, batch_size=weight)

    def test_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        """Returns the images `(B, C, H, W)` of a batch of seeds `(B,)`, or None if they were restored."""
        return None if self.is_generated else self.predict_step(batch, batch_idx)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Returns the images `(B, C, H, W)` of a batch of seeds `(B,)`."""
        return self.sample(batch, self._image_shape)

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        shape: tuple[int, int, int] = self.trainer.datamodule.image_shape  # type: ignore[attr-defined]
        return shape

    def configure_optimizers(self) -> Any:
        """Returns the optimiser and, if set, its learning-rate schedule, which counts steps."""
        optimizer = self._optimizer(p for p in self.parameters() if p.requires_grad)
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # else gradients of fused optimisers are not clipped
        if self._lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._lr_scheduler(optimizer), "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the method's name in the checkpoint."""
        checkpoint["method"] = self.method

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rejects a checkpoint of another method or network with a single message."""
        check_method(checkpoint, self.method, "the checkpoint")
        check_state(checkpoint["state_dict"], self, "the checkpoint")
