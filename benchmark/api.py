"""Python interface: load a trained model, draw samples, measure images, read records.

    system, data = load("runs/RUN")
    images = sample(system, data, 5000)
    measure(images, data, "offline-v3")

Import the functions from `benchmark`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmark.runs import checkpoint_in, load_run
from datamodules import ImageDataModule
from leaderboard.evaluation import images as images_module
from leaderboard.protocols import PROTOCOLS, ProtocolName
from leaderboard.record.entries import Entry, read_records
from leaderboard.record.records import MetricValue
from leaderboard.reports.energies import energy_columns
from systems.base import DiffusionSystem

if TYPE_CHECKING:
    import pandas as pd


def load(path: str | Path, which: str = "last") -> tuple[DiffusionSystem, ImageDataModule]:
    """Loads a trained model, in evaluation mode on the CPU, and its data module.

    Args:
        path: Run folder, folder made by `export`, a checkpoint in one or with its configuration inside, or `zoo:NAME`
            for a trained model that comes with the suite (`python -m benchmark zoo` lists them).
        which: Checkpoint of a run folder: `last`, or `best` by validation loss.

    Raises:
        FileNotFoundError: If there is no such run or checkpoint.
        ValueError: If it cannot be read or has no configuration.
    """
    return load_run(checkpoint_in(Path(path), which))


def sample(
    system: DiffusionSystem, data: ImageDataModule, num_images: int = 64, seed: int = 0, batch_size: int = 250
) -> Tensor:
    """Returns generated images as uint8 `(num_images, C, H, W)`, on the CPU, as a test compares them.

    Args:
        system: The method, in evaluation mode, on any device.
        data: Its data module, which sets the shape of the images; no dataset is read.
        num_images: Number of images.
        seed: Seed of the first image; image `k` has the seed `seed + k`, as in `test` and `predict`.
        batch_size: Images that are generated at a time; affects memory and speed.

    Raises:
        ValueError: If a number is out of range.
    """
    for name, value, least in (("num_images", num_images, 1), ("seed", seed, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name}={value} is too small; use {least} or more")
    batches = torch.arange(seed, seed + num_images).split(batch_size)
    return torch.cat([data.to_uint8(system.sample(seeds, data.image_shape)).cpu() for seeds in batches])


def measure(
    images: Tensor,
    data: ImageDataModule,
    protocol: ProtocolName = "offline-v3",
    draft: bool = False,
    inception_weights: str | None = None,
    torchvision_weights: str | None = None,
    extractor: str | None = None,
    fad_dir: str | None = None,
) -> dict[str, MetricValue]:
    """Measures images under a protocol, as `test` and `evaluate` do; returns the metrics with their uncertainties.

    Args:
        images: uint8 `(N, C, H, W)`, as `sample` returns them.
        data: Data module of the real images.
        protocol: How images are compared.
        draft: Whether the images may be fewer than the protocol asks for.
        inception_weights: Local file of the 2015 Inception weights, where they cannot be downloaded.
        torchvision_weights: Local file of torchvision's Inception weights, for paper-spiking-diffusion.
        extractor: File of another small extractor made by `train-extractor`, in place of the shipped one of its kind.
        fad_dir: Folder of the published autoencoders.

    Raises:
        ValueError: If the images are of another type or size, or deviate from the protocol and this is not a draft.
    """
    weights = (inception_weights, torchvision_weights, extractor)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return images_module.measure(images, data, PROTOCOLS[protocol], weights, fad_dir, draft, device).metrics


def records(folders: Iterable[str | Path] | None = None) -> pd.DataFrame:
    """Returns the records in folders as a data frame with one row per record, oldest first.

    Columns are method, variant, dataset, protocol, status (`measured`, or why the record is not ranked), the seeds,
    solver, `nfe`, `num_steps`, each metric with its standard error (`fd_digits`, `fd_digits_error`), the costs by their
    names in `leaderboard.record.records.Cost`, the bounds of the energy by each other model, the time and the file.

    Args:
        folders: Folders to search, by default the runs here and the records of the project.

    Raises:
        FileNotFoundError: If a folder does not exist.
    """
    import pandas as pd  # slow to import; a requirement of datasets

    rows: list[dict[str, Any]] = []
    for path, record in read_records(folders)[0]:
        row: dict[str, Any] = {"method": record.method, "variant": record.variant, "dataset": record.dataset.name}
        row |= {"protocol": record.protocol.name, "status": Entry(path, record).status}
        row |= {f"{name}_seed": seed for name, seed in record.seeds.items()}
        row |= {"solver": record.solver, "nfe": record.nfe, "num_steps": record.num_steps}
        for name, metric in record.metrics.items():
            row |= {name: metric.value, f"{name}_error": metric.uncertainty}
        row |= {
            name: value
            for name, value in (asdict(record.cost) if record.cost else {}).items()
            if name not in ("firing_rates", "counts", "nfe")
        }
        row |= energy_columns(record.cost)
        rows.append(row | {"created": record.created, "file": str(path)})
    return pd.DataFrame(rows).sort_values("created", ignore_index=True) if rows else pd.DataFrame()
