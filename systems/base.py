"""What every method shares: a system turns seeds into images, and trains by a loss on images."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from systems.checkpoints import check_method, check_state
from systems.ops.cuda_graphs import TrainingReplay

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
LRSchedulerFactory = Callable[[Optimizer], LRScheduler]


class DiffusionSystem(L.LightningModule):
    """Base of the methods.

    A method gives `loss` and `trajectory`; training, validation, test and prediction follow. The loaders of test and
    prediction yield seeds, one for each image to generate.

    Args:
        optimizer: Makes the optimiser of the parameters.
        lr_scheduler: Makes a learning-rate schedule that is stepped after every optimiser step; none keeps it constant.
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
    is_generated = False
    """Whether the images of the batch to test exist already, from a test that was interrupted."""
    trains_in_parts: bool = False
    """Whether a step of training leaves parameters without a gradient, of which several processes must know."""
    replay: TrainingReplay | None = None
    """What the network is trained through, where its passes are CUDA graphs."""

    def __init__(self, optimizer: OptimizerFactory, lr_scheduler: LRSchedulerFactory | None = None) -> None:
        super().__init__()
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler

    @abstractmethod
    def loss(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns the scalar loss of images `(B, C, H, W)` in [-1, 1]; `generator` fixes its random draws."""

    @abstractmethod
    def trajectory(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Iterator[Tensor]:
        """Yields the images `(B, C, H, W)` at the start and after each diffusion step; the last ones are the samples.

        Args:
            seeds: One seed for each image, `(B,)`: it alone fixes the noise of that image, so that image `k` does not
                depend on the batch it is drawn in or on the number of devices (up to rounding).
            image_shape: `(C, H, W)`.
        """

    @property
    @abstractmethod
    def solver(self) -> str:
        """Name of the sampler and its settings, for records."""

    @property
    @abstractmethod
    def nfe(self) -> int:
        """Network evaluations per image."""

    @torch.no_grad()
    def sample(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
        """Returns one image for each seed, `(B, C, H, W)`; values may lie slightly outside [-1, 1]."""
        return deque(self.trajectory(seeds, image_shape), maxlen=1)[0]

    @property
    def generates(self) -> bool:
        """Whether the method is trained far enough for pictures of its samples to mean anything."""
        return True

    def reconstruction_metrics(self, batches: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
        """Returns how well images `(B, C, H, W)` in [-1, 1] survive the method's autoencoder, value and uncertainty.

        Methods without an autoencoder have no such metric.
        """
        return {}

    def figures(self) -> dict[str, Figure]:
        """Plots of what the method has learned, by name; drawn with the pictures of training."""
        return {}

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Makes all draws of a step depend on seed, epoch, batch and process alone.

        So a training that was stopped and goes on draws what it would have drawn, and a step can be repeated.
        """
        if seed := os.environ.get("PL_GLOBAL_SEED"):  # set by `seed_everything`, unless that is off
            place = f"{seed} {self.current_epoch} {batch_idx} {self.global_rank}"
            number = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big")
            torch.default_generator.manual_seed(number)  # torch.manual_seed takes a hundred times as long
            if self.device.type != "cpu":
                torch.get_device_module(self.device).manual_seed(number)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Returns the loss of a batch of images."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Logs the loss with draws that are the same in every epoch, for any number of processes.

        Processes take whole batches in turn; what fills up the last turn has no weight.
        """
        index = batch_idx * self.trainer.world_size + self.global_rank  # of this batch among those of all processes
        loader: Any = self.trainer.val_dataloaders
        weight = len(batch) if index * loader.batch_size < len(loader.dataset) else 0
        generator = torch.Generator(batch.device).manual_seed(index)
        self.log("val/loss", self.loss(batch, generator), prog_bar=True, sync_dist=True, batch_size=weight)

    def test_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        """Returns the images `(B, C, H, W)` of a batch of seeds `(B,)`, nothing if they exist already."""
        return None if self.is_generated else self.predict_step(batch, batch_idx)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Returns the images `(B, C, H, W)` of a batch of seeds `(B,)`."""
        return self.sample(batch, self._image_shape)

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        shape: tuple[int, int, int] = self.trainer.datamodule.image_shape  # type: ignore[attr-defined]
        return shape

    def configure_optimizers(self) -> Any:
        """Makes the optimiser and, where one is set, its schedule in steps."""
        optimizer = self._optimizer(p for p in self.parameters() if p.requires_grad)
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # else fused ones are not clipped
        if self._lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._lr_scheduler(optimizer), "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Names the method in the checkpoint."""
        checkpoint["method"] = self.method

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another method or network with one message."""
        check_method(checkpoint, self.method, "the checkpoint")
        check_state(checkpoint["state_dict"], self, "the checkpoint")
