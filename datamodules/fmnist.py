"""FashionMNIST: 60,000 and 10,000 images of clothing, 28x28 grey.

Xiao, Rasul and Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms",
arXiv 1708.07747 (2017).
"""

from __future__ import annotations

from pathlib import Path

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
    hub_id = "zalando-datasets/fashion_mnist"
    original_layout = (
        "IDX files as torchvision (FashionMNIST/raw/train-images-idx3-ubyte) or Debian's dataset-fashion-mnist "
        "(all .gz in one folder) keep them"
    )

    def _find_original(self, root: Path) -> Source | None:
        return find_idx(root, "FashionMNIST")
