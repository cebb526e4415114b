"""PNG files of the images that `predict` generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from datamodules import ImageDataModule
from leaderboard.pictures import enlargement, grid, rows_of_classes, save_png
from systems.base import DiffusionSystem


class PNGWriter(Callback):
    """Writes one PNG per generated image, named by its seed, and a grid of the first images.

    The grid of a conditional method has one row per class instead.

    Args:
        folder: Folder of the images; null writes to `samples/` in the run folder.
        grid_images: Number of images in the grid.
    """

    def __init__(self, folder: str | None = None, grid_images: int = 64) -> None:
        self.folder = folder
        self.grid_images = grid_images
        self._first: list[Tensor] = []
        self._labels: list[Tensor] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the images of an earlier call, which may have been more."""
        if trainer.is_global_zero:
            for path in self._folder(trainer).glob("[0-9]" * 6 + ".png"):
                path.unlink()
        trainer.strategy.barrier()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the images of a batch of seeds as `<seed>.png`."""
        data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        images = data.to_uint8(outputs).cpu()
        for seed, image in zip(batch.tolist(), images, strict=True):
            save_png(image, self._folder(trainer) / f"{seed:06d}.png")
        if sum(map(len, self._first)) < self.grid_images:
            self._first.append(images)
            labels = pl_module.labels(batch) if isinstance(pl_module, DiffusionSystem) else None
            if labels is not None:
                self._labels.append(labels.cpu())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the grid and prints where the files are."""
        if self._first and trainer.is_global_zero:
            images = torch.cat(self._first)
            if self._labels:
                images = rows_of_classes(images, torch.cat(self._labels), columns=8)
            else:
                images = images[: self.grid_images]
            path = self._folder(trainer) / "grid.png"
            save_png(grid(images, columns=8, scale=enlargement(images.shape[-1])), path)
            print(f"images: {path.parent}\ngrid:   {path}")
        self._first.clear()
        self._labels.clear()

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.folder) if self.folder else Path(trainer.log_dir or ".") / "samples"
