"""Grids of images, as tensors and as PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from leaderboard.files import write_atomic


def grid(images: Tensor, columns: int, scale: int = 1) -> Tensor:
    """Arranges images in rows, on white.

    Args:
        images: uint8 `(N, C, H, W)`.
        columns: Images in a row.
        scale: Whole enlargement of each pixel.

    Returns:
        uint8 page `(C, height, width)`.
    """
    gap = max(1, scale // 2)
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    missing = -len(images) % columns
    images = torch.cat([images, images.new_full((missing, *images.shape[1:]), 255)])
    images = F.pad(images, (0, gap, 0, gap), value=255)
    rows = images.unflatten(0, (-1, columns))  # (rows, columns, C, H, W)
    page = rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)  # (C, rows * H, columns * W)
    return F.pad(page, (gap, 0, gap, 0), value=255)


def save_png(image: Tensor, path: Path) -> None:
    """Writes a uint8 image `(C, H, W)` of 1 or 3 channels, whole or not at all."""
    array = image.cpu().movedim(0, -1).squeeze(-1).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def enlargement(size: int, target: int = 64) -> int:
    """Returns the whole factor that brings small images near `target` pixels."""
    return max(1, round(target / size))
