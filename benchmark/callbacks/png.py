"""PNG files of the images that `predict` generates."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from datamodules import ImageDataModule
from leaderboard.files import free_path
from leaderboard.pictures import enlargement, grid, rows_of_classes, save_png
from systems.base import DiffusionSystem


class PNGWriter(Callback):
    """Writes one PNG per generated image, named by its seed, and a grid of the first images. Replaces no file.

    The grid of a conditional method has one row per class instead.

    Args:
        folder: Folder of the images, to which other seeds may be added later; null writes to `samples/` in the run
            folder, or to `samples-2/`, `samples-3/`, ... if an earlier call wrote some of the same seeds.
        grid_images: Number of images in the grid; 0 draws none.
    """

    def __init__(self, folder: str | None = None, grid_images: int = 64) -> None:
        if grid_images < 0:
            raise ValueError(f"--png.grid_images={grid_images}; give 0 or more")
        self.folder = folder
        self.grid_images = grid_images
        self._folder, self._grid = Path(), Path()
        self._first: list[Tensor] = []
        self._labels: list[Tensor] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chooses names that no file has.

        Raises:
            FileExistsError: If the given folder already contains an image of one of the seeds.
        """
        data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        seeds = range(data.sample_seed, data.sample_seed + (data.num_samples or 0))
        folder = Path(self.folder) if self.folder else Path(trainer.log_dir or ".") / "samples"
        grid_path, taken = _names(folder, seeds)
        for number in count(2) if self.folder is None else ():
            if not taken:
                break
            folder = folder.with_name(f"samples-{number}")
            grid_path, taken = _names(folder, seeds)
        self._folder, self._grid, taken = trainer.strategy.broadcast((folder, grid_path, taken))
        if taken:
            raise FileExistsError(
                f"--png.folder {folder} already contains {taken[0].name}{' and others' * (len(taken) > 1)} of these "
                f"seeds, which is not replaced; give another folder, or other seeds by --data.sample_seed"
            )

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
            save_png(image, _image(self._folder, seed))
        if sum(map(len, self._first)) < self.grid_images:
            self._first.append(images)
            labels = pl_module.labels(batch) if isinstance(pl_module, DiffusionSystem) else None
            if labels is not None:
                self._labels.append(labels.cpu())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the grid and prints where the files are."""
        if trainer.is_global_zero:
            print(f"images: {self._folder}")
            if self._first:
                images = torch.cat(self._first)
                if self._labels:
                    images = rows_of_classes(images, torch.cat(self._labels), columns=8)
                else:
                    images = images[: self.grid_images]
                save_png(grid(images, columns=8, scale=enlargement(images.shape[-1])), self._grid)
                print(f"grid:   {self._grid}")
        self._first.clear()
        self._labels.clear()


def _image(folder: Path, seed: int) -> Path:
    return folder / f"{seed:06d}.png"


def _names(folder: Path, seeds: range) -> tuple[Path, list[Path]]:
    """Returns a free path for the grid of some seeds, and their images that a folder already contains."""
    taken = [path for seed in seeds if (path := _image(folder, seed)).exists()]
    plain = folder / "grid.png"
    return free_path(folder / f"grid-{seeds.start:06d}.png") if plain.exists() else plain, taken
