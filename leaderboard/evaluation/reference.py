"""What is measured of the real images, kept on disk: it depends on dataset, protocol and network, and on no method.

A file holds the sums and features of one view. Its key names all that they depend on and its checksum covers every
byte, so that another dataset, protocol or network never finds it and a damaged file is measured again.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast
from typing import Protocol as Interface

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torchmetrics import Metric

from datamodules import ImageDataModule
from datamodules.base import Split
from datamodules.registry import data_module, make_data
from leaderboard.extractors.inception import view_extractor
from leaderboard.files import canonical_sha256, write_atomic
from leaderboard.metrics.fad import FrechetAutoencoderDistance
from leaderboard.metrics.generation import GenerationMetrics
from leaderboard.protocols import PROTOCOLS, Protocol, ProtocolName

VERSION = 1
"""Number that changes with the meaning of what is kept."""


class Part(Interface):
    """Something that is measured of real images."""

    identity: str
    """What it depends on besides images and protocol: its network."""

    def reference_metrics(self) -> Mapping[str, Metric]:
        """Returns the metrics that hold something of the real images, by name; none if it does without."""

    def update_reference(self, images: Tensor, indices: Tensor) -> None:
        """Adds real images, uint8 `(B, C, H, W)`, with their places `(B,)`."""


def reference(
    data: str = "",
    protocol: ProtocolName = "standard-v1",
    root: str | None = None,
    inception_weights: str | None = None,
    torchvision_weights: str | None = None,
    extractor: str | None = None,
    fad_dir: str | None = None,
    cache_dir: str | None = None,
    data_options: dict[str, Any] = {},  # noqa: B006 (never changed)
) -> None:
    """Measures the real images of a dataset once and for all tests under a protocol, which does so itself if need be.

    Args:
        data: Name of the dataset, such as mnist, without which there is nothing to do.
        protocol: How images are compared.
        root: Folder of the dataset; none reads the Hugging Face hub.
        inception_weights: Local file of the 2015 Inception weights, where they cannot be downloaded.
        torchvision_weights: Local file of torchvision's Inception weights, where they cannot be downloaded.
        extractor: File of another small extractor made by `train-extractor`, for offline-v1.
        fad_dir: Folder of the published autoencoders.
        cache_dir: Folder of decoded images and of these files; the same as for `test` if not given.
        data_options: Further options of the data module, such as '{center_crop: null}'.

    Raises:
        ValueError: If there is no such dataset, or the protocol is not defined for it.
    """
    chosen = PROTOCOLS[protocol]
    kind = data_module(data)
    options = {"root": root, "cache_dir": cache_dir, **data_options}
    size = chosen.size.get(kind.name, kind.native_size)
    if size != kind.native_size:
        options |= {"image_size": size, "fit": "resize"}
    module = make_data(data, {k: value for k, value in options.items() if value is not None or k in data_options})
    if deviations := chosen.deviations(module.name, kind.native_size, module.compared_size, chosen.num_samples, 0):
        raise ValueError(f"{protocol} cannot be prepared: {'; '.join(deviations)}")
    module.prepare_data()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = (inception_weights, torchvision_weights, extractor)
    parts = build_parts(chosen, module, weights, fad_dir)
    prepare_reference([part.to(device) for part in parts], module, chosen, device)


def build_parts(
    protocol: Protocol,
    data: ImageDataModule,
    weights: tuple[str | None, str | None, str | None],
    fad_dir: str | None,
    is_first_process: bool = True,
) -> list[GenerationMetrics | FrechetAutoencoderDistance]:
    """Returns everything that an evaluation measures images with: one part for each view, and the autoencoder's.

    Args:
        protocol: How images are compared.
        data: Real images.
        weights: Files of the 2015 Inception, of torchvision's, and of a small extractor, each possibly none.
        fad_dir: Folder of the published autoencoders.
        is_first_process: Whether this process is the first of several.

    Raises:
        ValueError: If an option is given that the protocol has no use for.
    """
    groups, total = protocol.jackknife_groups, num_reference(data, protocol)
    if fad_dir is not None and not protocol.fad:
        raise ValueError(f"{protocol.name} measures no Fréchet autoencoder distance; leave out --evaluation.fad_dir")
    parts: list[GenerationMetrics | FrechetAutoencoderDistance] = []
    for view in protocol.views:
        extractor = view_extractor(view, data.name, *weights)
        if note := extractor.foreign_to(data.fingerprint):
            warnings.warn(note, stacklevel=2)
        part = GenerationMetrics(extractor, view.metrics_for(data.name), total, groups, view.kept_images, note)
        part.identity = f"{extractor.name} {extractor.sha256} {view.input}"
        parts += [part] if part.metrics else []
    if fad_dir is not None:
        parts.append(FrechetAutoencoderDistance(data.name, fad_dir, groups, is_first_process, protocol.fad))
    return parts


def num_reference(data: ImageDataModule, protocol: Protocol) -> int:
    """Number of real images that a protocol compares with."""
    available = data.num_reference(cast(Split, protocol.reference_split(data.name)))
    return min(available, protocol.reference.images or available)


def reference_batches(data: ImageDataModule, protocol: Protocol) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the real images of a protocol, uint8 `(b, C, H, W)`, with their places `(b,)`."""
    total, start = num_reference(data, protocol), 0
    seed = protocol.reference.mirrored.get(data.name)
    mirrored = torch.zeros(total, dtype=torch.bool)
    if seed is not None:
        mirrored = torch.rand(total, generator=torch.Generator().manual_seed(seed)) < 0.5
    for batch in data.reference_batches(cast(Split, protocol.reference_split(data.name))):
        batch = batch[: total - start]
        indices = torch.arange(start, start + len(batch))
        yield torch.where(mirrored[indices][:, None, None, None], batch.flip(-1), batch), indices
        start += len(batch)
        if start == total:
            return
    raise AssertionError(f"the reference has {total} images but {start} were found")


def prepare_reference(
    parts: list[Any],
    data: ImageDataModule,
    protocol: Protocol,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    broadcast: Callable[[bool], bool] = bool,
) -> None:
    """Gives every part what it needs of the real images, from disk where it is there, and keeps what is measured.

    Args:
        parts: What images are measured with.
        data: Real images.
        protocol: How images are compared.
        device: Where the parts are.
        rank: Number of this process.
        world: Number of processes, each of which measures its share.
        broadcast: Tells every process what the first one says.
    """
    missing: list[tuple[Part, Path, str]] = []
    for part in (part for part in parts if part.reference_metrics()):
        path, key = _place(part, data, protocol)
        kept = _read(path, key, part) if rank == 0 else None
        if not broadcast(kept is not None):
            missing.append((part, path, key))
        elif kept is not None:
            for name, state in _states(part).items():
                state.copy_(kept[name])
            _tell(f"reference: {path.name}")
    if not missing:
        return
    batches = reference_batches(data, protocol)
    shown = track(batches, "reference images", total=None, transient=True, disable=not Console().is_terminal)
    for i, (images, indices) in enumerate(shown):
        if i % world == rank:
            for part, _, _ in missing:
                part.update_reference(images.to(device), indices)
    for part, path, key in missing:
        _keep(part, path, key, rank)


def _place(part: Part, data: ImageDataModule, protocol: Protocol) -> tuple[Path, str]:
    """Returns the file of a part, and the key that its content must have."""
    key = {
        "version": VERSION,
        "dataset": data.name,
        "fingerprint": data.fingerprint,
        "geometry": data.geometry,
        "protocol": protocol.sha256,
        "network": part.identity,
    }
    name = f"reference-{data.name}-{protocol.name}-{canonical_sha256(key)[:16]}.safetensors"
    return data.cache_dir / name, json.dumps(key, sort_keys=True)


def _states(part: Part) -> dict[str, Tensor]:
    """Returns what a part holds of the real images."""
    return {
        f"{name}.{state}": cast(Tensor, value)
        for name, metric in part.reference_metrics().items()
        for state, value in metric.metric_state.items()
        if state.startswith("reference_")
    }


def _keep(part: Part, path: Path, key: str, rank: int) -> None:
    """Writes what all processes hold of the real images together."""
    tensors: dict[str, Tensor] = {}
    for name, metric in part.reference_metrics().items():
        with metric.sync_context():
            own = {state: value for state, value in metric.metric_state.items() if state.startswith("reference_")}
            tensors |= {f"{name}.{state}": cast(Tensor, value).cpu().contiguous() for state, value in own.items()}
    if rank != 0:
        return
    try:
        write_atomic(path, save(tensors, {"key": key, "sha256": _digest(tensors)}))
    except OSError as error:
        warnings.warn(
            f"what was measured of the real images cannot be kept in {path} ({error}), so the next test measures it "
            "again; give another folder with --data.cache_dir",
            stacklevel=2,
        )
    else:
        _tell(f"reference: {path.name} (new)")


def _read(path: Path, key: str, part: Part) -> dict[str, Tensor] | None:
    """Returns the content of a file that is there, whole and of this key."""
    if not path.exists():
        return None
    expected = {name: (state.dtype, state.shape) for name, state in _states(part).items()}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
        if metadata["key"] != key:
            raise ValueError("it is of another dataset, protocol or network")
        if {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} != expected:
            raise ValueError("it holds other arrays")
        if metadata["sha256"] != _digest(tensors):
            raise ValueError("its content does not have its checksum")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        warnings.warn(f"{path} is damaged ({error}); the real images are measured again", stacklevel=2)
        return None
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}:".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _tell(line: str) -> None:
    Console().print(line, soft_wrap=True, highlight=False, markup=False)
