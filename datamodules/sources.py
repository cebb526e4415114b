"""Sources of images: the interface of all formats, and folders of image files.

A `Source` is found without being read: its `identity` is part of the cache key, and images are read only when the
readers of its splits are iterated. `tables.py` reads parquet files, saved datasets and the hub; `idx.py`, `arrays.py`,
`cifar10.py` and `celeba.py` read original files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from datamodules.errors import DatasetError
from datamodules.files import class_labels, counted, left_out, list_files, split_of
from datamodules.images import open_image

STUBS = frozenset({"BUFR", "GRIB", "HDF5", "MPEG"})
"""Formats that Pillow recognises but cannot decode."""


class Record(NamedTuple):
    """One image, possibly not decoded yet, its label (-1: unknown), and its location for error messages."""

    image: Image.Image
    label: int
    where: str


Reader = Callable[[], Iterator[Record]]


@dataclass(frozen=True)
class Source:
    """A dataset that can be read.

    Args:
        description: Where it is, in words; part of every record.
        identity: Changes with the content; part of the cache key.
        open: Returns the readers of its splits: `train`, usually `test`, maybe `valid`.
        files: Number of files that are read; 0 if unknown.
        left_out: What is there but not read, in words.
        splits: Names of its splits, as far as they are known before it is opened.
    """

    description: str
    identity: str
    open: Callable[[], Mapping[str, Reader]]
    files: int = 0
    left_out: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()


def stat_identity(files: Iterable[Path]) -> str:
    """Identifies files by path, size and modification time."""
    stats = ((file.resolve(), file.stat()) for file in files)
    return "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)


@cache
def image_suffixes() -> frozenset[str]:
    """Returns the suffixes of all formats that Pillow can decode, in lower case."""
    formats = Image.registered_extensions()
    return frozenset(suffix for suffix, name in formats.items() if name in Image.OPEN and name not in STUBS)


def is_image(file: Path) -> bool:
    """Whether Pillow can decode files of this suffix."""
    return file.suffix.lower() in image_suffixes()


def find_image_folder(root: Path, class_names: Sequence[str] = (), whole: bool = False) -> Source | None:
    """Finds image files below a training and a test folder; the folders in these are the classes.

    Args:
        root: Folder that contains `train` and `test` (or `training`, `testing`; `val`, `valid` or `validation`), or
            a single folder that does.
        class_names: The dataset's own classes in the order of their labels.
        whole: Whether the test split may be missing, and all images are training images where there are no splits.

    Raises:
        DatasetError: If a split is missing or there twice, or a folder is not one of the classes.
    """
    found, notes = list_files(root)
    files = [file for file in found if is_image(file)]
    if not files:
        return None
    top, groups = _only_folder(root, found)
    folders: dict[str, list[str]] = {}
    for name in sorted(groups):
        if (split := split_of(name)) and any(map(is_image, groups[name])):
            folders.setdefault(split, []).append(name)
    if not folders and not whole:
        return None
    for split, names in folders.items():
        if len(names) > 1:
            raise DatasetError(f"{top} holds the {split} split several times: {', '.join(names)}; keep one folder")
    if folders:
        bases = {split: top / name for split, (name,) in folders.items()}
        splits = {split: list(filter(is_image, groups[base.name])) for split, base in bases.items()}
    else:
        has_classes = top == root or any(len(file.parts) > len(top.parts) + 1 for file in files)
        bases, splits = {"train": top if has_classes else top.parent}, {"train": files}
    require_splits(splits, f"the image folder {top}", ("train",) if whole else ("train", "test"))
    classes = {_class(file, bases[split]) for split, paths in splits.items() for file in paths}
    what = f"the class folders below {top}"
    labels = class_labels((name for name in classes if name is not None), class_names, what)
    readers: dict[str, Reader] = {
        split: partial(_read_folder, bases[split], paths, labels) for split, paths in splits.items()
    }
    read = [path for paths in splits.values() for path in paths]
    inside = [
        group for name, group in groups.items() if not folders or any(base.name == name for base in bases.values())
    ]
    notes += left_out([file for group in inside for file in group if not is_image(file)])
    if outside := len(files) - len(read):
        notes.append(f"{counted(outside, 'image')} outside of the splits")
    return Source(f"image folder {top}", stat_identity(read), lambda: readers, len(read), tuple(notes), tuple(splits))


def one_folder(root: Path, what: str, files: Iterable[Path]) -> None:
    """Raises a `DatasetError` if the files lie in several folders."""
    folders = sorted({str(file.parent) for file in files})
    if len(folders) > 1:
        raise DatasetError(
            f"--data.root {root} holds {what} in several folders: {', '.join(folders)}; "
            "expected one dataset; give the folder of the one you mean"
        )


def require_splits(splits: Iterable[str], what: str, needed: Sequence[str] = ("train", "test")) -> None:
    """Raises a `DatasetError` if there is no training or no test split."""
    found = set(splits)
    if missing := [split for split in needed if split not in found]:
        has = f" (it has: {', '.join(sorted(found))})" if found else ""
        wanted = " and ".join(f"a {split} split" for split in needed)
        raise DatasetError(f"no {' and '.join(sorted(missing))} split in {what}{has}; expected {wanted}")


def _only_folder(root: Path, files: Sequence[Path]) -> tuple[Path, dict[str, list[Path]]]:
    """Descends while there is nothing but one folder, up to the splits; groups the files by the next name."""
    top = root
    while True:
        groups: dict[str, list[Path]] = {}
        for file in files:
            groups.setdefault(file.parts[len(top.parts)], []).append(file)
        (name, group), *others = groups.items()
        if others or split_of(name) or any(len(file.parts) == len(top.parts) + 1 for file in group):
            return top, groups
        top /= name


def _class(file: Path, base: Path) -> str | None:
    parents = file.relative_to(base).parts[:-1]
    return parents[0] if parents else None


def _read_folder(base: Path, files: list[Path], labels: Mapping[str, int]) -> Iterator[Record]:
    for file in files:
        name = _class(file, base)
        label = -1 if name is None else labels[name]
        yield Record(open_image(file.read_bytes(), str(file)), label, str(file))
