"""Grids of images, as tensors and as PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from leaderboard.files import write_atomic

GRID_COLUMNS = 8
"""Images in each row of a saved sample grid; of a conditional method each row shows one class."""


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


def excerpt(page: Image.Image, rows: int, columns: int, by_class: bool = False) -> np.ndarray:
    """Returns a smaller grid with the first images of a saved sample grid.

    Args:
        page: Sample grid of eight columns.
        rows: Rows of the smaller grid; fewer if the sample grid has fewer images.
        columns: Images per row, at most eight.
        by_class: Whether each row of the sample grid shows one class; the smaller one then shows the classes in turn.

    Returns:
        uint8 `(height, width, 3)`.
    """
    pixels = np.asarray(page.convert("RGB"))
    pitch, gap = divmod(pixels.shape[1], GRID_COLUMNS)
    height = (pixels.shape[0] - gap) // max(pitch, 1)  # in images
    if not pitch or not height:  # not a grid
        return pixels
    rows = min(rows, height)
    places = [(y, x) for x in range(columns) for y in range(height)]
    if not by_class:
        places = [(y, x) for y in range(height) for x in range(columns)]
    smaller = np.full((rows * pitch + gap, columns * pitch + gap, 3), 255, np.uint8)
    for k, (y, x) in enumerate(places[: rows * columns]):
        to_y, to_x = divmod(k, columns)
        smaller[_cell(to_y, to_x, pitch, gap)] = pixels[_cell(y, x, pitch, gap)]
    return smaller


def _cell(row: int, column: int, pitch: int, gap: int) -> tuple[slice, slice]:
    """Returns where an image of a grid is, with its border."""
    top, left = row * pitch, column * pitch
    return slice(top, top + pitch + gap), slice(left, left + pitch + gap)


def save_png(image: Tensor, path: Path) -> None:
    """Writes a uint8 image `(C, H, W)`, `C` 1 or 3, as an atomic PNG file."""
    array = image.cpu().movedim(0, -1).squeeze(-1).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def enlargement(size: int, target: int = 64) -> int:
    """Returns the integer scale that brings images of side `size` closest to `target` pixels, at least 1."""
    return max(1, round(target / size))
