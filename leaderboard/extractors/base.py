"""Feature extractors of the metrics: the 2015 Inception network, and the suite's own small one for each dataset."""

from __future__ import annotations

import json
import math
import shlex
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.error import URLError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from datamodules import ImageDataModule
from leaderboard.files import file_sha256
from leaderboard.protocols import AUTOENCODER, INCEPTION, SUITE
from systems.ops.precision import full_precision

EXTRACTORS = Path(__file__).parent / "weights"
"""Folder of the shipped weights, `<dataset>.safetensors`."""

DENOISING = "denoising"
"""Task of the autoencoders, whose files are `<dataset>_ae.safetensors`."""

METADATA_KEY = "extractor"
"""Key of the JSON metadata in a weights file: dataset, architecture, test accuracy and training command."""


class Extractor(nn.Module, ABC):
    """A fixed network from uint8 images to features and class logits, computed in full precision.

    Args:
        name: Name in metric keys and records.
        num_features: Width `D` of the features.
        num_classes: Width `K` of the logits.
        sha256: SHA-256 of the weights file.
    """

    dtypes: tuple[torch.dtype, ...] = (torch.uint8,)
    """Accepted image dtypes; floats are in [0, 255]."""

    def __init__(self, name: str, num_features: int, num_classes: int, sha256: str) -> None:
        super().__init__()
        self.name, self.num_features, self.num_classes, self.sha256 = name, num_features, num_classes, sha256

    def trained_on_other_data(self, fingerprint: str) -> str:
        """Returns a warning if the extractor should have been trained on the reference data but was not, else "".

        Always empty for extractors that do not depend on the dataset, such as Inception.

        Args:
            fingerprint: Fingerprint of the reference data.
        """
        return ""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features `(B, D)` and logits `(B, K)` of uint8 images `(B, C, H, W)`.

        Raises:
            ValueError: If the images have another dtype than `dtypes`, or another shape.
        """
        if images.dtype not in self.dtypes or images.dim() != 4:
            raise ValueError(
                f"extractor {self.name!r} got {images.dtype} images of shape {tuple(images.shape)}; it expects "
                "uint8 (B, C, H, W), so quantise the samples first"
            )
        with torch.no_grad(), full_precision(images.device.type):
            return self.extract(images)

    @abstractmethod
    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Computes features and logits of checked images."""


class InceptionExtractor(Extractor):
    """torch-fidelity's `inception-v3-compat` with its own resize to 299x299; grey images are replicated to 3 channels.

    Its logits omit the bias of the last layer, as in the original Inception score (https://arxiv.org/abs/1606.03498).

    Args:
        weights_path: Local file of weights; downloaded once into torch's hub folder if not given.

    Raises:
        FileNotFoundError: If the file does not exist.
        RuntimeError: If the download fails.
    """

    def __init__(self, weights_path: str | None = None) -> None:
        path, sha256 = published_weights(weights_path, URL_INCEPTION_V3, "inception_weights")
        super().__init__(INCEPTION, num_features=2048, num_classes=1008, sha256=sha256)
        self.network = FeatureExtractorInceptionV3(
            INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Computes pooled features and unbiased logits.

        Raises:
            ValueError: If the images have neither 1 nor 3 channels.
        """
        if images.shape[1] not in (1, 3):
            raise ValueError(f"Inception expects images of 1 or 3 channels, found shape {tuple(images.shape)}")
        features, logits = self.network(images.expand(-1, 3, -1, -1))
        return features, logits


class SmallNetwork(nn.Module):
    """Classifier of small images: four 3x3 convolutions, of which three have stride 2, and global average pooling.

    Args:
        in_channels: Channels `C` of the images.
        num_classes: Number of classes `K`.
        channels: Output channels of each convolution, multiples of 8; the last is the width `D` of the features.
    """

    def __init__(self, in_channels: int, num_classes: int, channels: Sequence[int] = (32, 64, 96, 64)) -> None:
        super().__init__()
        sizes = list(zip((in_channels, *channels), channels, (1, 2, 2, 2), strict=False))
        self.convs = nn.ModuleList(nn.Conv2d(c_in, c_out, 3, stride, padding=1) for c_in, c_out, stride in sizes)
        self.norms = nn.ModuleList(nn.GroupNorm(8, c_out) for _, c_out, _ in sizes)
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features `(B, D)` and logits `(B, K)` of uint8 images `(B, C, H, W)`."""
        x = images.to(self.head.weight.dtype) / 127.5 - 1
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        features = x.mean((2, 3))  # (B, D, H/8, W/8) to (B, D)
        return features, self.head(features)


class DenoisingEncoder(nn.Module):
    """Encoder of a denoising autoencoder: 3x3 convolutions down to 4x4 pixels and a linear map to the features.

    Unlike pooled features, these depend on where things are in the image.

    Args:
        in_channels: Channels `C` of the images.
        size: Side length of the images in pixels, at least 8.
        channels: Output channels of each convolution, multiples of 8. The last ones have stride 2, as many as it takes.
        num_features: Width `D` of the features.
    """

    def __init__(
        self, in_channels: int, size: int, channels: Sequence[int] = (16, 32, 64), num_features: int = 64
    ) -> None:
        super().__init__()
        self.sizes = [size]  # side length of the images and behind each convolution
        halvings = round(math.log2(size / 4))
        self.strides = [1 if i < len(channels) - halvings else 2 for i in range(len(channels))]
        for stride in self.strides:
            self.sizes.append(-(-self.sizes[-1] // stride))
        self.channels = (in_channels, *channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, stride, padding=1)
            for c_in, c_out, stride in zip(self.channels, channels, self.strides, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, c_out) for c_out in channels)
        self.head = nn.Linear(channels[-1] * self.sizes[-1] ** 2, num_features)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features `(B, D)` of images `(B, C, size, size)` in [0, 255], and no logits, `(B, 0)`."""
        x = images.to(self.head.weight.dtype) / 127.5 - 1
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        features = self.head(x.flatten(1))
        return features, features[:, :0]


class SmallExtractor(Extractor):
    """The suite's own extractor of one dataset, for evaluation without downloads.

    Args:
        weights_path: File written by `python -m benchmark train-extractor`; its metadata contain the architecture.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file was not written by that command.
    """

    def __init__(self, weights_path: str | Path) -> None:
        path = Path(weights_path)
        if not path.is_file():
            raise FileNotFoundError(f"extractor {path} is not a file; create it with: {training_command(path.stem)}")
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata: dict[str, Any] = json.loads((file.metadata() or {})[METADATA_KEY])
                state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a dictionary)
            sizes, dataset = self.metadata["architecture"], self.metadata["dataset"]
            is_encoder = self.metadata.get("task") == DENOISING
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} is not an extractor of the suite ({error}); use a file from: {training_command('<dataset>')}"
            ) from error
        network = DenoisingEncoder(**sizes) if is_encoder else SmallNetwork(**sizes)
        network.load_state_dict(state)
        width = network.head.out_features if is_encoder else network.head.in_features
        name = f"{dataset}_ae" if is_encoder else dataset
        super().__init__(name, width, 0 if is_encoder else sizes["num_classes"], file_sha256(path))
        self.in_channels: int = sizes["in_channels"]
        self.size: int | None = sizes.get("size")
        self.network = network
        self.requires_grad_(False)
        self.eval()

    def trained_on_other_data(self, fingerprint: str) -> str:
        """Returns a warning that names the training data if its fingerprint is another one, else ""."""
        trained = str(self.metadata.get("dataset_fingerprint", "unknown"))
        if trained == fingerprint:
            return ""
        words = self.metadata.get("trained_on", f"other data of {self.name}")
        return f"extractor trained on other data than the reference: {words} (fingerprint {trained[:12]})"

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Computes features and logits.

        Raises:
            ValueError: If the number of channels differs from the training data, or images are smaller than 8x8, or
                have another size than an autoencoder was trained on.
        """
        fits = min(images.shape[2:]) >= 8 if self.size is None else images.shape[2:] == (self.size, self.size)
        if images.shape[1] != self.in_channels or not fits:
            size = "at least 8x8" if self.size is None else f"{self.size}x{self.size}"
            raise ValueError(
                f"extractor {self.name!r} got images of shape {tuple(images.shape)}; it expects {self.in_channels} "
                f"channel(s) of {size}, so choose the extractor of this dataset"
            )
        features, logits = self.network(images)
        return features, logits


def load_extractor(name_or_path: str, dataset: str, inception_weights: str | None = None) -> Extractor:
    """Loads an extractor.

    Args:
        name_or_path: `"inception-v3-compat"`, `"suite"`, `"suite-autoencoder"`, or a file written by `train-extractor`.
        dataset: Dataset of the shipped extractor that `"suite"` or `"suite-autoencoder"` selects.
        inception_weights: Local file of the Inception weights; downloaded if not given.

    Raises:
        FileNotFoundError: If the weights do not exist; the message says how to get them.
        RuntimeError: If the Inception weights cannot be downloaded.
    """
    if name_or_path == INCEPTION:
        return InceptionExtractor(inception_weights)
    if name_or_path not in (SUITE, AUTOENCODER):
        return SmallExtractor(name_or_path)
    task = DENOISING if name_or_path == AUTOENCODER else ""
    path = shipped_extractor(dataset, task)
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in EXTRACTORS.glob("*.safetensors"))) or "none"
        raise FileNotFoundError(
            f"the suite has no extractor for {dataset!r} (it has: {shipped}); create it with: "
            f"{training_command(dataset)}{f' --task {task}' * bool(task)}"
        )
    return SmallExtractor(path)


def shipped_extractor(dataset: str, task: str = "") -> Path:
    """Returns the file of a shipped extractor; every task but `"denoising"` has the same."""
    return EXTRACTORS / f"{dataset}{'_ae' * (task == DENOISING)}.safetensors"


def replaced_extractor(path: str | Path) -> str:
    """Returns the placeholder whose shipped extractor a file replaces: `"suite"` or `"suite-autoencoder"`."""
    return AUTOENCODER if SmallExtractor(path).metadata.get("task") == DENOISING else SUITE


def training_command(data: str, options: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Returns the command line that trains an extractor.

    Args:
        data: Name or class path of the dataset.
        options: Options of its data module; `root` has an option of its own.
    """
    words = ["python", "-m", "benchmark", "train-extractor", data]
    others = {name: value for name, value in options.items() if name != "root"}
    words += ["--root", str(options["root"])] if options.get("root") is not None else []
    words += ["--data_options", json.dumps(others, default=str)] if others else []
    return shlex.join(words) if options else " ".join(words)


def local_extractor(data: ImageDataModule, task: str = "") -> Path:
    """Returns the file in which `train-extractor` stores the extractor of a dataset that the suite ships none for.

    Args:
        data: The dataset.
        task: What the extractor learns; every task but `"denoising"` has the same file.
    """
    name = f"extractor-{data.name}-{data.compared_size}px-{data.fingerprint[:16]}"
    return data.cache_dir / f"{name}{'-ae' * (task == DENOISING)}.safetensors"


def published_weights(given: str | None, url: str, option: str) -> tuple[Path, str]:
    """Returns a file of published weights and its SHA-256, with a warning if it is not the published file.

    Args:
        given: Local copy; downloaded once into torch's hub folder if not given.
        url: Address of the file, whose name ends with the first digits of its SHA-256.
        option: Option of the evaluation that sets a local copy.

    Raises:
        FileNotFoundError: If the local copy does not exist.
        RuntimeError: If the download fails.
    """
    path = Path(given) if given is not None else _download(url, option)
    if not path.is_file():
        raise FileNotFoundError(f"{option}={given} is not a file; set it to the path of a copy of {url}")
    sha256, expected = file_sha256(path), _url_hash(url)
    if not sha256.startswith(expected):
        warnings.warn(
            f"{path} is not the published Inception file (SHA-256 {sha256[:8]}, expected {expected}): its distances "
            "cannot be compared with others",
            stacklevel=3,
        )
    return path, sha256


def _url_hash(url: str) -> str:
    """Returns the first digits of the SHA-256 in the file name."""
    return Path(url).stem.split("-")[-1]


def _download(url: str, option: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=_url_hash(url), progress=False)
        except (URLError, OSError, RuntimeError) as error:
            raise RuntimeError(
                f"cannot download the Inception weights ({error}). Fetch {url} elsewhere and set its path with "
                f"--evaluation.{option} PATH, or evaluate with the suite's own extractor under the protocol offline-v3"
            ) from error
    return path
