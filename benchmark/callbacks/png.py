"""What `predict` leaves on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from leaderboard.pictures import enlargement, grid, save_png


class PNGWriter(Callback):
    """Writes what `predict` generates: one PNG per seed, and a grid of the first images.

    Args:
        folder: Folder of the images; `samples/` in the run folder if not given.
        grid_images: Images in the grid.
    """

    def __init__(self, folder: str | None = None, grid_images: int = 64) -> None:
        self.folder = folder
        self.grid_images = grid_images
        self._first: list[Tensor] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes what an earlier call left, which might have made more images."""
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
        """Writes the images of a batch of seeds, `<seed>.png`."""
        images = trainer.datamodule.to_uint8(outputs).cpu()  # type: ignore[attr-defined]
        for seed, image in zip(batch.tolist(), images, strict=True):
            save_png(image, self._folder(trainer) / f"{seed:06d}.png")
        if sum(map(len, self._first)) < self.grid_images:
            self._first.append(images)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the grid and says where everything is."""
        if self._first and trainer.is_global_zero:
            images = torch.cat(self._first)[: self.grid_images]
            path = self._folder(trainer) / "grid.png"
            save_png(grid(images, columns=8, scale=enlargement(images.shape[-1])), path)
            print(f"images: {path.parent}\ngrid:   {path}")
        self._first.clear()

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.folder) if self.folder else Path(trainer.log_dir or ".") / "samples"
