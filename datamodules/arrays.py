"""Arrays of the MNIST family in NumPy files, as KMNIST and Keras publish them, and in CSV files, as Kaggle does."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.errors import DatasetError
from datamodules.files import list_files, named
from datamodules.idx import MAX_BYTES
from datamodules.sources import Reader, Record, Source, one_folder, stat_identity
from datamodules.tables import LABEL_COLUMNS

KERAS = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")}
"""Names of the arrays in Keras' file, which has no other ones."""


def find_npz(root: Path, name: str) -> Source | None:
    """Finds `<name>-train-imgs.npz`, `-train-labels`, `-test-imgs` and `-test-labels`, or Keras' `<name>.npz`.

    Raises:
        DatasetError: If only some of the files are there, or they lie in several folders.
    """
    pairs = {split: (f"{name}-{split}-imgs.npz", f"{name}-{split}-labels.npz") for split in ("train", "test")}
    wanted = [file for pair in pairs.values() for file in pair]
    found, _ = list_files(root)
    files = [file for file in found if file.name in wanted] or [file for file in found if file.name == f"{name}.npz"]
    if not files:
        return None
    one_folder(root, f"{name} in NumPy files", files)
    folder, there = files[0].parent, {file.name for file in files}
    if there == {f"{name}.npz"}:
        pairs_of_arrays = {split: ((files[0], x), (files[0], y)) for split, (x, y) in KERAS.items()}
    elif missing := [file for file in wanted if file not in there]:
        raise DatasetError(f"{folder} lacks {', '.join(missing)}; all four files are needed")
    else:
        pairs_of_arrays = {split: ((folder / x, "arr_0"), (folder / y, "arr_0")) for split, (x, y) in pairs.items()}
    readers: dict[str, Reader] = {split: partial(_read_npz, *pair) for split, pair in pairs_of_arrays.items()}
    return Source(f"NumPy files in {folder}", stat_identity(files), lambda: readers, len(files))


def find_csv(root: Path, names: Mapping[str, Sequence[str]], size: int) -> Source | None:
    """Finds CSV files of one image a row: its label, if there is one, and its pixels.

    Args:
        root: Folder to search.
        names: Names that the file of each split may have; a name without that of the dataset, such as `train.csv`,
            needs a header with `pixel` in it.
        size: Side length of the images in pixels.

    Raises:
        DatasetError: If a split is missing or there twice.
    """
    found, _ = list_files(root)
    files: dict[str, Path] = {}
    for split, known in names.items():
        paths = [file for file in found if file.name in known and (file.name != f"{split}.csv" or _has_pixels(file))]
        if len(paths) > 1:
            raise DatasetError(
                f"--data.root {root} holds several CSV files of the {split} split: {named(paths)}; keep one"
            )
        if paths:
            files[split] = paths[0]
    if not files:
        return None
    if missing := [known[0] for split, known in names.items() if split not in files]:
        raise DatasetError(f"{next(iter(files.values())).parent} lacks {', '.join(missing)}; both CSV files are needed")
    one_folder(root, "CSV files", files.values())
    readers: dict[str, Reader] = {split: partial(_read_csv, file, size) for split, file in files.items()}
    return Source(f"CSV files {named(files.values())}", stat_identity(files.values()), lambda: readers, len(files))


def _read_npz(images: tuple[Path, str], labels: tuple[Path, str]) -> Iterator[Record]:
    pixels, numbers = _load_array(*images), _load_array(*labels)
    if (
        pixels.dtype != np.uint8
        or pixels.ndim != 3
        or numbers.ndim != 1
        or not np.issubdtype(numbers.dtype, np.integer)
    ):
        raise DatasetError(
            f"{images[0]} holds {pixels.dtype} of shape {pixels.shape} with labels {numbers.dtype} of shape "
            f"{numbers.shape}; expected uint8 of 3 axes and one number for each image"
        )
    if len(pixels) != len(numbers):
        raise DatasetError(f"{images[0]} holds {len(pixels)} images, but {labels[0]} {len(numbers)} labels")
    for index, (image, label) in enumerate(zip(pixels, numbers, strict=True)):
        yield Record(Image.fromarray(image), int(label), f"{images[0]}, image {index},")


def _load_array(file: Path, name: str) -> NDArray[Any]:
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_BYTES:
            raise DatasetError(f"{file} holds more than {MAX_BYTES:,} bytes, as no dataset of this family does")
        with np.load(file, allow_pickle=False) as arrays:
            if name not in arrays:
                raise DatasetError(f"{file} holds the arrays {', '.join(arrays)}, expected {name}")
            return arrays[name]
    except DatasetError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{file} is damaged ({error}); fetch it again") from error


def _first_row(file: Path) -> list[str]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            return next(csv.reader(opened), [])
    except (OSError, ValueError, csv.Error) as error:
        raise DatasetError(f"{file} is not a CSV file ({error}); fetch it again") from error


def _has_pixels(file: Path) -> bool:
    return any("pixel" in field for field in _first_row(file))


def _read_csv(file: Path, size: int) -> Iterator[Record]:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    first = _first_row(file)
    has_header = not all(field.strip().isdecimal() for field in first)
    names = [f"{index} {field}" for index, field in enumerate(first)]
    columns = {field.strip().lower(): name for field, name in zip(first, names, strict=True)}
    label = next((columns[name] for name in LABEL_COLUMNS if name in columns), None) if has_header else names[0]
    if not has_header and len(names) == size**2:
        label = None
    pixels = [name for name in names if name != label]
    if len(pixels) != size**2:
        raise DatasetError(
            f"{file} has {len(names)} columns, expected {size**2} pixels of {size}x{size}, and maybe a label"
        )
    try:
        table = arrow_csv.read_csv(
            file,
            arrow_csv.ReadOptions(column_names=names, skip_rows=int(has_header)),
            convert_options=arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.int16())),
        )
        values = np.stack([table[name].to_numpy() for name in pixels], axis=1)
        labels = [-1] * len(values) if label is None else table[label].to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DatasetError(f"{file} is not a table of whole numbers ({error}); fetch it again") from error
    if values.dtype != np.int16 or (len(values) and (values.min() < 0 or values.max() > 255)):
        raise DatasetError(f"{file} holds pixels that are not from 0 to 255; is this the right file?")
    for index, (image, number) in enumerate(zip(values.astype(np.uint8), labels, strict=True)):
        where = f"{file}, row {index},"
        yield Record(Image.fromarray(image.reshape(size, size)), -1 if number is None else number, where)
