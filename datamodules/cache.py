"""Cache of decoded images: each split is decoded once into an array of bytes and opened by memory mapping.

An entry is a folder with `<split>_images.npy` `(N, C, H, W)` uint8, `<split>_labels.npy` `(N,)` int64 and `meta.json`.
It is built in a temporary folder and then renamed, so that an interrupted run leaves no incomplete entry and several
processes can build the same one. An entry whose files differ from `meta.json` in shape or size is built again.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.lib import format as npy
from PIL import Image
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from datamodules.errors import DatasetError
from datamodules.images import to_array

Sample = tuple[Image.Image, int]
LOCK = ".lock"
"""File in the cache folder that a process locks while it moves an entry into place."""


@dataclass(frozen=True)
class Entry:
    """A cached dataset: its folder and the content of `meta.json`."""

    path: Path
    meta: Mapping[str, Any]

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.meta["splits"])

    def size(self, split: str) -> int:
        """Number of images of a split."""
        return int(self.meta["splits"][split]["images"]["shape"][0])

    def images(self, split: str) -> Tensor:
        """Images `(N, C, H, W)` uint8, memory-mapped; writing to them does not change the file."""
        return torch.from_numpy(np.load(self.path / f"{split}_images.npy", mmap_mode="c"))

    def labels(self, split: str) -> Tensor:
        """Labels `(N,)` int64, -1 if unknown."""
        return torch.from_numpy(np.load(self.path / f"{split}_labels.npy"))


def open_entry(path: Path) -> Entry | None:
    """Opens a cache entry; returns None if it is missing or damaged."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        for split, arrays in meta["splits"].items():
            for kind, expected in arrays.items():
                file = path / f"{split}_{kind}.npy"
                if _array_info(file) != expected:
                    return None
    except (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return Entry(path, meta)


def build_entry(
    path: Path, source: str, splits: Mapping[str, Iterable[Sample]], fit: Callable[[Image.Image], Image.Image]
) -> Entry:
    """Decodes every split into a new entry at `path`.

    Args:
        path: Folder of the entry.
        source: Description of the source.
        splits: Decoded images with their labels, by split.
        fit: Crops and resizes an image; the fingerprint is computed before.

    Raises:
        DatasetError: If a split has no images, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-", ignore_cleanup_errors=True)
    except OSError as error:
        raise DatasetError(
            f"the image cache cannot be written to {path.parent} ({error}); give another folder with --data.cache_dir"
        ) from error
    digest = hashlib.sha256()
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), TextColumn("{task.completed:,.0f} images"), TimeElapsedColumn()
    with folder, Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        new = Path(folder.name) / "new"
        new.mkdir()
        arrays = {}
        for split, samples in splits.items():
            digest.update(f"{split}:".encode())
            tracked = progress.track(samples, description=f"decoding {path.name}, {split}")
            arrays[split] = _write_split(new, split, source, tracked, fit, digest.update)
        meta = {"source": source, "fingerprint": digest.hexdigest(), "splits": arrays}
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
        _install(new, path, aside=Path(folder.name))
    return Entry(path, meta)


def _write_split(
    folder: Path,
    split: str,
    source: str,
    samples: Iterable[Sample],
    fit: Callable[[Image.Image], Image.Image],
    digest: Callable[[bytes], None],
) -> dict[str, Any]:
    """Writes one split, image by image; the header gets the number of images at the end."""
    labels: list[int] = []
    shape: tuple[int, ...] = ()
    images_file = folder / f"{split}_images.npy"
    with images_file.open("wb") as file:
        for image, label in samples:
            pixels = to_array(fit(image))
            if not labels:
                shape = pixels.shape
                _write_header(file, 0, shape)
            digest(image.tobytes())
            file.write(pixels.tobytes())
            labels.append(label)
        if not labels:
            raise DatasetError(f"{source} holds no images in its {split} split; fetch it again")
        file.seek(0)
        _write_header(file, len(labels), shape)  # same length: npy headers reserve space for a longer first axis
    digest(f"{len(labels)}x{shape[0]};".encode())
    np.save(folder / f"{split}_labels.npy", np.array(labels, np.int64))
    return {kind: _array_info(folder / f"{split}_{kind}.npy") for kind in ("images", "labels")}


def _write_header(file: Any, count: int, shape: tuple[int, ...]) -> None:
    npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)})


def _array_info(file: Path) -> dict[str, Any]:
    """Returns shape, dtype and size of an array file; reads only its header."""
    array = np.load(file, mmap_mode="r")
    return {"shape": list(array.shape), "dtype": str(array.dtype), "bytes": file.stat().st_size}


def _install(new: Path, path: Path, aside: Path) -> None:
    """Moves a finished entry to its place, unless another process has done so; a damaged one there moves to `aside`."""
    try:
        with FileLock(path.parent / LOCK):
            if open_entry(path) is None:
                if path.exists():
                    path.replace(aside / "damaged")
                new.replace(path)
    except OSError as error:
        raise DatasetError(
            f"the image cache {path} cannot be replaced ({error}); delete it, or give another --data.cache_dir"
        ) from error
