"""Images of one's own: folders of images, parquet files, and any dataset of torchvision or `datasets`.

Images may have any size: their central square is resized to `native_size`. Where there is no test split, one is drawn
from the training images.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from datamodules.base import HOLD_OUT_SEED, ImageDataModule
from datamodules.errors import DatasetError, DatasetNotFoundError
from datamodules.files import list_files
from datamodules.images import center_crop, resize
from datamodules.sources import Reader, Record, Source, find_image_folder, stat_identity
from datamodules.tables import Columns, Table, find_parquet, read_tables

SUITE_NAMES = frozenset({"mnist", "fmnist", "kmnist", "letters", "cifar10", "celeba", "digits"})
"""Names of the suite's datasets, which other data must not have."""


class OwnImages(ImageDataModule):
    """Base of the data modules for any images.

    Args:
        image_size: Side length in pixels of the images the model sees.
        name: Name in records and files, such as `flowers`; null uses the name of the folder or the dataset.
        channels: 1 for grey, 3 for colour.
        native_size: Side length in pixels at which images are compared; null uses `image_size`. If it is smaller, the
            model sees the images padded with zeros.
        test_fraction: Share of the training images that become the test split where the source has none.
        kwargs: Further options of `ImageDataModule`.

    Raises:
        ValueError: If the name is one of the suite's datasets, or a value is out of range.
    """

    def __init__(
        self,
        *,
        image_size: int,
        name: str | None = None,
        channels: Literal[1, 3] = 3,
        native_size: int | None = None,
        test_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.name = (
            name if name is not None else re.sub(r"[^a-z0-9]+", "-", self._default_name(kwargs).lower()).strip("-")
        )
        if self.name in SUITE_NAMES or not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,40}", self.name):
            raise ValueError(
                f"name={self.name!r} is the suite's own dataset, or not a name of up to 41 lower-case letters, digits, "
                "'_' and '-'; give another --data.name"
            )
        if native_size is not None and native_size < 1:
            raise ValueError(f"native_size={native_size} is too small; give --data.native_size 1 or more")
        if channels not in (1, 3):
            raise ValueError(f"channels={channels} is unknown; give 1 for grey or 3 for colour")
        if not 0 < test_fraction <= 0.5:
            raise ValueError(
                f"test_fraction={test_fraction} is out of range; give --data.test_fraction 0.5 or less, above 0"
            )
        self.title = self.name
        self.num_channels = channels
        self.native_size = image_size if native_size is None else native_size
        self.test_fraction = test_fraction
        super().__init__(image_size=image_size, revision=None, **kwargs)

    @property
    def geometry(self) -> dict[str, Any]:
        """Settings that the compared pixels depend on, in addition to the source."""
        return super().geometry | {"channels": self.num_channels}

    def setup(self, stage: str | None = None) -> None:
        """Opens the images and sets the number of classes to the largest label plus one."""
        super().setup(stage)
        if stage in (None, "fit", "validate"):
            self.num_classes = 1 + int(max(self._entry.labels(split).max() for split in self._entry.splits)) or None

    def check_size(self, image: Image.Image, where: str) -> None:
        """Accepts every size; Pillow refuses images that are too large to decode."""

    def fit_image(self, image: Image.Image) -> Image.Image:
        """Resizes the central square."""
        return resize(center_crop(image, min(image.size)), self.compared_size)

    def _default_name(self, options: Mapping[str, Any]) -> str:
        root = Path(str(options.get("root", ""))).expanduser().resolve()
        return root.stem if root.suffix == ".parquet" else root.name

    def _with_test_split(self, source: Source) -> Source:
        """Draws a test split from the training images if the source has none."""
        if "test" in source.splits:
            return source

        def opened() -> Mapping[str, Reader]:
            splits = dict(source.open())
            train = splits.pop("train")
            parts = {split: partial(_part, train, self.test_fraction, split == "test") for split in ("train", "test")}
            return parts | splits

        return replace(
            source,
            description=f"{source.description}, test split drawn: {self.test_fraction:.3g} of the images",
            identity=f"{source.identity}\ntest_fraction {self.test_fraction}",
            open=opened,
        )


class ImageFolder(OwnImages):
    """Images in a folder, in `train/` and `test/` or without splits; the folders in these are the classes.

    Args:
        root: Folder of the images.
        kwargs: Further options of `OwnImages`.
    """

    def __init__(self, root: str, **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)

    def find_source(self) -> Source:
        """Finds the images.

        Raises:
            DatasetNotFoundError: If there are none.
        """
        root = _folder(self.root)
        source = find_image_folder(root, whole=True)
        if source is None:
            raise DatasetNotFoundError(f"--data.root {self.root} holds no images that Pillow can read")
        return self._with_test_split(source)


class Parquet(OwnImages):
    """Images in parquet files, named by their split (`train-00000-of-00002.parquet`) or without splits.

    Args:
        root: Folder of the files, or a single file.
        image_column: Column of the images; null finds it by its name (image, img) or type.
        label_column: Column of the labels; null finds it by its name (label, labels, fine_label, class, target,
            category) or type.
        kwargs: Further options of `OwnImages`.
    """

    def __init__(
        self, root: str, *, image_column: str | None = None, label_column: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(root=root, **kwargs)
        self.columns = Columns(image_column, label_column)

    def find_source(self) -> Source:
        """Finds the files.

        Raises:
            DatasetNotFoundError: If there are none.
        """
        root = Path(str(self.root)).expanduser()
        source = find_parquet(root if root.is_file() else _folder(self.root), self.columns, whole=True)
        if source is None:
            raise DatasetNotFoundError(f"--data.root {self.root} holds no parquet files")
        columns = f"\ncolumns {self.columns.image} {self.columns.label}"
        return self._with_test_split(replace(source, identity=source.identity + columns))


class FromDataset(OwnImages):
    """Images of any dataset of torchvision, `datasets` or one's own package, by the path of its class or function.

    Args:
        dataset: Path of a class or a function, such as `torchvision.datasets.SVHN` or `datasets.load_dataset`. It
            returns pairs of image and label, images, or a table of `datasets`.
        train: Its arguments for the training split, such as `{root: D, split: train}`.
        test: Its arguments for the test split; null draws one from the training images.
        image_column: Column of the images of a table; null finds it.
        label_column: Column of the labels of a table; null finds it.
        kwargs: Further options of `OwnImages`.
    """

    def __init__(
        self,
        dataset: str,
        train: dict[str, Any],
        test: dict[str, Any] | None = None,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.dataset = dataset
        self.arguments = {"train": train} | ({} if test is None else {"test": test})
        self.columns = Columns(image_column, label_column)
        super().__init__(root=None, **kwargs)

    def _default_name(self, options: Mapping[str, Any]) -> str:
        return self.dataset.rpartition(".")[2]

    def find_source(self) -> Source:
        """Returns the dataset as a source; its code, its arguments and the files that they name identify it."""
        arguments = json.dumps(self.arguments, sort_keys=True, default=str)
        files = stat_identity(_named_files(self.arguments))
        import_path(self.dataset)
        code, columns = _code_sha256(self.dataset.partition(".")[0]), f"{self.columns.image} {self.columns.label}"
        identity = f"{self.dataset} {code} {arguments} {columns}\n{files}"
        source = Source(f"{self.dataset} {arguments}", identity, self._open, splits=tuple(self.arguments))
        return self._with_test_split(source)

    def _open(self) -> Mapping[str, Reader]:
        readers: dict[str, Reader] = {}
        for split, arguments in self.arguments.items():
            opened = _construct(self.dataset, arguments)
            where = f"{self.dataset}, {split} split"
            if isinstance(opened, dict):
                raise DatasetError(
                    f"{where} is a dictionary of splits ({', '.join(opened)}); name one in its arguments, such as "
                    f"--data.{split}.split {next(iter(opened), 'train')}"
                )
            if hasattr(opened, "column_names"):
                readers |= read_tables({split: [Table(partial(_itself, opened), where)]}, self.columns)
            else:
                readers[split] = partial(_read_dataset, opened, where)
        return readers


def _code_sha256(package: str) -> str:
    """Returns the hash of all source files of an imported package or module, since a dataset may use any of them."""
    module = sys.modules[package]
    folders = [Path(folder) for folder in getattr(module, "__path__", [])]
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    if not folders and module.__file__:
        files = [Path(module.__file__)]
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()


def import_path(path: str) -> Any:
    """Returns the class or function of a dotted path.

    Raises:
        ValueError: If it cannot be imported; the message says how to make a package of one's own known.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path!r} cannot be imported ({error}); give the path of a class, such as mypackage.data.Shapes. Your own "
            "package is found from the folder that contains it, through PYTHONPATH, or after `pip install -e FOLDER`"
        ) from error


def _folder(root: str | None) -> Path:
    folder = Path(str(root)).expanduser()
    if not folder.is_dir():
        raise DatasetNotFoundError(f"--data.root {root} is not a folder")
    return folder


def _part(reader: Reader, fraction: float, is_test: bool) -> Iterator[Record]:
    """Yields the records that were drawn for testing, or the others.

    One image is drawn at a fixed random position in each stretch of `1 / fraction` images, so that sorted classes are
    represented evenly and classes in turn are not.
    """
    random = np.random.default_rng(HOLD_OUT_SEED)
    positions = (int((stretch + random.random()) / fraction) for stretch in count())
    position = next(positions)
    for index, record in enumerate(reader()):
        drawn = index == position
        while position <= index:
            position = next(positions)
        if drawn == is_test:
            yield record


def _construct(path: str, arguments: Mapping[str, Any]) -> Any:
    make = import_path(path)
    try:
        return make(**arguments)
    except Exception as error:  # foreign code raises anything
        raise DatasetNotFoundError(
            f"{path}({', '.join(f'{key}={value!r}' for key, value in arguments.items())}) failed: "
            f"{type(error).__name__}: {error}"
        ) from error


def _named_files(arguments: Any) -> list[Path]:
    """Returns the files that arguments name, and those in the folders that they name."""
    if isinstance(arguments, Mapping):
        return [file for value in arguments.values() for file in _named_files(value)]
    if isinstance(arguments, list | tuple):
        return [file for value in arguments for file in _named_files(value)]
    if not isinstance(arguments, str | Path) or not str(arguments):
        return []
    path = Path(arguments).expanduser()
    try:
        return list_files(path)[0] if path.is_dir() else [path] if path.is_file() else []
    except OSError:  # cannot be a file name
        return []


def _read_dataset(dataset: Any, where: str) -> Iterator[Record]:
    items: Iterable[Any] = (dataset[index] for index in range(len(dataset))) if hasattr(dataset, "__len__") else dataset
    for index, item in enumerate(items):
        here = f"{where}, item {index},"
        image, label = (item[0], item[1]) if isinstance(item, tuple | list) and len(item) > 1 else (item, None)
        yield Record(_image(image, here), _number(label), here)


def _image(value: Any, where: str) -> Image.Image:
    """Returns an image of Pillow, or bytes `(H, W)`, `(H, W, C)`, or as a tensor `(C, H, W)`, as an image."""
    if isinstance(value, torch.Tensor):
        value = (value.movedim(0, -1) if value.ndim == 3 else value).numpy()
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        return Image.fromarray(value.squeeze(-1) if value.ndim == 3 and value.shape[-1] == 1 else value)
    if not isinstance(value, Image.Image):
        kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise DatasetError(f"{where} is {kind}, expected an image of Pillow or bytes (uint8); leave out its transform")
    return value


def _number(label: Any) -> int:
    """Returns a label that is one number, or else -1."""
    try:
        return int(label)
    except (TypeError, ValueError, RuntimeError):
        return -1


def _itself(value: Any) -> Any:
    return value
