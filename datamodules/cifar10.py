"""CIFAR-10: 50,000 and 10,000 colour photographs in ten classes, 32x32.

Krizhevsky, "Learning multiple layers of features from tiny images", technical report, University of Toronto (2009).
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.base import ImageDataModule
from datamodules.errors import DatasetError
from datamodules.files import list_files
from datamodules.sources import Reader, Record, Source, one_folder, stat_identity

ARCHIVE = "cifar-10-python.tar.gz"
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
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    sizes: ClassVar[Mapping[str, int]] = {"train": 50_000, "test": 10_000}
    hub_id = "uoft-cs/cifar10"
    original_layout = f"the python batches (cifar-10-batches-py/data_batch_1, or {ARCHIVE} as it was fetched)"

    def __init__(self, *, flip: bool = True, **kwargs: Any) -> None:
        super().__init__(flip=flip, **kwargs)

    def find_original(self, root: Path) -> Source | None:
        """Finds the python batches, in a folder or in the archive."""
        listed, _ = list_files(root)
        found = [file for file in listed if file.name == "data_batch_1"]
        if not found:
            return self._find_archive(root, [file for file in listed if file.name == ARCHIVE])
        one_folder(root, "python batches", found)
        files = {split: [found[0].with_name(name) for name in names] for split, names in BATCHES.items()}
        everything = [file for paths in files.values() for file in paths]
        if missing := [file.name for file in everything if not file.is_file()]:
            raise DatasetError(f"{found[0].parent} lacks {', '.join(missing)}; all six batches are needed")
        readers: dict[str, Reader] = {split: partial(_read_files, paths) for split, paths in files.items()}
        return Source(
            f"python batches in {found[0].parent}", stat_identity(everything), lambda: readers, len(everything)
        )

    def _find_archive(self, root: Path, files: list[Path]) -> Source | None:
        if not files:
            return None
        one_folder(root, ARCHIVE, files)
        readers: dict[str, Reader] = {
            split: partial(_read_archive, files[0], names) for split, names in BATCHES.items()
        }
        return Source(f"python batches in {files[0]}", stat_identity(files), lambda: readers, 1)


def _read_files(files: list[Path]) -> Iterator[Record]:
    for file in files:
        yield from _read_batch(file.read_bytes(), str(file))


def _read_archive(archive: Path, names: tuple[str, ...]) -> Iterator[Record]:
    batches: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                name = Path(member.name).name
                if name in names and (content := opened.extractfile(member)):
                    batches[name] = content.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{archive} is damaged ({error}); fetch it again") from error
    if missing := [name for name in names if name not in batches]:
        raise DatasetError(f"{archive} lacks {', '.join(missing)}; all six batches are needed")
    for name in names:
        yield from _read_batch(batches[name], f"{archive}, {name}")


def _read_batch(content: bytes, where: str) -> Iterator[Record]:
    images, labels = _load_batch(content, where)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield Record(Image.fromarray(image), int(label), f"{where}, image {index},")


def _load_batch(content: bytes, where: str) -> tuple[NDArray[np.uint8], list[int]]:
    """Reads one batch: images `(N, 32, 32, 3)` and their labels."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        data, labels = batch[b"data"], batch[b"labels"]
        images = data.reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1)
        if images.dtype != np.uint8:
            raise DatasetError(f"{where} holds {images.dtype}, expected uint8; is this CIFAR-10?")
    except DatasetError:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        raise DatasetError(
            f"{where} is not a CIFAR-10 batch ({type(error).__name__}: {error}); fetch it again"
        ) from error
    return np.ascontiguousarray(images), labels


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles only arrays, numbers and containers, so that no code can run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PICKLED_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, refused since only arrays are expected")
        return super().find_class(module, name)
