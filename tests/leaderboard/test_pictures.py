from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from leaderboard.pictures import enlargement, grid, save_png


def test_grid_places_every_image() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    page = grid(images, columns=3)
    assert page.shape == (1, 7, 10)
    assert page[0, 1::3, 1::3].tolist() == [[0, 1, 2], [3, 4, 255]]
    assert (page[:, ::3] == 255).all()
    assert (page[:, :, ::3] == 255).all()


def test_grid_enlarges_pixels() -> None:
    page = grid(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), columns=1, scale=4)
    assert page.shape == (3, 12, 12)
    assert int((page == 0).sum()) == 3 * 64


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_pixels(channels: int, tmp_path: Path) -> None:
    image = torch.randint(256, (channels, 5, 4), dtype=torch.uint8)
    save_png(image, tmp_path / "new" / "image.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "image.png")).reshape(5, 4, channels)
    assert np.array_equal(pixels, image.permute(1, 2, 0).numpy())


def test_small_images_are_enlarged() -> None:
    assert [enlargement(size) for size in (8, 28, 64, 200)] == [8, 2, 1, 1]
