"""EMNIST Letters: 124,800 and 20,800 handwritten letters in 26 classes, 28x28 grey.

Cohen, Afshar, Tapson and van Schaik, "EMNIST: extending MNIST to handwritten letters", IJCNN 2017, arXiv 1702.05373.
The original files store every image transposed and label the letters from 1; some copies store them upright or label
them from 0. This module always returns upright images and labels from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from datamodules.arrays import find_csv
from datamodules.base import ImageDataModule
from datamodules.errors import DatasetError
from datamodules.idx import find_idx
from datamodules.images import decode
from datamodules.sources import Reader, Record, Source

TALL = tuple(ord(letter) - ord("A") for letter in "IJL")
"""Letters that are taller than wide in either case."""
IMAGES_PER_LETTER = 200
"""Number of images of each letter from which the orientation is determined."""
MIN_SLENDERNESS = 0.1
"""Smallest mean of `log(height / width)` that decides the orientation; it is about 1.1 for I, 0.6 for J and L."""


class Letters(ImageDataModule):
    """EMNIST Letters, upright and labelled from 0 for A.

    Args:
        orientation: How the source stores its images; `auto` determines it from the letters I, J and L, the other
            values are checked against them.
    """

    name = "letters"
    title = "EMNIST Letters"
    num_channels = 1
    native_size = 28
    num_classes = 26
    class_names = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    sizes: ClassVar[Mapping[str, int]] = {"train": 124_800, "test": 20_800}
    hub_id = "tanganke/emnist_letters"
    original_layout = (
        "IDX files as torchvision or EMNIST's archive keep them (EMNIST/raw/emnist-letters-train-images-idx3-ubyte, "
        "plain or .gz), or Kaggle's CSV files (emnist-letters-train.csv and emnist-letters-test.csv)"
    )

    def __init__(self, *, orientation: Literal["auto", "upright", "transposed"] = "auto", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if orientation not in ("auto", "upright", "transposed"):
            raise ValueError(f"orientation={orientation!r} is unknown; choose 'auto', 'upright' or 'transposed'")
        self.orientation = orientation

    @property
    def geometry(self) -> dict[str, Any]:
        """Settings that the compared pixels depend on, in addition to the source."""
        return super().geometry | {"orientation": self.orientation}

    def find_original(self, root: Path) -> Source | None:
        """Finds IDX or CSV files."""
        names = {split: (f"emnist-letters-{split}.csv",) for split in ("train", "test")}
        files = find_idx(root, "EMNIST", train="emnist-letters-train", test="emnist-letters-test")
        return files or find_csv(root, names, self.native_size)

    def canonical(self, train: Reader) -> Callable[[Record], Record]:
        """Returns a function that turns letters upright and labels them from 0, for the conventions of this source."""
        labels, slendernesses = self._survey(train)
        if {0, 26} <= labels:
            raise DatasetError(
                f"{self._source.description} has labels from 0 to 26, expected 0 to 25 or 1 to 26; "
                f"is this {self.title}?"
            )
        if labels - {-1} and not {0, 26} & labels:
            raise DatasetError(
                f"{self._source.description} has training labels from {min(labels - {-1})} to {max(labels)}, so "
                "that it is unknown whether the letter A is 0 or 1; the first and the last letter are missing"
            )
        first_label = 1 if 26 in labels else 0
        values = [value for letter in TALL for value in slendernesses[letter + first_label]]
        slenderness = sum(values) / len(values) if values else 0.0
        transposed = self._is_transposed(slenderness)

        def canonical(record: Record) -> Record:
            label = record.label - first_label if record.label >= first_label else -1
            self.check_size(record.image, record.where)
            image = decode(record.image, "L", record.where)
            return Record(image.transpose(Image.Transpose.TRANSPOSE) if transposed else image, label, record.where)

        return canonical

    def _survey(self, train: Reader) -> tuple[set[int], dict[int, list[float]]]:
        """Returns the set of labels, and the slenderness of the first images of every label that may be I, J or L."""
        labels: set[int] = set()
        seen: dict[int, list[float]] = {letter + first: [] for letter in TALL for first in (0, 1)}
        for record in train():
            labels.add(record.label)
            values = seen.get(record.label)
            if values is not None and len(values) < IMAGES_PER_LETTER:
                self.check_size(record.image, record.where)
                values.append(_slenderness(decode(record.image, "L", record.where)))
        return labels, seen

    def _is_transposed(self, slenderness: float) -> bool:
        if abs(slenderness) < MIN_SLENDERNESS:
            if self.orientation == "auto":
                raise DatasetError(
                    f"cannot tell whether {self._source.description} stores its letters upright: no labels, or no "
                    "clear I, J and L; pass --data.orientation upright or --data.orientation transposed"
                )
            return self.orientation == "transposed"
        found = "upright" if slenderness > 0 else "transposed"
        if self.orientation not in ("auto", found):
            raise DatasetError(
                f"{self._source.description} stores its letters {found}, by the shape of its I, J and L, but "
                f"orientation={self.orientation!r} was given; pass --data.orientation {found} or auto"
            )
        return found == "transposed"


def _slenderness(image: Image.Image) -> float:
    """Returns the logarithm of the ratio of the vertical to the horizontal second moment of the ink."""
    ink = np.asarray(image, dtype=np.float64)
    moments = []
    for profile in (ink.sum(axis=1), ink.sum(axis=0)):
        position = np.arange(len(profile))
        weight = profile / max(profile.sum(), 1.0)
        moments.append(float((weight * (position - (weight * position).sum()) ** 2).sum()))
    vertical, horizontal = moments
    return math.log((vertical + 0.01) / (horizontal + 0.01))  # a blank or one-pixel image has no moment
