"""CelebA in its original layout: partition, crop, and errors in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dataset_layouts import write_celeba
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from datamodules import CelebA, DatasetError


def test_celeba_follows_the_official_partition(tmp_path: Path) -> None:
    root = write_celeba(tmp_path / "celeba")
    data = CelebA(root=str(tmp_path), batch_size=4, flip=False, cache_dir=str(tmp_path / "cache"))
    assert (data.num_reference("train"), data.num_reference("test")) == (30, 8)
    assert sum(map(len, data.val_dataloader())) == 6
    assert data.image_shape == (3, 64, 64)
    first = Compose([CenterCrop(148), Resize(64), PILToTensor()])(Image.open(root / "img_align_celeba" / "000001.jpg"))
    assert torch.equal(next(data.reference_batches())[0], first)  # as the papers' torchvision pipelines do


def test_validation_split_to_compare_with(tmp_path: Path) -> None:
    write_celeba(tmp_path / "celeba")
    data = CelebA(root=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert data.num_reference("valid") == sum(map(len, data.reference_batches("valid"))) == 6


def test_celeba_without_crop(tmp_path: Path) -> None:
    write_celeba(tmp_path, size=(64, 64))
    cache = str(tmp_path / "cache")
    with pytest.raises(
        DatasetError, match=r"jpg has 64x64 pixels, too few to crop center_crop=148; .* pass --data.center_crop null"
    ):
        CelebA(root=str(tmp_path), cache_dir=cache).prepare_data()
    assert next(CelebA(root=str(tmp_path), center_crop=None, cache_dir=cache).reference_batches()).shape[1:] == (
        3,
        64,
        64,
    )


def test_celeba_with_faulty_partition(tmp_path: Path) -> None:
    write_celeba(tmp_path)
    partition = tmp_path / "list_eval_partition.txt"
    lines = partition.read_text()
    partition.write_text(lines + "000099.jpg 2\n")
    with pytest.raises(DatasetError, match=r"lists 1 images .* first .*/000099.jpg"):
        CelebA(root=str(tmp_path), cache_dir=str(tmp_path / "cache")).prepare_data()
    partition.write_text(lines + "000001.jpg 3\n")
    with pytest.raises(DatasetError, match=r"line 45, is '000001.jpg 3'; expected"):
        CelebA(root=str(tmp_path), cache_dir=str(tmp_path / "cache")).prepare_data()
