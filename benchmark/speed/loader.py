"""Speed of the train loader, against a loader that prepares images one by one."""

from __future__ import annotations

import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, ToTensor

from benchmark.speed.timing import median_seconds
from datamodules import FMNIST
from leaderboard.reports.terminal import terminal

SYNTHETIC_IMAGES = {"train": 60_000, "t10k": 256}


class _ImageByImage(Dataset[Tensor]):
    """The usual dataset: converts each image from PIL to a tensor and normalises it."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.transform = Compose([ToTensor(), Normalize(0.5, 0.5)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.fromarray(self.images[index, 0].numpy()))


def loader_speed(root: str | None = None, batch_size: int = 128, epochs: int = 2) -> None:
    """Measures the train loader of FashionMNIST, in images/s, against one that prepares images one by one.

    Args:
        root: Folder of FashionMNIST; if not given, the same number of random images is used.
        batch_size: Images per batch.
        epochs: Timed passes over the training images, whose median time is reported.
    """
    if epochs < 1:
        raise ValueError(f"epochs={epochs} is too small; use 1 or more")
    with TemporaryDirectory() as folder:
        if root is None:
            write_random_images(Path(folder))
        data = FMNIST(folder if root is None else root, batch_size, cache_dir=folder if root is None else None)
        data.prepare_data()
        images, _ = data.labelled("train")
        ours = images_per_second(data.train_dataloader(), epochs)
        common = DataLoader(_ImageByImage(images), batch_size, shuffle=True, drop_last=True)
        theirs = images_per_second(common, epochs)
    table = Table("loader", "images/s", title=f"{len(images):,} images of 28x28, batches of {batch_size}, no worker")
    table.columns[1].justify = "right"
    table.add_row("FMNIST.train_dataloader()", f"{ours:,.0f}")
    table.add_row("image by image (PIL, ToTensor, Normalize)", f"{theirs:,.0f}")
    table.add_row("ratio", f"{ours / theirs:.0f}")
    terminal().print(table)


def images_per_second(loader: DataLoader[Tensor], epochs: int) -> float:
    """Returns the images of an epoch over the median time of `epochs` epochs."""
    counts: list[int] = []

    def epoch() -> None:
        counts.append(sum(len(batch) for batch in loader))

    seconds = median_seconds(epoch, epochs, torch.device("cpu"), warm_up=0)
    return counts[0] / seconds


def write_random_images(folder: Path) -> None:
    """Writes random images and labels to IDX files, in FashionMNIST's sizes and numbers."""
    random = np.random.default_rng(0)
    for split, count in SYNTHETIC_IMAGES.items():
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        _write_idx(folder / f"{split}-images-idx3-ubyte", images)
        _write_idx(folder / f"{split}-labels-idx1-ubyte", labels)


def _write_idx(file: Path, array: NDArray[np.uint8]) -> None:
    file.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())
