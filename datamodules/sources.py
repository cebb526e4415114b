"""Sources of images: parquet files, image folders and the Hugging Face hub.

A `Source` is found without being read: its `identity` is part of the cache key, and images are read only when the
readers of its splits are iterated. `idx.py`, `cifar10.py` and `celeba.py` read the original files of single datasets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from datamodules.errors import DatasetError, DatasetNotFoundError
from datamodules.images import open_image

SPLITS = ("train", "test", "valid")
"""Names of the splits: prefixes of parquet files and names of image folders."""
IMAGE_COLUMNS = ("image", "img")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
HUB_TIMEOUT = 10.0
"""Seconds to wait for the first response of the hub."""


class Record(NamedTuple):
    """One image, possibly not decoded yet, its label (-1: unknown), and its location for error messages."""

    image: Image.Image
    label: int
    where: str


Reader = Callable[[], Iterator[Record]]


@dataclass(frozen=True)
class Source:
    """A dataset that can be read: its description, its identity in the cache key, and a function that opens it."""

    description: str
    identity: str
    open: Callable[[], Mapping[str, Reader]]


def stat_identity(files: Iterable[Path]) -> str:
    """Identifies files by path, size and modification time."""
    stats = ((file.resolve(), file.stat()) for file in files)
    return "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)


def find_parquet(root: Path) -> Source | None:
    """Finds parquet files of the Hugging Face layout anywhere below `root`, by the prefixes of their names.

    Raises:
        DatasetError: If they belong to several datasets, or the training or the test split is missing.
    """
    found = sorted(root.rglob("*.parquet"))
    files = {split: [file for file in found if file.name.startswith(split)] for split in SPLITS}
    files = {split: paths for split, paths in files.items() if paths}
    if not files:
        return None
    for split, paths in files.items():
        one_folder(root, f"parquet files of the {split} split", paths)
    require_splits(files, f"the parquet files below {root}")
    readers: dict[str, Reader] = {split: partial(_read_parquet, paths) for split, paths in files.items()}
    everything = [path for paths in files.values() for path in paths]
    return Source(f"parquet files below {root}", stat_identity(everything), lambda: readers)


def find_image_folder(root: Path) -> Source | None:
    """Finds PNG or JPEG images below `root/train` and `root/test`; subfolders, sorted by name, are the classes.

    Raises:
        DatasetError: If the training or the test split is missing.
    """
    files = {
        split: sorted(file for file in (root / split).rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        for split in SPLITS
    }
    files = {split: paths for split, paths in files.items() if paths}
    if not files:
        return None
    require_splits(files, f"the image folder {root}")
    classes = sorted(folder.name for folder in (root / "train").iterdir() if folder.is_dir())
    readers: dict[str, Reader] = {
        split: partial(_read_folder, root / split, paths, classes) for split, paths in files.items()
    }
    everything = [path for paths in files.values() for path in paths]
    return Source(f"image folder {root}", stat_identity(everything), lambda: readers)


def hub(title: str, hub_id: str, config: str | None, revision: str | None, layouts: str) -> Source:
    """Returns the dataset `hub_id` of the Hugging Face hub as a source; the `datasets` library caches it."""
    pinned = (
        f"revision {revision}" if revision else "latest revision (none pinned: the fingerprint identifies the data)"
    )
    return Source(
        description=f"Hugging Face hub {hub_id}, {pinned}",
        identity=f"hub {hub_id} {config} {revision}",
        open=partial(_open_hub, title, hub_id, config, revision, layouts),
    )


def one_folder(root: Path, what: str, files: list[Path]) -> None:
    """Raises a `DatasetError` if the files lie in several folders."""
    folders = sorted({str(file.parent) for file in files})
    if len(folders) > 1:
        raise DatasetError(
            f"--data.root {root} holds {what} in several folders: {', '.join(folders)}; "
            "expected one dataset; give the folder of the one you mean"
        )


def require_splits(splits: Iterable[str], what: str) -> None:
    """Raises a `DatasetError` if there is no training or no test split."""
    if missing := {"train", "test"} - set(splits):
        raise DatasetError(f"no {' and '.join(sorted(missing))} split in {what}; a train and a test split are needed")


def _read_parquet(files: list[Path]) -> Iterator[Record]:
    from datasets import load_dataset  # slow to import, and only needed to build the cache

    for file in files:
        load = partial(load_dataset, "parquet", data_files=str(file), split="train", streaming=True)
        yield from _read_rows(load, str(file))  # streamed: no second copy on disk


def _read_rows(load: Callable[[], Any], where: str) -> Iterator[Record]:
    from datasets import Image as ImageFeature

    try:
        dataset = load()
        names = dataset.column_names
        column = next((name for name in IMAGE_COLUMNS if name in names), None)
        if column is None:
            raise DatasetError(f"{where} has the columns {names}, expected one named {' or '.join(IMAGE_COLUMNS)}")
        kept = [column, "label"] if "label" in names else [column]
        dataset = dataset.cast_column(column, ImageFeature(decode=False)).select_columns(kept)
        index = 0
        for batch in dataset.iter(batch_size=256):
            images = batch[column]
            for image, label in zip(images, batch.get("label", [-1] * len(images)), strict=True):
                here = f"{where}, row {index},"
                if not image or not image["bytes"]:
                    raise DatasetError(f"{here} holds no image bytes; expected a struct of bytes and path")
                yield Record(open_image(image["bytes"], here), -1 if label is None else int(label), here)
                index += 1
    except DatasetError:
        raise
    except Exception as error:  # pyarrow, fsspec and datasets raise without a common base
        raise DatasetError(f"{where} cannot be read ({type(error).__name__}: {error}); fetch it again") from error


def _read_folder(folder: Path, files: list[Path], classes: list[str]) -> Iterator[Record]:
    for file in files:
        parents = file.relative_to(folder).parts[:-1]
        if parents and parents[0] not in classes:
            raise DatasetError(f"{file} is of a class that has no folder in the training split: {', '.join(classes)}")
        yield Record(open_image(file.read_bytes(), str(file)), classes.index(parents[0]) if parents else -1, str(file))


def _open_hub(title: str, hub_id: str, config: str | None, revision: str | None, layouts: str) -> Mapping[str, Reader]:
    import datasets
    from huggingface_hub import HfApi

    try:
        if not Path(datasets.config.HF_DATASETS_CACHE, hub_id.replace("/", "___")).exists():
            # A single request first: without a network, load_dataset retries for half a minute and more.
            HfApi().dataset_info(hub_id, revision=revision, timeout=HUB_TIMEOUT)
        splits = datasets.load_dataset(hub_id, config, revision=revision)
    except Exception as error:  # httpx, huggingface_hub and datasets raise without a common base
        raise DatasetNotFoundError(
            f"{title} was not found. Tried the Hugging Face hub: {hub_id}, revision {revision or 'latest'} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}), "
            "and no folder was given. Ways out:\n"
            f"  - give a folder with --data.root FOLDER that holds {layouts};\n"
            "  - or run once on a machine with a network: the hub's copy is kept in the Hugging Face cache (HF_HOME)."
        ) from error
    require_splits(splits, f"Hugging Face hub {hub_id}")
    names = {"validation": "valid"}
    return {
        names.get(split, split): partial(_read_rows, partial(splits.__getitem__, split), f"{hub_id}, split {split}")
        for split in splits
    }
