"""MNIST: 60,000 and 10,000 handwritten digits, 28x28 grey.

LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", Proc. IEEE 86 (1998).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from datamodules.arrays import find_csv, find_npz
from datamodules.base import ImageDataModule
from datamodules.idx import find_idx
from datamodules.sources import Source


class MNIST(ImageDataModule):
    """MNIST; see `ImageDataModule`."""

    name = "mnist"
    title = "MNIST"
    num_channels = 1
    native_size = 28
    num_classes = 10
    class_names = tuple("0123456789")
    sizes: ClassVar[Mapping[str, int]] = {"train": 60_000, "test": 10_000}
    hub_id = "ylecun/mnist"
    original_layout = (
        "IDX files as torchvision keeps them (MNIST/raw/train-images-idx3-ubyte, plain or .gz), Keras' mnist.npz, or "
        "Kaggle's CSV files (mnist_train.csv and mnist_test.csv, or train.csv and test.csv)"
    )

    def find_original(self, root: Path) -> Source | None:
        """Finds IDX, NumPy or CSV files."""
        names = {"train": ("mnist_train.csv", "train.csv"), "test": ("mnist_test.csv", "test.csv")}
        return find_idx(root, "MNIST") or find_npz(root, "mnist") or find_csv(root, names, self.native_size)
