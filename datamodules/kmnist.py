"""Kuzushiji-MNIST: 60,000 and 10,000 cursive Japanese characters, 28x28 grey.

Clanuwat et al., "Deep learning for classical Japanese literature", arXiv 1812.01718 (2018).
"""

from __future__ import annotations

from pathlib import Path

from datamodules.base import ImageDataModule
from datamodules.idx import find_idx
from datamodules.sources import Source


class KMNIST(ImageDataModule):
    """KMNIST; see `ImageDataModule`."""

    name = "kmnist"
    title = "KMNIST"
    num_channels = 1
    native_size = 28
    num_classes = 10
    hub_id = "tanganke/kmnist"
    original_layout = "IDX files as torchvision keeps them (KMNIST/raw/train-images-idx3-ubyte, plain or .gz)"

    def _find_original(self, root: Path) -> Source | None:
        return find_idx(root, "KMNIST")
