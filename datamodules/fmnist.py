"""FashionMNIST: 60,000 and 10,000 images of clothing, 28x28 grey.

Xiao, Rasul and Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms",
arXiv 1708.07747 (2017).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from datamodules.arrays import find_csv
from datamodules.base import ImageDataModule
from datamodules.idx import find_idx
from datamodules.sources import Source


class FMNIST(ImageDataModule):
    """FashionMNIST; see `ImageDataModule`."""

    name = "fmnist"
    title = "FashionMNIST"
    num_channels = 1
    native_size = 28
    num_classes = 10
    class_names = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    sizes: ClassVar[Mapping[str, int]] = {"train": 60_000, "test": 10_000}
    hub_id = "zalando-datasets/fashion_mnist"
    original_layout = (
        "IDX files as torchvision (FashionMNIST/raw/train-images-idx3-ubyte) or Debian's dataset-fashion-mnist "
        "(all .gz in one folder) keep them, or Kaggle's CSV files (fashion-mnist_train.csv and fashion-mnist_test.csv)"
    )

    def find_original(self, root: Path) -> Source | None:
        """Finds IDX or CSV files."""
        names = {split: (f"fashion-mnist_{split}.csv",) for split in ("train", "test")}
        return find_idx(root, "FashionMNIST") or find_csv(root, names, self.native_size)
