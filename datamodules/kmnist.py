"""Kuzushiji-MNIST: 60,000 and 10,000 cursive Japanese characters, 28x28 grey.

Clanuwat et al., "Deep learning for classical Japanese literature", arXiv 1812.01718 (2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from datamodules.arrays import find_npz
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
    class_names = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    sizes: ClassVar[Mapping[str, int]] = {"train": 60_000, "test": 10_000}
    hub_id = "tanganke/kmnist"
    original_layout = (
        "IDX files as torchvision keeps them (KMNIST/raw/train-images-idx3-ubyte, plain or .gz), or the NumPy files as "
        "first published (kmnist-train-imgs.npz)"
    )

    def find_original(self, root: Path) -> Source | None:
        """Finds IDX or NumPy files."""
        return find_idx(root, "KMNIST") or find_npz(root, "kmnist")
