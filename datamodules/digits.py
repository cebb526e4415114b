"""Digits: 1,797 handwritten digits, 8x8 grey, that come with scikit-learn; for trials without a download.

Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI Machine Learning Repository (1998).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from datamodules.base import ImageDataModule
from datamodules.sources import Record, Source

TRAIN_IMAGES = 1500


class Digits(ImageDataModule):
    """scikit-learn's digits: the first 1,500 for training, the last 297 as test split."""

    name = "digits"
    title = "Digits"
    num_channels = 1
    native_size = 8
    num_classes = 10

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(root=None, revision=None, **kwargs)  # embedded: there is no source to choose

    def prepare_data(self) -> None:
        """Decodes the images into the cache unless they are there; there is no choice of source to report."""
        self._entry  # noqa: B018

    def find_source(self) -> Source:
        """Returns scikit-learn's copy."""
        splits = {"train": slice(None, TRAIN_IMAGES), "test": slice(TRAIN_IMAGES, None)}
        readers = {split: partial(_read, part) for split, part in splits.items()}
        return Source("digits embedded in scikit-learn", "scikit-learn digits", lambda: readers)


def _read(part: slice) -> Iterator[Record]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images[part] * (255 / 16)).astype(np.uint8)  # pixels are 0 to 16
    for index, (image, label) in enumerate(zip(images, digits.target[part], strict=True)):
        yield Record(Image.fromarray(image), int(label), f"digit {index}")
