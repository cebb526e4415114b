"""Listing of files below a folder, the names of splits and shards, and the numbers of classes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from datamodules.errors import DatasetError

SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "valid": ("valid", "validation", "val", "dev"),
}
"""Names of each split in the names of files and folders, in any case."""
HIDDEN = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir", "$RECYCLE.BIN"})
"""Entries that systems leave in folders, ignored like names that begin with a dot."""
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
MAX_NAMED = 5
"""Largest number of names in a message."""


def list_files(root: Path) -> tuple[list[Path], list[str]]:
    """Lists the files below a folder, sorted; links are followed and hidden entries ignored.

    Returns:
        The files, and what was left out in words.

    Raises:
        DatasetError: If a folder cannot be read, or a link leads nowhere.
    """
    skipped: Counter[tuple[str, str]] = Counter()
    try:
        files = sorted(_walk(root, (), skipped))
    except OSError as error:
        raise DatasetError(f"{error.filename or root} cannot be read ({error.strerror or error})") from error
    return files, [counted(count, *words) for words, count in sorted(skipped.items())]


def _walk(folder: Path, ancestors: tuple[tuple[int, int], ...], skipped: Counter[tuple[str, str]]) -> Iterator[Path]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in ancestors:
        skipped["link to a folder above", "links to folders above"] += 1
        return
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or entry.name in HIDDEN:
            skipped["hidden entry", "hidden entries"] += 1
        elif entry.is_dir():
            yield from _walk(folder / entry.name, (*ancestors, here), skipped)
        elif entry.is_file():
            yield folder / entry.name
        elif entry.is_symlink():
            target = (folder / entry.name).readlink()
            raise DatasetError(f"{entry.path} is a link to {target}, which does not exist; fetch the file again")


def named(names: Iterable[object]) -> str:
    """Joins names for a message, the first ones if there are many."""
    texts = [str(name) for name in names]
    rest = len(texts) - MAX_NAMED
    return ", ".join(texts[:MAX_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


def counted(number: int, one: str, many: str = "") -> str:
    """Returns a number with its noun."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def left_out(files: Sequence[Path], what: str = "other file", many: str = "") -> list[str]:
    """Describes files that are not read, by their suffixes."""
    suffixes = sorted({file.suffix.lower() or file.name for file in files})
    return [f"{counted(len(files), what, many)} ({named(suffixes)})"] if files else []


def split_of(name: str) -> str | None:
    """Returns the split that the name of a folder stands for."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def split_of_file(file: Path, root: Path) -> str | None:
    """Returns the split of a file: a word of its name, at best the first, or else the name of a folder around it."""
    words = [split for word in re.findall(r"[a-z]+", file.stem.lower()) if (split := split_of(word))]
    if words:
        return words[0]
    folders = reversed(file.relative_to(root).parts[:-1])
    return next((split for folder in folders if (split := split_of(folder))), None)


def check_shards(split: str, files: Sequence[Path]) -> None:
    """Checks that several files of one split are a complete series, in which only one number differs.

    Raises:
        DatasetError: If shards are missing, or there are several copies of the split.
    """
    counted = [re.fullmatch(r"(.*?)(\d+)-of-(\d+)(.*)", file.stem) for file in files]
    shards = [match for match in counted if match]
    fields = [re.split(r"(\d+)", file.stem) for file in files]
    if shards:
        is_series = len(shards) == len(files) and len({(match[1], int(match[3])) for match in shards}) == 1
        numbers, expected = [int(match[2]) for match in shards], range(int(shards[0][3]))
    elif len(files) == 1 and not files[0].stem.isdecimal():
        return
    else:
        differing = {k for row in fields for k, field in enumerate(row) if [field] != fields[0][k : k + 1]} or {1}
        place = min(differing)
        is_series = len({len(row) for row in fields}) == 1 and len(differing) == 1 and place % 2 == 1
        numbers = [int(row[place]) for row in fields] if is_series else []
        first = 0 if files[0].stem.isdecimal() else min(1, *numbers, 1)
        expected = range(first, max(numbers, default=0) + 1)
    if not is_series or len(set(numbers)) < len(numbers):
        raise DatasetError(
            f"{files[0].parent} holds several copies of the {split} split: {named(file.name for file in files)}; "
            "keep one file or one complete series"
        )
    if missing := sorted(set(expected) - set(numbers)):
        raise DatasetError(
            f"the {split} split in {files[0].parent} is incomplete: it has {named(file.name for file in files)}, but "
            f"lacks {named(f'number {number:05}' for number in missing)}; fetch the missing files"
        )


def class_labels(names: Iterable[str], class_names: Sequence[str], what: str) -> dict[str, int]:
    """Returns the label of every class: its number if all names are numbers, or else its place in the list of names.

    Args:
        names: Names of the classes of all splits.
        class_names: The dataset's own classes in the order of their labels; if empty, the names are sorted, with
            numbers in them as numbers.
        what: Description of the names for messages.

    Raises:
        DatasetError: If a name is not one of the dataset's classes, or two names are the same number.
    """
    found = sorted(set(names), key=natural_order)
    if all(re.fullmatch(r"\d+", name) for name in found):
        return _distinct({name: int(name) for name in found}, what)
    if not class_names:
        return {name: label for label, name in enumerate(found)}
    known = {_plain(name): label for label, name in enumerate(class_names)}
    if all(_plain(name) in known for name in found):
        return {name: known[_plain(name)] for name in found}
    numbers = [re.fullmatch(r"(\D*)(\d+)(.*)", name) for name in found]
    if all(numbers) and (len({(m[1], m[3]) for m in numbers if m}) == 1 or not any(m[1] for m in numbers if m)):
        return _distinct({m[0]: int(m[2]) for m in numbers if m}, what)
    unknown = [name for name in found if _plain(name) not in known]
    raise DatasetError(f"{what} are named {named(unknown)}; expected numbers, or {', '.join(class_names)}")


def _distinct(labels: dict[str, int], what: str) -> dict[str, int]:
    if len(set(labels.values())) < len(labels):
        raise DatasetError(f"{what} are named {named(labels)}, of which two are the same number; rename one")
    return labels


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Key that sorts numbers within names as numbers."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold())
