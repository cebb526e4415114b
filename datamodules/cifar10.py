"""CIFAR-10: 50,000 and 10,000 colour photographs in ten classes, 32x32.

Krizhevsky, "Learning multiple layers of features from tiny images", technical report, University of Toronto (2009).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.base import ImageDataModule
from datamodules.errors import DatasetError
from datamodules.sources import Reader, Record, Source, one_folder, stat_identity

BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
PICKLED_GLOBALS = {
    (module, name)
    for module, name in (
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
    )
}
"""The only names that unpickling an array needs."""


class CIFAR10(ImageDataModule):
    """CIFAR-10: training images are mirrored at random unless `flip` is false."""

    name = "cifar10"
    title = "CIFAR-10"
    num_channels = 3
    native_size = 32
    num_classes = 10
    hub_id = "uoft-cs/cifar10"
    original_layout = "the python batches (cifar-10-batches-py/data_batch_1)"

    def __init__(self, *, flip: bool = True, **kwargs: Any) -> None:
        super().__init__(flip=flip, **kwargs)

    def _find_original(self, root: Path) -> Source | None:
        found = sorted(root.rglob("data_batch_1"))
        if not found:
            return None
        one_folder(root, "python batches", found)
        files = {split: [found[0].with_name(name) for name in names] for split, names in BATCHES.items()}
        everything = [file for paths in files.values() for file in paths]
        if missing := [file.name for file in everything if not file.is_file()]:
            raise DatasetError(f"{found[0].parent} lacks {', '.join(missing)}; all six batches are needed")
        readers: dict[str, Reader] = {split: partial(_read_batches, paths) for split, paths in files.items()}
        return Source(f"python batches in {found[0].parent}", stat_identity(everything), lambda: readers)


def _read_batches(files: list[Path]) -> Iterator[Record]:
    for file in files:
        images, labels = _read_batch(file)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield Record(Image.fromarray(image), int(label), f"{file}, image {index},")


def _read_batch(file: Path) -> tuple[NDArray[np.uint8], list[int]]:
    """Reads one batch: images `(N, 32, 32, 3)` and their labels."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(file.read_bytes()), encoding="bytes").load()
        data, labels = batch[b"data"], batch[b"labels"]
        images = data.reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1)
        if images.dtype != np.uint8:
            raise DatasetError(f"{file} holds {images.dtype}, expected uint8; is this CIFAR-10?")
    except DatasetError:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        raise DatasetError(
            f"{file} is not a CIFAR-10 batch ({type(error).__name__}: {error}); fetch it again"
        ) from error
    return np.ascontiguousarray(images), labels


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles only arrays, numbers and containers, so that no code can run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PICKLED_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, refused since only arrays are expected")
        return super().find_class(module, name)
