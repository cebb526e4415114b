"""Reference statistics of the real images, cached on disk; they depend on dataset, protocol and network.

A file contains the sums and features of one view. Its key names everything they depend on and its checksum covers every
byte, so another dataset, protocol or network never uses it, and a damaged file is replaced.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
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
from datamodules.registry import find_data, make_data
from leaderboard.extractors.base import DENOISING, local_extractor, replaced_extractor, shipped_extractor
from leaderboard.extractors.inception import view_extractor
from leaderboard.extractors.train import RECIPES, data_command
from leaderboard.files import canonical_sha256, file_sha256, write_atomic
from leaderboard.metrics.fad import FrechetAutoencoderDistance
from leaderboard.metrics.generation import GenerationMetrics
from leaderboard.protocols import AUTOENCODER, INCEPTION, PROTOCOLS, SUITE, TORCHVISION, Protocol, ProtocolName, View

VERSION = 1
"""Version of the file format; files of another version are not used."""


Weights = tuple[str | None, str | None, str | None]
"""Local files of the 2015 Inception network, torchvision's Inception and a small extractor, or None."""


class Part(Interface):
    """Metrics that share one network and need reference statistics."""

    identity: str
    """Name and hash of the network, part of the cache key."""

    def reference_metrics(self) -> Mapping[str, Metric]:
        """Returns the metrics with reference statistics by name; empty if there are none."""

    def update_reference(self, images: Tensor, indices: Tensor) -> None:
        """Adds real images, uint8 `(B, C, H, W)`, with their indices `(B,)` in the reference."""


def reference(
    data: str = "",
    protocol: ProtocolName = "standard-v3",
    config: str | None = None,
    root: str | None = None,
    inception_weights: str | None = None,
    torchvision_weights: str | None = None,
    extractor: str | None = None,
    fad_dir: str | None = None,
    cache_dir: str | None = None,
    data_options: dict[str, Any] = {},  # noqa: B006 (never changed)
) -> None:
    """Precomputes the reference statistics of a dataset under a protocol; `test` computes them if they are missing.

    Args:
        data: Name of the dataset, such as mnist, or the path of a class, such as mypackage.data.Shapes.
        protocol: How images are compared.
        config: Config of a training or a run whose data is used, instead of `data`.
        root: Folder of the dataset; read from the Hugging Face hub if not given.
        inception_weights: Local file of the 2015 Inception weights, where they cannot be downloaded.
        torchvision_weights: Local file of torchvision's Inception weights, where they cannot be downloaded.
        extractor: File of another small extractor made by `train-extractor`, in place of the shipped one of its kind.
        fad_dir: Folder of the published autoencoders.
        cache_dir: Folder of decoded images and reference statistics; the same as for `test` if not given.
        data_options: Further options of the data module, such as '{center_crop: null}'.

    Raises:
        ValueError: If the dataset is unknown, or the protocol is not defined for it.
    """
    chosen = PROTOCOLS[protocol]
    given = {"root": root, "cache_dir": cache_dir}
    name, options = find_data(data, config, {k: v for k, v in given.items() if v is not None} | data_options)
    module = make_protocol_data(name, options, chosen)
    if deviations := chosen.deviations(module.name, module.native_size, module.compared_size, chosen.num_samples, 0):
        raise ValueError(f"{protocol} cannot be prepared: {'; '.join(deviations)}")
    module.prepare_data()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = (inception_weights, torchvision_weights, extractor)
    parts = build_parts(chosen, module, weights, fad_dir, options=options)
    prepare_reference([part.to(device) for part in parts], module, chosen, device)


def make_protocol_data(name: str, options: Mapping[str, Any], protocol: Protocol) -> ImageDataModule:
    """Builds a data module in the geometry of a protocol.

    Args:
        name: Name of the dataset or path of a class (see `find_data`).
        options: Options of the data module.
        protocol: How images are compared.

    Raises:
        ValueError: If the dataset is unknown, or does not accept an option.
    """
    module = make_data(name, options)
    size = protocol.size.get(module.name, module.native_size)
    if size == module.compared_size:
        return module
    geometry = {"image_size": size} | ({} if size == module.native_size else {"fit": "resize"})
    return make_data(name, {**options, **geometry})


def weight_deviations(protocol: Protocol, weights: Weights) -> list[str]:
    """Describes each file of weights that is not the protocol's.

    Raises:
        ValueError: If a small extractor is given, but the protocol has its own.
    """
    expected = {view.extractor: view.weights for view in protocol.views}
    inception, torchvision, suite = weights
    if suite is not None and not {SUITE, AUTOENCODER} & set(expected):
        raise ValueError(f"{protocol.name} has its own extractor; leave out --evaluation.extractor")
    found = []
    for extractor, file in ((INCEPTION, inception), (TORCHVISION, torchvision)):
        if extractor in expected and file is not None and Path(file).is_file():
            sha256 = file_sha256(Path(file))
            if not sha256.startswith(expected[extractor]):
                found.append(
                    f"its weights of {extractor} have the SHA-256 {expected[extractor]}..., not {sha256[:8]}..."
                )
    return found


def build_parts(
    protocol: Protocol,
    data: ImageDataModule,
    weights: Weights,
    fad_dir: str | None,
    is_first_process: bool = True,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> list[GenerationMetrics | FrechetAutoencoderDistance]:
    """Returns the metrics of an evaluation: one part for each view, and one for the Fréchet autoencoder distance.

    Args:
        protocol: How images are compared.
        data: Real images.
        weights: Local files of the 2015 Inception network, torchvision's Inception and a small extractor, or None.
        fad_dir: Folder of the published autoencoders.
        is_first_process: Whether this is the first of the processes.
        options: Options of the data module, for the advice of errors.

    Raises:
        FileNotFoundError: If there is no extractor for the dataset; the message contains the command that trains it.
        ValueError: If `fad_dir` is given but the protocol has no Fréchet autoencoder distance, or an extractor that it
            does not use.
    """
    groups, total = protocol.jackknife_groups, num_reference(data, protocol)
    if fad_dir is not None and not protocol.fad:
        raise ValueError(f"{protocol.name} measures no Fréchet autoencoder distance; leave out --evaluation.fad_dir")
    parts: list[GenerationMetrics | FrechetAutoencoderDistance] = []
    inception, torchvision, extractor_file = weights
    replaced = None if extractor_file is None else replaced_extractor(extractor_file)
    views = [view for view in protocol.views if view.metrics_for(data.name)]
    if replaced is not None and replaced not in {view.extractor for view in views}:
        raise ValueError(
            f"{extractor_file} is {'an autoencoder' if replaced == AUTOENCODER else 'a classifier'}, which "
            f"{protocol.name} does not use on {data.name}; leave out --evaluation.extractor, or make another one with "
            "train-extractor --task"
        )
    for view in views:
        file = extractor_file if view.extractor == replaced else _own_extractor(data, view, options)
        extractor = view_extractor(view, data.name, inception, torchvision, file)
        if note := extractor.trained_on_other_data(data.fingerprint):
            warnings.warn(note, stacklevel=2)
        part = GenerationMetrics(
            extractor, view.metrics_for(data.name), total, groups, view.kept_images, note, protocol.reference_seed
        )
        part.identity = f"{extractor.name} {extractor.sha256} {view.input}"
        parts.append(part)
    if fad_dir is not None:
        parts.append(FrechetAutoencoderDistance(data.name, fad_dir, groups, is_first_process, protocol.fad))
    return parts


def _own_extractor(data: ImageDataModule, view: View, options: Mapping[str, Any]) -> str | None:
    """Returns the file of an extractor that was trained here; None if the view has another, or the suite ships one.

    Raises:
        FileNotFoundError: If there is neither.
    """
    task = DENOISING if view.extractor == AUTOENCODER else ""
    if view.extractor not in (SUITE, AUTOENCODER) or shipped_extractor(data.name, task).is_file():
        return None
    path = local_extractor(data, task)
    if not path.is_file():
        task = task or ("" if data.name in RECIPES else "rotation")  # labels are not needed
        raise FileNotFoundError(
            f"the suite has no extractor for {data.name!r}; train it once, then repeat this command:\n"
            f"  {data_command(data, options)}{f' --task {task}' * bool(task)}"
        )
    return str(path)


def num_reference(data: ImageDataModule, protocol: Protocol) -> int:
    """Returns the number of real images in the reference of a protocol."""
    available = data.num_reference(cast(Split, protocol.reference_split(data.name)))
    return min(available, protocol.reference.images or available)


def reference_batches(data: ImageDataModule, protocol: Protocol) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the real images of a protocol, uint8 `(B, C, H, W)`, with their indices `(B,)` in the reference."""
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
    """Sets the reference statistics of every part, from the cache or by computing and caching them.

    Args:
        parts: Metrics of the evaluation.
        data: Real images.
        protocol: How images are compared.
        device: Device of the parts.
        rank: Rank of this process.
        world: Number of processes, which take batches in turn.
        broadcast: Returns the first process's argument on every process.
    """
    missing: list[tuple[Part, Path, str]] = []
    for part in (part for part in parts if part.reference_metrics()):
        path, key = _cache_file(part, data, protocol)
        cached = _read(path, key, part) if rank == 0 else None
        if not broadcast(cached is not None):
            missing.append((part, path, key))
        elif cached is not None:
            for name, state in _states(part).items():
                state.copy_(cached[name])
            _print(f"reference: {path.name}")
    if not missing:
        return
    batches = reference_batches(data, protocol)
    progress = track(batches, "reference images", total=None, transient=True, disable=not Console().is_terminal)
    for i, (images, indices) in enumerate(progress):
        if i % world == rank:
            for part, _, _ in missing:
                part.update_reference(images.to(device), indices)
    for part, path, key in missing:
        _write(part, path, key, rank)


def _cache_file(part: Part, data: ImageDataModule, protocol: Protocol) -> tuple[Path, str]:
    """Returns the cache file of a part, and the key that the file must contain."""
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
    """Returns the reference statistics of a part by name."""
    return {
        f"{name}.{state}": cast(Tensor, value)
        for name, metric in part.reference_metrics().items()
        for state, value in metric.metric_state.items()
        if state.startswith("reference_")
    }


def _write(part: Part, path: Path, key: str, rank: int) -> None:
    """Writes the reference statistics of all processes together; a collective call."""
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
            f"the reference statistics cannot be written to {path} ({error}), so the next test computes them again; "
            "set another folder with --data.cache_dir",
            stacklevel=2,
        )
    else:
        _print(f"reference: {path.name} (new)")


def _read(path: Path, key: str, part: Part) -> dict[str, Tensor] | None:
    """Returns the statistics in a file; None if it does not exist, is damaged or has another key."""
    if not path.exists():
        return None
    expected = {name: (state.dtype, state.shape) for name, state in _states(part).items()}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        if metadata["key"] != key:
            raise ValueError("it belongs to another dataset, protocol or network")
        if {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} != expected:
            raise ValueError("it contains other arrays")
        if metadata["sha256"] != _digest(tensors):
            raise ValueError("its content does not match its checksum")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        warnings.warn(f"{path} is damaged ({error}); the reference statistics are computed again", stacklevel=2)
        return None
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}:".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _print(line: str) -> None:
    Console().print(line, soft_wrap=True, highlight=False, markup=False)
