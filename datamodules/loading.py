"""Datasets, samplers and loaders: training images as float tensors, and the seeds of the images to generate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class TrainingImages(Dataset[Any]):
    """Images as float32 in [-1, 1]; a whole batch `(B, C, H, W)` is sliced and scaled at once.

    Uses NumPy, since PyTorch's threads slow down such small operations up to a hundredfold if cores are shared. The
    index `~k` stands for image `k`, mirrored.

    Args:
        images: `(N, C, H, W)` uint8, usually memory-mapped.
        indices: Images of the dataset, `(M,)`.
        padding: Number of black pixels added on each side.
        labels: Classes of all images `(N,)`; batches are then pairs `(images, labels)`.
    """

    def __init__(self, images: Tensor, indices: Tensor, padding: int = 0, labels: Tensor | None = None) -> None:
        self.images = images.numpy()
        self.indices = indices.numpy()
        self.padding = padding
        self.labels = None if labels is None else labels.numpy()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        batch = self.__getitems__([index])
        return batch[0] if isinstance(batch, Tensor) else (batch[0][0], batch[1][0])

    def __getitems__(self, indices: list[int]) -> Tensor | tuple[Tensor, Tensor]:
        wanted = np.array(indices)
        mirrored = np.flatnonzero(wanted < 0)
        wanted[mirrored] = ~wanted[mirrored]
        chosen = self.indices[wanted]
        batch = self.images[chosen]
        if len(mirrored):
            batch[mirrored] = batch[mirrored, ..., ::-1]
        if self.padding:
            batch = np.pad(batch, ((0, 0), (0, 0), (self.padding,) * 2, (self.padding,) * 2))
        scaled = batch.astype(np.float32)
        scaled /= 127.5
        scaled -= 1
        images = torch.from_numpy(scaled)
        return images if self.labels is None else (images, torch.from_numpy(self.labels[chosen]))


class Seeds(Dataset[Tensor]):
    """The seeds `first, first + 1, ...`, int64, one per image to generate."""

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Tensor:
        return torch.tensor(indices, dtype=torch.int64) + self.first


class TrainingOrder(DistributedSampler[Any]):
    """Shuffled images of this process; order and mirroring depend only on `seed_everything` and the epoch.

    Step `k` uses the same global batch for any number of processes with equal global batch size.

    Args:
        images: Training images.
        skip: Images of this process to skip in the first epoch, as they were used before the training was stopped.
        epoch: First epoch.
        flip: Whether each image is mirrored with probability 1/2: `~k` stands for the mirrored image `k`.
    """

    def __init__(self, images: Dataset[Tensor], skip: int = 0, epoch: int = 0, flip: bool = False) -> None:
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        super().__init__(images, world_size(), rank(), shuffle=True, seed=seed, drop_last=True)
        self.skip = skip
        self.flip = flip
        self.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        order = super().__iter__()
        if self.flip:  # drawn for the global order, so that it does not depend on the number of processes
            coins = np.random.default_rng((self.seed, self.epoch)).random(self.total_size) < 0.5
            mine = np.fromiter(order, np.int64, self.num_samples)
            order = iter(np.where(coins[self.rank :: self.num_replicas], ~mine, mine).tolist())
        return islice(order, skip, None)


class FilledBatches(DistributedSampler[Any]):
    """Images in order, of which each process gets every n-th batch, so that batches are the same as in one process.

    If the number of batches is not a multiple of the number of processes, the first batch is repeated.

    Args:
        images: Validation images.
        batch_size: Images per batch.
    """

    def __init__(self, images: Dataset[Tensor], batch_size: int) -> None:
        super().__init__(images, world_size(), rank(), shuffle=False)
        indices = torch.arange(len(images)).split(batch_size)  # type: ignore[arg-type]
        turns = -(-len(indices) // self.num_replicas)
        mine = [i * self.num_replicas + self.rank for i in range(turns)]
        self.indices = torch.cat([indices[i if i < len(indices) else 0] for i in mine]).tolist()
        self.num_samples = len(self.indices)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.indices)


def to_bytes(images: Tensor) -> Tensor:
    """Maps [-1, 1] to uint8 by rounding, the inverse of the scaling in `TrainingImages`; other values are clamped."""
    return images.to(torch.float32).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def whole_batches(dataset: Dataset[Tensor], batch_size: int, **options: Any) -> DataLoader[Tensor]:
    """Returns a loader of a dataset that returns whole batches; Lightning distributes it over devices."""
    return DataLoader(dataset, batch_size=batch_size, collate_fn=_identity, **options)


class WholeBatches(UnrepeatedDistributedSampler):
    """Indices of every n-th batch of a single process, so that batches do not depend on the number of processes.

    Lightning does not replace it by its own sampler, which would repeat items until all processes have equally many.

    Args:
        count: Number of items of all processes.
        batch_size: Number of items in a batch.

    Raises:
        ValueError: If there are fewer batches than processes.
    """

    def __init__(self, count: int, batch_size: int) -> None:
        starts = range(0, count, batch_size)
        if len(starts) < world_size():
            raise ValueError(
                f"num_samples={count} in batches of {batch_size} cannot be shared by {world_size()} processes; give "
                f"{world_size()} batches or more, by a smaller --data.sample_batch_size or more --data.num_samples"
            )
        super().__init__(range(count), shuffle=False)
        self.indices = [
            index
            for start in starts[self.rank :: self.num_replicas]
            for index in range(start, min(start + batch_size, count))
        ]

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def world_size() -> int:
    """Returns the number of processes of this run."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def rank() -> int:
    """Returns the rank of this process."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0


def _identity(batch: Any) -> Any:
    return batch
