"""IDX files, the format of MNIST and its successors, as torchvision and Debian lay them out."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.errors import DatasetError
from datamodules.files import list_files
from datamodules.sources import Reader, Record, Source, one_folder, stat_identity

TORCHVISION_FOLDERS = frozenset({"MNIST", "FashionMNIST", "KMNIST", "EMNIST"})
"""Folders in which torchvision stores these datasets, with the same file names in each."""

MAX_BYTES = 2**30
"""Nearly twice the largest file of these datasets (EMNIST ByClass); a gzip file of 1 MB may unpack to more."""


def find_idx(root: Path, folder: str, train: str = "train", test: str = "t10k") -> Source | None:
    """Finds the four IDX files of a dataset, plain or gzipped, in `root` or below.

    Args:
        root: Folder to search; torchvision's folders of other datasets are skipped.
        folder: torchvision's folder of this dataset.
        train: Prefix of the training files.
        test: Prefix of the test files.

    Raises:
        DatasetError: If only some of the four files are there, or there are several of one.
    """
    others = TORCHVISION_FOLDERS - {folder}
    listed = [file for file in list_files(root)[0] if not others & set(file.relative_to(root).parts)]

    def find(name: str) -> Path | None:
        spellings = {name, name.replace("-idx", ".idx")}  # the dot as in some copies of the original files
        matches = [file for file in listed if file.name.removesuffix(".gz") in spellings]
        matches.sort(key=lambda file: file.suffix == ".gz")  # plain files first
        one_folder(root, name, {_outside_gzip(file) for file in matches})
        return matches[0] if matches else None

    names = {
        split: (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
        for split, prefix in {"train": train, "test": test}.items()
    }
    found = {name: find(name) for pair in names.values() for name in pair}
    files = {name: file for name, file in found.items() if file is not None}
    if not files:
        return None
    folder_found = next(iter(files.values())).parent
    if missing := [name for name in found if name not in files]:
        raise DatasetError(f"{folder_found} lacks {', '.join(missing)} (plain or .gz); all four files are needed")
    readers: dict[str, Reader] = {
        split: partial(_read_idx_pair, files[images], files[labels]) for split, (images, labels) in names.items()
    }
    return Source(f"IDX files in {folder_found}", stat_identity(files.values()), lambda: readers, len(files))


def _outside_gzip(file: Path) -> Path:
    """Leaves out the folder `gzip` of EMNIST's archive, from which torchvision unpacks files into the folder above."""
    return file.parent.with_name(file.name) if file.parent.name == "gzip" else file


def _read_idx_pair(images_file: Path, labels_file: Path) -> Iterator[Record]:
    images, labels = _read_idx(images_file, axes=3), _read_idx(labels_file, axes=1)
    if len(images) != len(labels):
        raise DatasetError(f"{images_file} holds {len(images)} images, but {labels_file} {len(labels)} labels")
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield Record(Image.fromarray(image), int(label), f"{images_file}, image {index},")


def _read_idx(file: Path, axes: int) -> NDArray[np.uint8]:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise DatasetError(f"{file} is damaged ({error}); fetch it again") from error
    if len(data) < 4 + 4 * axes or data[:4] != bytes((0, 0, 8, axes)):
        raise DatasetError(
            f"{file} begins with {data[:4].hex()}, expected 000008{axes:02x}: not an IDX file of {axes} axes"
        )
    if len(data) > MAX_BYTES:
        raise DatasetError(f"{file} holds more than {MAX_BYTES:,} bytes, as no dataset of this family does")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", axes, offset=4))
    pixels = np.frombuffer(data, np.uint8, offset=4 + 4 * axes)
    if pixels.size != np.prod(shape, dtype=np.int64):
        raise DatasetError(
            f"{file} announces {' x '.join(map(str, shape))} bytes but holds {pixels.size}; fetch it again"
        )
    return pixels.reshape(shape)
