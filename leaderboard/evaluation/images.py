"""`python -m benchmark evaluate`: measures images that other code made, and writes a record of kind *images only*.

They are compared as the images of a `test` are: same reference, extractors, metrics and uncertainties. Image `k`
belongs to jackknife group `k % groups`, and the first ones are kept for kernel distance, precision and recall.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from datamodules import ImageDataModule
from datamodules.files import left_out, list_files, named, natural_order
from datamodules.images import decode, open_image, to_array
from datamodules.registry import find_data
from datamodules.sources import is_image
from leaderboard.energy import strict_energy_mj
from leaderboard.evaluation.callback import code_version, dataset_of, extractor_of, hardware
from leaderboard.evaluation.reference import (
    Weights,
    build_parts,
    make_protocol_data,
    prepare_reference,
    weight_deviations,
)
from leaderboard.files import canonical_sha256, write_atomic
from leaderboard.pictures import enlargement, grid, save_png
from leaderboard.protocols import PROTOCOLS, Protocol, ProtocolName
from leaderboard.record.entries import Entry
from leaderboard.record.records import (
    Artefact,
    Cost,
    ImageSet,
    MetricValue,
    ProtocolEntry,
    Record,
    check_name,
    check_url,
    record_name,
    redact_paths,
    write_record,
)
from leaderboard.reports.table import show_result
from leaderboard.reports.terminal import SHORT, terminal
from leaderboard.schema import SchemaError, from_json

BATCH = 250
"""Images per batch."""
LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")
"""Suffixes of files whose pixels are not those of the images before they were written."""


class Measurement(NamedTuple):
    """Metrics of a set of images, and the extractor they were computed with."""

    metrics: dict[str, MetricValue]
    extractor: Artefact


@dataclass(frozen=True)
class StatedCost:
    """Cost of one image over its whole chain, as the authors of the images state it in a JSON file.

    Args:
        parameters: Parameters of the network.
        nfe: Network evaluations per image.
        macs: Multiply-accumulates.
        sops: Synaptic operations: accumulates caused by spikes; 0 for a network without spikes.
        acs: Accumulates; `sops` if not given.
        num_steps: SNN time steps `T`, for a spiking network.
        firing_rate: Spikes per neuron and time step.
        images_per_second: Throughput of one device.
        peak_memory_bytes: Peak memory of the device.
        solver: Name of the sampler.
    """

    parameters: int
    nfe: int
    macs: float
    sops: float
    acs: float | None = None
    num_steps: int | None = None
    firing_rate: float | None = None
    images_per_second: float | None = None
    peak_memory_bytes: int | None = None
    solver: str = ""

    def cost(self) -> Cost:
        """Returns the cost as a record has it; the energy follows from the operations, by the strict count."""
        acs = self.sops if self.acs is None else self.acs
        return Cost(
            parameters=self.parameters,
            trainable_parameters=self.parameters,
            nfe=self.nfe,
            firing_rate=self.firing_rate,
            firing_rates={},
            sops=self.sops,
            macs=self.macs,
            acs=acs,
            energy_strict_mj=strict_energy_mj(self.macs, acs),
            energy_paper_mj=None,
            images_per_second=self.images_per_second,
            peak_memory_bytes=self.peak_memory_bytes,
        )


def evaluate(
    images: str = "",
    data: str = "",
    protocol: ProtocolName = "standard-v3",
    config: str | None = None,
    root: str | None = None,
    name: str | None = None,
    variant: str = "",
    url: str = "",
    cost: str | None = None,
    draft: bool = False,
    inception_weights: str | None = None,
    torchvision_weights: str | None = None,
    extractor: str | None = None,
    fad_dir: str | None = None,
    cache_dir: str | None = None,
    data_options: dict[str, Any] = {},  # noqa: B006 (never changed)
    output: str = "runs",
) -> None:
    """Measures images that other code made, under a protocol, and writes a record of kind *images only*.

    Tables list such records behind the ranked ones, since `leaderboard verify` cannot repeat them.

    Args:
        images: Folder of image files (any names, nested or not), or an array of bytes: .npz with arr_0, or .npy, of
            shape (N, H, W, C) or (N, H, W) (required).
        data: Dataset to compare with, such as mnist, or the path of a class, such as mypackage.data.Shapes.
        protocol: How images are compared.
        config: Config of a training or a run whose data is compared with, instead of `data`.
        root: Folder of the dataset; read from the Hugging Face hub if not given.
        name: Name of the method; the name of the folder or file if not given.
        variant: Distinguishes this entry from others of the method.
        url: Web address of the code or paper.
        cost: JSON file with parameters, nfe, macs and sops of one image, and optionally acs, num_steps, firing_rate,
            images_per_second, peak_memory_bytes and solver.
        draft: Whether this is a draft, which may deviate from the protocol.
        inception_weights: Local file of the 2015 Inception weights, where they cannot be downloaded.
        torchvision_weights: Local file of torchvision's Inception weights, for paper-spiking-diffusion.
        extractor: File of another small extractor made by `train-extractor`, in place of the shipped one of its kind.
        fad_dir: Folder of the published autoencoders.
        cache_dir: Folder of decoded images and reference statistics; the same as for `test` if not given.
        data_options: Further options of the data module, such as '{center_crop: null}'.
        output: Folder in which a new run folder with the record is made.

    Raises:
        FileNotFoundError: If there are no such images.
        ValueError: If the images cannot be compared, deviate from the protocol, or a name or the cost is malformed.
    """
    options = {key: value for key, value in locals().items() if key != "output"}
    started = time.perf_counter()
    if not images:
        raise ValueError("--images is missing; give a folder of images, or a file *.npz or *.npy")
    path = Path(images)
    method = re.sub(r"[^\w.+-]+", "_", path.resolve().stem) if name is None else name
    check_name("--name", method)
    check_name("--variant", variant, required=False)
    check_url("--url", url)
    stated = None if cost is None else read_cost(Path(cost))
    chosen = PROTOCOLS[protocol]
    given = {"root": root, "cache_dir": cache_dir}
    found, settings = find_data(data, config, {k: v for k, v in given.items() if v is not None} | data_options)
    module = make_protocol_data(found, settings, chosen)
    pixels, source = read_images(path, module.num_channels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = (inception_weights, torchvision_weights, extractor)
    metrics, used = measure(pixels, module, chosen, weights, fad_dir, draft, device)
    description = chosen.description()
    record = redact_paths(
        Record(
            method=method,
            variant=variant,
            dataset=dataset_of(module),
            protocol=ProtocolEntry(chosen.name, description, canonical_sha256(description)),
            draft=draft,
            config=options,
            config_sha256=canonical_sha256(options),
            code=code_version(),
            seeds={},
            checkpoint=None,
            extractor=used,
            hardware=hardware(device),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            wall_time_seconds=time.perf_counter() - started,
            metrics=metrics,
            solver=stated.solver if stated else "",
            nfe=stated.nfe if stated else None,
            num_steps=stated.num_steps if stated else None,
            cost=stated.cost() if stated else None,
            images=ImageSet(fingerprint(pixels), len(pixels), count_copies(pixels), source, url),
        )
    )
    file = record_name(record)
    moment, slug, *_, digest = file.removesuffix(".json").split("-")
    folder = Path(output) / f"{record.dataset.name}-{slug}-{moment}-{digest}"
    write_atomic(folder / "config.yaml", yaml.safe_dump(options, sort_keys=False))
    page = grid(pixels[:64], columns=8, scale=enlargement(pixels.shape[-1]))
    save_png(page, (folder / "samples" / file).with_suffix(".png"))
    show_result(Entry(write_record(record, folder / "records"), record), terminal(SHORT))


def measure(
    images: Tensor,
    data: ImageDataModule,
    protocol: Protocol,
    weights: Weights = (None, None, None),
    fad_dir: str | None = None,
    draft: bool = False,
    device: torch.device | str = "cpu",
) -> Measurement:
    """Measures images under a protocol.

    Args:
        images: uint8 `(N, C, H, W)` at the size at which the protocol compares the dataset.
        data: Real images, in the protocol's geometry (`make_protocol_data`).
        protocol: How images are compared.
        weights: Local files of the 2015 Inception network, torchvision's Inception and a small extractor, or None.
        fad_dir: Folder of the published autoencoders.
        draft: Whether the images may be fewer than the protocol asks for.
        device: Device of the extractors.

    Raises:
        ValueError: If the images are of another type or size, or deviate from the protocol and this is not a draft.
    """
    expected = (data.num_channels, data.compared_size, data.compared_size)
    if images.dtype != torch.uint8 or images.shape[1:] != expected:
        raise ValueError(
            f"the images are {images.dtype} of shape {tuple(images.shape)}, but {protocol.name} compares {data.name} "
            f"as bytes (torch.uint8) of shape (N, {', '.join(map(str, expected))})"
        )
    sizes = (data.native_size, data.compared_size, len(images), protocol.sample_seed)
    deviations = protocol.deviations(data.name, *sizes) + weight_deviations(protocol, weights)
    if protocol.quantisation == "none":
        deviations.append("it compares images that are not rounded to bytes, as files contain them")
    if deviations and not draft:
        raise ValueError(
            f"this is not the protocol {protocol.name!r}: {'; '.join(deviations)}. Follow it, or add --draft"
        )
    data.prepare_data()
    parts = [part.to(device) for part in build_parts(protocol, data, weights, fad_dir)]
    prepare_reference(parts, data, protocol, torch.device(device))
    indices = torch.arange(len(images))
    batches = list(zip(images.split(BATCH), indices.split(BATCH), strict=True))
    for batch, index in track(batches, "images", transient=True, disable=not Console().is_terminal):
        for part in parts:
            part.update_generated(batch.to(device), index)
    metrics = {key: value for part in parts for key, value in part.compute().items()}
    return Measurement(metrics, extractor_of(parts))


def read_images(path: Path, channels: int) -> tuple[Tensor, str]:
    """Reads images in order: of a folder by their paths, with numbers in names sorted as numbers.

    Args:
        path: Folder of image files, or a file *.npz or *.npy with bytes `(N, H, W, C)` or `(N, H, W)`.
        channels: 1 for grey, 3 for colour; images of equal channels become grey, and grey ones colour.

    Returns:
        The images, uint8 `(N, C, H, W)`, and a description of their source.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If there are no images, they differ in size, or cannot be converted without loss.
    """
    if path.is_dir():
        return _read_folder(path, channels)
    if not path.is_file():
        raise FileNotFoundError(f"--images {path} does not exist; give a folder of images, or a file *.npz or *.npy")
    return _from_array(_read_array(path), path, channels), f"{path.suffix} file {path}"


def _read_folder(folder: Path, channels: int) -> tuple[Tensor, str]:
    found, notes = list_files(folder)
    files = sorted(filter(is_image, found), key=lambda file: natural_order(str(file.relative_to(folder))))
    notes += left_out([file for file in found if not is_image(file)])
    if not files:
        ignored = f" ({', '.join(notes)})" if notes else ""
        raise ValueError(f"--images {folder} has no images{ignored}; give a folder of image files")
    if notes:
        print(f"left out of {folder}: {', '.join(notes)}")
    images: NDArray[np.uint8] | None = None
    for k, file in enumerate(track(files, "reading", transient=True, disable=not Console().is_terminal)):
        image = to_array(decode(open_image(file.read_bytes(), str(file)), "L" if channels == 1 else "RGB", str(file)))
        if images is None:
            images = np.empty((len(files), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise ValueError(
                f"{file} has {image.shape[2]}x{image.shape[1]} pixels, but {files[0]} has "
                f"{images.shape[3]}x{images.shape[2]}; all images must have the same size"
            )
        images[k] = image
    assert images is not None
    suffixes = Counter(file.suffix.lower() for file in files)
    if lossy := [suffix for suffix in suffixes if suffix in LOSSY]:
        warnings.warn(
            f"{' and '.join(lossy)} files are compressed with loss, which changes every metric; write PNG or arrays",
            stacklevel=2,
        )
    kinds = " and ".join(f"{count:,} {suffix}" for suffix, count in sorted(suffixes.items()))
    return torch.from_numpy(images), f"{kinds} files in {folder}"


def _read_array(path: Path) -> NDArray[Any]:
    if path.suffix not in (".npz", ".npy"):
        raise ValueError(f"--images {path} is neither a folder nor a file *.npz or *.npy; give one of these")
    try:
        content = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            if "arr_0" in content.files:
                return np.asarray(content["arr_0"])
            names = content.files
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"--images {path} cannot be read as an array ({error}); write it again") from error
    raise ValueError(
        f"--images {path} has the arrays {named(names) or '(none)'}, expected arr_0: numpy.savez(FILE, images)"
    )


def _from_array(array: NDArray[Any], path: Path, channels: int) -> Tensor:
    if array.dtype != np.uint8:
        raise ValueError(
            f"--images {path} has the type {array.dtype}, expected bytes (uint8) from 0 to 255; for x in [-1, 1]: "
            "((x + 1) * 127.5).round().clip(0, 255).astype('uint8')"
        )
    array = array[..., None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[3] not in (1, 3) or not array.size:
        raise ValueError(
            f"--images {path} has the shape {array.shape}, expected (N, H, W, C) with C = 1 or 3, or (N, H, W); "
            "(N, C, H, W) becomes it by array.transpose(0, 2, 3, 1)"
        )
    if array.max() == 1:
        raise ValueError(
            f"--images {path} has only the values 0 and 1, expected bytes from 0 to 255; for x in [0, 1]: "
            "(x * 255).round().astype('uint8')"
        )
    if array.shape[3] == 3 and channels == 1:
        coloured = (array != array[..., :1]).any((1, 2, 3))
        if coloured.any():
            raise ValueError(
                f"--images {path}: image {int(coloured.argmax())} has colours, but the dataset is grey; convert the "
                "images to grey first"
            )
    array = np.broadcast_to(array[..., :channels], (*array.shape[:3], channels))
    return torch.from_numpy(np.array(array.transpose(0, 3, 1, 2), order="C"))


def read_cost(path: Path) -> StatedCost:
    """Reads the cost that authors state.

    Raises:
        ValueError: If the file is not a JSON object of `StatedCost`, or a number is out of range.
    """
    try:
        stated = from_json(StatedCost, json.loads(path.read_text(encoding="utf-8")))
        for field, value in vars(stated).items():
            least = 1 if field in ("parameters", "nfe", "num_steps") else 0
            if isinstance(value, int | float) and value < least:
                raise SchemaError(f"{field}: expected {least} or more, found {value:g}")
        if (stated.firing_rate or 0) > 1:
            raise SchemaError(f"firing_rate: expected a share from 0 to 1, found {stated.firing_rate}")
        if not stated.macs + stated.sops:
            raise SchemaError("macs, sops: both are 0, but every generator has operations")
        if stated.acs is not None and stated.acs < stated.sops:
            raise SchemaError(f"acs: {stated.acs:g}, fewer than the {stated.sops:g} sops they include")
    except SchemaError as error:
        raise ValueError(f"--cost {path}: field {error}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"--cost {path} is not a readable JSON file ({error})") from error
    return stated


def fingerprint(images: Tensor) -> str:
    """Returns the SHA-256 of shape and pixels of images `(N, C, H, W)` in order, the same for every file format."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    for batch in images.split(BATCH):
        digest.update(batch.contiguous().numpy().tobytes())
    return digest.hexdigest()


def count_copies(images: Tensor) -> int:
    """Returns how many images `(N, C, H, W)` repeat an earlier one exactly."""
    return len(images) - len({hashlib.sha256(image.numpy().tobytes()).digest() for image in images})
