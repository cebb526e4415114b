"""MNIST: 60,000 and 10,000 handwritten digits, 28x28 grey.

LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", Proc. IEEE 86 (1998).
"""

from __future__ import annotations

from pathlib import Path

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
    hub_id = "ylecun/mnist"
    original_layout = "IDX files as torchvision keeps them (MNIST/raw/train-images-idx3-ubyte, plain or .gz)"

    def _find_original(self, root: Path) -> Source | None:
        return find_idx(root, "MNIST")
