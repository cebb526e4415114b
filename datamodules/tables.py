"""Tables with a column of images: parquet files, folders written by `save_to_disk`, and the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.errors import DatasetError, DatasetNotFoundError
from datamodules.files import SPLIT_NAMES, check_shards, class_labels, left_out, list_files, split_of, split_of_file
from datamodules.images import open_image
from datamodules.sources import Reader, Record, Source, one_folder, require_splits, stat_identity

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category")
"""Names of the columns, the first that is there; in any case. Otherwise the only column of that type."""
HUB_TIMEOUT = 10.0
"""Seconds to wait for the first response of the hub."""


@dataclass(frozen=True)
class Columns:
    """How a table is read.

    Args:
        image: Column of the images; null finds it by its name or its type.
        label: Column of the labels; null finds it by its name or its type.
        class_names: The dataset's own classes in the order of their labels.
    """

    image: str | None = None
    label: str | None = None
    class_names: Sequence[str] = ()


class Table(NamedTuple):
    """A table that `datasets` can load, and its location for error messages."""

    load: Callable[[], Any]
    where: str


def find_parquet(root: Path, columns: Columns = Columns(), whole: bool = False) -> Source | None:
    """Finds parquet files of the Hugging Face layouts anywhere below `root`, by their names or those of their folders.

    Args:
        root: Folder to search.
        columns: How the tables are read.
        whole: Whether the test split may be missing, and all files are training images where no name says a split.

    Raises:
        DatasetError: If they belong to several datasets, or a split is missing, incomplete or there twice.
    """
    found, notes = ([root], []) if root.is_file() else list_files(root)
    base = root.parent if root.is_file() else root
    found = [file for file in found if file.suffix.lower() == ".parquet"]
    if part := next((file for file in found if file.parent.name.startswith("partial-")), None):
        raise DatasetError(f"{part.parent} is the hub's conversion of a part of a dataset; fetch the whole dataset")
    files: dict[str, list[Path]] = {}
    for file in found:
        files.setdefault(split_of_file(file, base) or "", []).append(file)
    others = files.pop("", [])
    files = {split: files[split] for split in SPLIT_NAMES if split in files}
    if whole and not files:
        files, others = {"train": others}, []
    if not any(files.values()):
        return None
    for split, paths in files.items():
        one_folder(root, f"parquet files of the {split} split", paths)
        check_shards(split, paths)
    one_folder(root, "parquet files", [_without_split(paths[0]) for paths in files.values()])
    if not (whole and "train" in files):
        require_splits(files, f"the parquet files below {root}")
    tables = {
        split: [Table(partial(_load_parquet, file), str(file)) for file in paths] for split, paths in files.items()
    }
    everything = [path for paths in files.values() for path in paths]
    return Source(
        f"parquet file {root}" if root.is_file() else f"parquet files below {root}",
        stat_identity(everything),
        partial(read_tables, tables, columns),
        len(everything),
        (*notes, *left_out(others, "parquet file of no split", "parquet files of no split")),
        tuple(files),
    )


def find_saved(root: Path, columns: Columns = Columns()) -> Source | None:
    """Finds a dataset that `datasets.DatasetDict.save_to_disk` wrote at `root` or below.

    Raises:
        DatasetError: If there are several, or a split is missing.
    """
    found, notes = list_files(root)
    saved = [file for file in found if file.name == "state.json" and (file.parent / "dataset_info.json").is_file()]
    if not saved:
        return None
    splits: dict[str, Path] = {}
    for file in saved:
        folder = file.parent
        split = split_of(folder.name)
        if split in splits:
            raise DatasetError(
                f"--data.root {root} holds the {split} split of several saved datasets: {splits[split]}, {folder}; "
                "give the folder of one"
            )
        if split is not None:
            splits[split] = folder
    if not splits or root / "state.json" in saved:
        raise DatasetError(
            f"{saved[0].parent} is a saved dataset without splits; expected the folder of a DatasetDict, with train/ "
            "and test/"
        )
    require_splits(splits, f"the saved dataset {root}")
    files = [file for file in found if file.parent in splits.values()]
    tables = {split: [Table(partial(_load_saved, folder), str(folder))] for split, folder in splits.items()}
    opened = partial(read_tables, tables, columns)
    return Source(f"saved dataset {root}", stat_identity(files), opened, len(files), tuple(notes))


def hub(
    title: str,
    hub_id: str,
    config: str | None,
    revision: str | None,
    layouts: str,
    columns: Columns = Columns(),
) -> Source:
    """Returns the dataset `hub_id` of the Hugging Face hub as a source; the `datasets` library caches it."""
    pinned = (
        f"revision {revision}" if revision else "latest revision (none pinned: the fingerprint identifies the data)"
    )
    return Source(
        description=f"Hugging Face hub {hub_id}, {pinned}",
        identity=f"hub {hub_id} {config} {revision}",
        open=partial(_open_hub, title, hub_id, config, revision, layouts, columns),
    )


def read_tables(tables: Mapping[str, Sequence[Table]], columns: Columns) -> Mapping[str, Reader]:
    """Returns the readers of splits; labels that are words are numbered over all splits together.

    Raises:
        DatasetError: If a table cannot be read, or has no column of images.
    """
    names = {name for parts in tables.values() for table in parts for name in _words(table, columns)}
    words = class_labels(names, columns.class_names, "the classes") if names else {}
    return {split: partial(_read_tables, parts, columns, words) for split, parts in tables.items()}


def find_columns(dataset: Any, columns: Columns, where: str) -> tuple[str, str | None]:
    """Returns the columns of images and of labels, None if there are no labels.

    Raises:
        DatasetError: If a column that was named does not exist, or there is none of images.
    """
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    names, features = list(dataset.column_names), dataset.features or {}
    for option, column in (("image_column", columns.image), ("label_column", columns.label)):
        if column is not None and column not in names:
            raise DatasetError(f"{where} has the columns {names}, but --data.{option} {column} was given")

    def find(known: Sequence[str], kind: type) -> str | None:
        of_kind = [name for name in names if isinstance(features.get(name), kind)]
        by_name = [name for wanted in known for name in names if name.lower() == wanted]
        return by_name[0] if by_name else of_kind[0] if len(of_kind) == 1 else None

    image = columns.image or find(IMAGE_COLUMNS, ImageFeature)
    if image is None:
        raise DatasetError(
            f"{where} has the columns {names}, expected one named {' or '.join(IMAGE_COLUMNS)}; rename it, or name it "
            "with --data Parquet --data.image_column"
        )
    return image, columns.label or find(LABEL_COLUMNS, ClassLabel)


def _without_split(file: Path) -> Path:
    """Drops the folder of a split, so that the splits of one dataset are in the same folder."""
    return file.parent if split_of(file.parent.name) else file


def _load_parquet(file: Path) -> Any:
    # slow to import, and only needed to build the cache; load_dataset would report each file to a server first
    from datasets.io.parquet import ParquetDatasetReader

    # streamed: no second copy on disk
    return ParquetDatasetReader(str(file), split="train", streaming=True).read()


def _load_saved(folder: Path) -> Any:
    from datasets import load_from_disk

    return load_from_disk(str(folder))


def _words(table: Table, columns: Columns) -> set[str]:
    """Returns the labels of a table that are words; none if its labels are numbers."""
    try:
        dataset = table.load()
        _, label = find_columns(dataset, columns, table.where)
        if label is None or getattr((dataset.features or {}).get(label), "dtype", None) not in (
            "string",
            "large_string",
        ):
            return set()
        batches = dataset.select_columns([label]).iter(batch_size=4096)
        return {name for batch in batches for name in batch[label] if name is not None}
    except DatasetError:
        raise
    except Exception as error:  # pyarrow, fsspec and datasets raise without a common base
        raise _unreadable(table.where, error) from error


def _read_tables(tables: Sequence[Table], columns: Columns, words: Mapping[str, int]) -> Iterator[Record]:
    for table in tables:
        yield from _read_rows(table, columns, words)


def _read_rows(table: Table, columns: Columns, words: Mapping[str, int]) -> Iterator[Record]:
    from datasets import Image as ImageFeature

    try:
        dataset = table.load()
        image, label = find_columns(dataset, columns, table.where)
        numbers = _class_numbers((dataset.features or {}).get(label), columns.class_names)
        dataset = dataset.cast_column(image, ImageFeature(decode=False))
        dataset = dataset.select_columns([image] if label is None else [image, label])
        index = 0
        for batch in dataset.iter(batch_size=256):
            values = [None] * len(batch[image]) if label is None else batch[label]
            for encoded, value in zip(batch[image], values, strict=True):
                here = f"{table.where}, row {index},"
                yield Record(_open(encoded, here), _label(value, words, numbers, f"{here} column {label},"), here)
                index += 1
    except DatasetError:
        raise
    except Exception as error:  # pyarrow, fsspec and datasets raise without a common base
        raise _unreadable(table.where, error) from error


def _open(encoded: Any, where: str) -> Any:
    if encoded and encoded["bytes"]:
        return open_image(encoded["bytes"], where)
    if encoded and encoded["path"] and Path(encoded["path"]).is_file():
        return open_image(Path(encoded["path"]).read_bytes(), where)
    raise DatasetError(f"{where} holds no image bytes; expected a struct of bytes and path")


def _label(value: Any, words: Mapping[str, int], numbers: Mapping[int, int], where: str) -> int:
    if value is None:
        return -1
    if isinstance(value, str):
        return words[value]
    if isinstance(value, list | dict) or int(value) != value:
        raise DatasetError(f"{where} is {value!r}, expected the number or the name of one class")
    return numbers.get(int(value), int(value))


def _class_numbers(feature: Any, class_names: Sequence[str]) -> Mapping[int, int]:
    """Returns the labels of a `ClassLabel` whose names say another order, such as numbers sorted as text."""
    names = getattr(feature, "names", None)
    if not names:
        return {}
    try:
        labels = class_labels(names, class_names, "the classes")
    except DatasetError:
        return {}
    is_said = bool(class_names) or all(name.isdecimal() for name in names)
    return {index: labels[name] for index, name in enumerate(names)} if is_said else {}


def _unreadable(where: str, error: Exception) -> DatasetError:
    return DatasetError(f"{where} cannot be read ({type(error).__name__}: {error}); fetch it again")


def _open_hub(
    title: str, hub_id: str, config: str | None, revision: str | None, layouts: str, columns: Columns
) -> Mapping[str, Reader]:
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
    tables = {
        split_of(split) or split: [Table(partial(splits.__getitem__, split), f"{hub_id}, split {split}")]
        for split in splits
    }
    return read_tables(tables, columns)
