"""Generated images on disk, one file per batch, so that an interrupted evaluation resumes where it stopped.

Each finished batch is one file, `<run>/evaluation/<key>/chunk-<index of its first image>.npz`, with its images and
their `GenerationStats`. The key is a hash of everything that images and counts depend on, so stale files are not used.
"""

from __future__ import annotations

import inspect
import io
import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.loading import world_size
from leaderboard.evaluation.cost import Counts
from leaderboard.files import canonical_sha256, file_sha256, write_atomic

COUNTING = ("cost.py", "folding.py", "products.py", "structure.py", "tally.py")
"""Modules of this package that count."""


@dataclass(frozen=True)
class GenerationStats:
    """Number of images, time, memory and counts of a batch; they add up over batches and processes.

    Args:
        images: Number of images.
        seconds: Device time; the sum over devices if there are several.
        peak_memory_bytes: Peak memory of the device during generation; `None` where it cannot be measured.
        counts: Spikes and operations.
    """

    images: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    counts: Counts = field(default_factory=Counts)

    def __add__(self, other: GenerationStats) -> GenerationStats:
        peaks = [p for p in (self.peak_memory_bytes, other.peak_memory_bytes) if p is not None]
        return GenerationStats(
            self.images + other.images,
            self.seconds + other.seconds,
            max(peaks, default=None),
            self.counts + other.counts,
        )

    def over_processes(self) -> GenerationStats:
        """Returns the sum over all processes; a collective call that every process must make."""
        if world_size() == 1:
            return self
        gathered: list[Any] = [None] * world_size()
        torch.distributed.all_gather_object(gathered, self)
        return sum(gathered, GenerationStats())


class Chunks:
    """The finished batches of one evaluation.

    Args:
        folder: Folder of their files, created with the first one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def count(self) -> int:
        """Number of finished batches."""
        return len(list(self.folder.glob("chunk-*.npz")))

    def read(self, first: int, count: int) -> tuple[Tensor, Tensor, GenerationStats] | None:
        """Returns a finished batch as it was written, or None if it must be generated.

        Args:
            first: Index of the batch's first image.
            count: Its number of images; a file with another number, such as a shorter last batch, is not used.
        """
        path = self._path(first)
        try:
            with np.load(path, allow_pickle=False) as file:
                images, stats = torch.from_numpy(file["images"]), json.loads(str(file["stats"]))
                pixels = images if stats.pop("same") else torch.from_numpy(file["pixels"])
            found = images, pixels, GenerationStats(**stats | {"counts": Counts(**stats["counts"])})
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever the damage, the images can be generated again
            warnings.warn(f"{path} is damaged ({error}); its images are generated again", stacklevel=2)
            return None
        return found if len(images) == count else None

    def write(self, first: int, images: Tensor, pixels: Tensor, stats: GenerationStats) -> None:
        """Writes a finished batch atomically.

        Args:
            first: Index of its first image.
            images: uint8 images `(B, C, H, W)` on the CPU.
            pixels: The same images as the protocol compares them; `images` itself if it compares uint8 images.
            stats: Statistics of the batch.
        """
        same = pixels is images
        arrays: dict[str, Any] = {"images": images.numpy()} | ({} if same else {"pixels": pixels.numpy()})
        arrays["stats"] = np.array(json.dumps(asdict(stats) | {"same": same}))
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # zip stores checksums
        write_atomic(self._path(first), buffer.getvalue())

    def clear(self) -> None:
        """Deletes the files of this evaluation, and the parent folder once it is empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    def _path(self, first: int) -> Path:
        return self.folder / f"chunk-{first:08d}.npz"


def generation_key(system: Any, data: Any, checkpoint: str, model: Any, environment: dict[str, Any]) -> str:
    """Returns a hash of everything that the generated images and their counts depend on.

    Args:
        system: The method; its source code is hashed.
        data: Datamodule; its seeds, batch size and geometry are hashed.
        checkpoint: SHA-256 of the checkpoint.
        model: Resolved configuration of the method, as JSON; the contents of files named in it are hashed too.
        environment: Other conditions, as JSON: versions, device, precision.
    """
    names = ("name", "image_shape", "native_size", "fit", "sample_seed", "sample_batch_size")
    settings = {
        "checkpoint": checkpoint,
        "model": model,
        "files": {name: file_sha256(Path(name)) for name in _strings(model) if _is_file(name)},
        "data": {name: getattr(data, name) for name in names},
        "environment": environment,
        "source": _source_sha256(type(system)),
    }
    return canonical_sha256(settings)[:16]


def _strings(value: Any) -> Iterator[str]:
    """Yields every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # cannot be a file name
        return False


def _source_sha256(system: type) -> str:
    """Returns a hash of the code that generates and counts, because package versions do not reveal local edits."""
    root = Path(__file__).parents[2]
    files = [file for package in ("systems", "datamodules") for file in sorted((root / package).rglob("*.py"))]
    counting = [root / "leaderboard/evaluation" / name for name in COUNTING]
    return canonical_sha256([file_sha256(f) for f in (*files, *counting, Path(inspect.getfile(system)))])
