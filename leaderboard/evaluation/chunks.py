"""Generated images batch by batch on disk, so that an evaluation that was killed goes on where it stopped.

Each finished batch is one file, `<run>/evaluation/<key>/chunk-<index of its first image>.npz`: its uint8 images and
what they took. The key stands for all that images and counts depend on, so nothing out of date is ever taken up.
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


@dataclass(frozen=True)
class Share:
    """What generating some images took; shares add up over batches and processes.

    Args:
        images: Number of images.
        seconds: Time of one device.
        peak_memory_bytes: Peak memory of the device while it generated; `None` where it cannot be measured.
        counts: Spikes and operations.
    """

    images: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    counts: Counts = field(default_factory=Counts)

    def __add__(self, other: Share) -> Share:
        peaks = [p for p in (self.peak_memory_bytes, other.peak_memory_bytes) if p is not None]
        return Share(
            self.images + other.images,
            self.seconds + other.seconds,
            max(peaks, default=None),
            self.counts + other.counts,
        )

    def over_processes(self) -> Share:
        """Returns the sum of the shares of all processes; all of them have to call it."""
        if world_size() == 1:
            return self
        shares: list[Any] = [None] * world_size()
        torch.distributed.all_gather_object(shares, self)
        return sum(shares, Share())


class Chunks:
    """The finished batches of one evaluation.

    Args:
        folder: Folder of their files; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def count(self) -> int:
        """Number of finished batches."""
        return len(list(self.folder.glob("chunk-*.npz")))

    def read(self, first: int, count: int) -> tuple[Tensor, Tensor, Share] | None:
        """Returns a finished batch as it was written, nothing if it is to be generated.

        Args:
            first: Index of the batch's first image.
            count: Its number of images; a file of another number was the last batch of fewer images.
        """
        path = self._path(first)
        try:
            with np.load(path, allow_pickle=False) as file:
                images, share = torch.from_numpy(file["images"]), json.loads(str(file["share"]))
                pixels = images if share.pop("same") else torch.from_numpy(file["pixels"])
            found = images, pixels, Share(**share | {"counts": Counts(**share["counts"])})
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever is wrong with the file, its images can be generated again
            warnings.warn(f"{path} is damaged ({error}); its images are generated again", stacklevel=2)
            return None
        return found if len(images) == count else None

    def write(self, first: int, images: Tensor, pixels: Tensor, share: Share) -> None:
        """Keeps a finished batch, in one step.

        Args:
            first: Index of its first image.
            images: uint8 images `(B, C, H, W)` in the memory of the host.
            pixels: The same as they are compared; `images` itself where these are bytes, too.
            share: What they took.
        """
        same = pixels is images
        arrays: dict[str, Any] = {"images": images.numpy()} | ({} if same else {"pixels": pixels.numpy()})
        arrays["share"] = np.array(json.dumps(asdict(share) | {"same": same}))
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # with checksums
        write_atomic(self._path(first), buffer.getvalue())

    def clear(self) -> None:
        """Removes the files of this evaluation, and the folder of evaluations if no other is unfinished."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    def _path(self, first: int) -> Path:
        return self.folder / f"chunk-{first:08d}.npz"


def generation_key(system: Any, data: Any, checkpoint: str, model: Any, environment: dict[str, Any]) -> str:
    """Returns a hash of everything that the images of an evaluation and their counts depend on.

    Args:
        system: The method, for its source.
        data: Datamodule, for seeds, batches and geometry.
        checkpoint: SHA-256 of the checkpoint.
        model: Resolved configuration of the method, as JSON; the content of files that it names counts, too.
        environment: What else counts, as JSON: versions, device, precision.
    """
    names = ("name", "image_shape", "native_size", "fit", "sample_seed", "sample_batch_size")
    settings = {
        "checkpoint": checkpoint,
        "model": model,
        "files": {name: file_sha256(Path(name)) for name in _texts(model) if _is_file(name)},
        "data": {name: getattr(data, name) for name in names},
        "environment": environment,
        "source": _source_sha256(type(system)),
    }
    return canonical_sha256(settings)[:16]


def _texts(value: Any) -> Iterator[str]:
    """Yields every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # no name of a file at all
        return False


def _source_sha256(system: type) -> str:
    """Hash of the code that generates and counts: versions alone do not tell that somebody edits it."""
    root = Path(__file__).parents[2]
    files = [file for package in ("systems", "datamodules") for file in sorted((root / package).rglob("*.py"))]
    return canonical_sha256(
        [file_sha256(f) for f in (*files, root / "leaderboard/evaluation/cost.py", Path(inspect.getfile(system)))]
    )
