"""Real images, where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dataset_layouts import write_idx

from datamodules import CIFAR10, FMNIST, KMNIST, MNIST, CelebA, DatasetError, ImageDataModule, Letters

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "folder", "sizes", "mean"),
    [
        (MNIST, "mnist", (60_000, 10_000), 0.1307),
        (FMNIST, "fmnist", (60_000, 10_000), 0.2860),
        (KMNIST, "kmnist", (8_000, 2_000), 0.1843),
        (CIFAR10, "cifar10", (50_000, 10_000), 0.4734),
    ],
)
def test_published_means(
    kind: type[ImageDataModule], folder: str, sizes: tuple[int, int], mean: float, shared_data: Path, real_cache: str
) -> None:
    data = kind(root=str(shared_data / folder), cache_dir=real_cache)
    images, labels = data.labelled("train")
    assert (len(images), data.num_reference("test")) == sizes
    assert images.float().mean().item() / 255 == pytest.approx(mean, abs=1e-4)
    counts = labels.bincount()
    assert len(counts) == 10
    assert counts.min() > 0.9 * sizes[0] / 10


def test_celeba_that_is_cropped_already(shared_data: Path, real_cache: str) -> None:
    root = str(shared_data / "celeba")
    with pytest.raises(DatasetError, match=r"64x64 pixels, too few .* pass --data.center_crop null"):
        CelebA(root=root, cache_dir=real_cache).prepare_data()
    data = CelebA(root=root, center_crop=None, cache_dir=real_cache)
    assert data.num_reference("train") == 8_000
    assert next(data.reference_batches("test")).shape[1:] == (3, 64, 64)


def test_letters_are_put_upright_whatever_their_source(shared_data: Path, real_cache: str, tmp_path: Path) -> None:
    stored = Letters(root=str(shared_data / "letters_az"), cache_dir=real_cache)
    images, labels = stored.labelled("train")
    transposed = {
        split: (stored.labelled(split)[0][:, 0].mT.numpy(), (stored.labelled(split)[1] + 1).tolist())
        for split in ("train", "test")
    }
    names = {"train": "emnist-letters-train", "test": "emnist-letters-test"}
    emnist = Letters(root=str(write_idx(tmp_path / "EMNIST" / "raw", transposed, **names)), cache_dir=real_cache)
    assert emnist.fingerprint == stored.fingerprint
    assert torch.equal(emnist.labelled("train")[0], images)
    assert torch.equal(emnist.labelled("train")[1], labels)
    ink = images[labels == 8, 0].float().mean(0)  # of the letter I
    place = torch.arange(28) - 13.5
    assert (ink.sum(1) * place**2).sum() > 2 * (ink.sum(0) * place**2).sum()  # taller than wide
    with pytest.raises(DatasetError, match=r"transposed, by the shape .* pass --data.orientation transposed or auto"):
        Letters(root=str(tmp_path), orientation="upright", cache_dir=real_cache).prepare_data()
