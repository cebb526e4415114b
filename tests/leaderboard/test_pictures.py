from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from leaderboard.pictures import enlargement, excerpt, grid, rows_of_classes, save_png


def test_grid_places_every_image() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    page = grid(images, columns=3)
    assert page.shape == (1, 7, 10)
    assert page[0, 1::3, 1::3].tolist() == [[0, 1, 2], [3, 4, 255]]
    assert (page[:, ::3] == 255).all()
    assert (page[:, :, ::3] == 255).all()


def test_grid_enlarges_pixels() -> None:
    page = grid(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), columns=2, scale=4)
    assert page.shape == (3, 12, 22)
    assert int((page == 0).sum()) == 3 * 128


def test_each_row_of_a_conditional_grid_is_one_class() -> None:
    images = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1)
    labels = torch.tensor([5, 0, 5, 5, 0, 2, 5])
    rows = rows_of_classes(images, labels, columns=3).view(-1, 3)
    assert rows.tolist() == [[1, 4, 255], [5, 255, 255], [0, 2, 3]]


@pytest.mark.parametrize("size", [3, 7])  # enlarged or not
def test_an_excerpt_is_a_smaller_grid(size: int) -> None:
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 1, size, size)
    pixels = grid(images, columns=8, scale=enlargement(size, 14)).expand(3, -1, -1)
    page = Image.fromarray(pixels.movedim(0, -1).numpy())

    def seen(*options: int | bool) -> list[int]:
        return list(dict.fromkeys(excerpt(page, *options).flatten().tolist()))  # type: ignore[arg-type]

    assert seen(2, 3) == [255, 0, 1, 2, 8, 9, 10]
    assert seen(2, 3, True) == [255, 0, 8, 16, 24, 32, 1]  # of five classes
    assert seen(9, 8) == [255, *range(40)]
    assert np.array_equal(excerpt(page, 9, 8), np.asarray(page))


def test_an_excerpt_of_another_picture_is_the_picture() -> None:
    for shape in ((5, 3, 3), (2, 80, 3)):
        pixels = np.zeros(shape, np.uint8)
        assert np.array_equal(excerpt(Image.fromarray(pixels), 3, 8), pixels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("count", [1, 4, 7, 8])
def test_grid_equals_images_pasted_one_by_one(channels: int, scale: int, count: int) -> None:
    images = torch.randint(256, (count, channels, 3, 5), dtype=torch.uint8)
    gap, rows = max(1, scale // 2), -(-count // 4)
    height, width = 3 * scale + gap, 5 * scale + gap
    expected = torch.full((channels, rows * height + gap, 4 * width + gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // 4 * height + gap, i % 4 * width + gap
        enlarged = torch.kron(image, torch.ones(1, scale, scale, dtype=torch.uint8))
        expected[:, top : top + 3 * scale, left : left + 5 * scale] = enlarged
    assert torch.equal(grid(images, columns=4, scale=scale), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_pixels(channels: int, tmp_path: Path) -> None:
    image = torch.randint(256, (channels, 5, 4), dtype=torch.uint8)
    save_png(image, tmp_path / "new" / "image.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "image.png")).reshape(5, 4, channels)
    assert np.array_equal(pixels, image.permute(1, 2, 0).numpy())


def test_small_images_are_enlarged() -> None:
    assert [enlargement(size) for size in (8, 28, 64, 200)] == [8, 2, 1, 1]
