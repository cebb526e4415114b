"""Grids of images, as tensors and as PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from leaderboard.files import write_atomic


def grid(images: Tensor, columns: int, scale: int = 1) -> Tensor:
    """Arranges images in rows on a white page.

    Args:
        images: uint8 `(N, C, H, W)`, `C` 1 or 3.
        columns: Images per row. One image in one column is returned without a border.
        scale: Integer factor by which each pixel is enlarged.

    Returns:
        uint8 page `(C, height, width)`; its last row is filled up with white.
    """
    gap = max(1, scale // 2)
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    missing = -len(images) % columns
    images = torch.cat([images, images.new_full((missing, *images.shape[1:]), 255)])  # whole rows of white
    page = make_grid(images, nrow=columns, padding=gap, pad_value=255)  # repeats a single channel three times
    return page[: images.shape[1]]


def rows_of_classes(images: Tensor, labels: Tensor, columns: int) -> Tensor:
    """Arranges images so that each row of a grid shows one class, the first images of each; the rest is left out.

    Args:
        images: uint8 `(N, C, H, W)`.
        labels: Classes `(N,)`.
        columns: Images per row.

    Returns:
        One row per class that occurs, filled up with white, `(rows * columns, C, H, W)`.
    """
    rows = []
    for label in labels.unique():
        row = images[labels == label][:columns]
        rows += [row, row.new_full((columns - len(row), *row.shape[1:]), 255)]
    return torch.cat(rows)


def save_png(image: Tensor, path: Path) -> None:
    """Writes a uint8 image `(C, H, W)`, `C` 1 or 3, as an atomic PNG file."""
    array = image.cpu().movedim(0, -1).squeeze(-1).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def enlargement(size: int, target: int = 64) -> int:
    """Returns the integer scale that brings images of side `size` closest to `target` pixels, at least 1."""
    return max(1, round(target / size))
