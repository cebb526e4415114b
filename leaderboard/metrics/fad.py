"""Fréchet autoencoder distance (FAD): the Fréchet distance in the latent space of a small autoencoder of each dataset.

H. Kamata, Y. Mukuta, T. Harada, "Fully Spiking Variational Autoencoder", AAAI 2022, https://arxiv.org/abs/2110.00375.
Autoencoders and statistics are published at https://github.com/kamata1729/FullySpikingVAE, folder `metrics` (MIT
licence): `stat_checkpoints/{mnist_64,fashion_64,cifar10_128,celeba_128}.pth` and `stats/<name>_test_<D>.npz`, where `D`
is the width of the latent vector. FSDDIM redistributes files of the same names (https://github.com/mil-tokyo/FSDDIM,
folder `fad`). `stats/mnist_test_128.npz` belongs to an autoencoder that the released code does not use.

The files of MNIST and Fashion-MNIST reproduce recorded values of the released code. The weights of CIFAR-10 and CelebA
have not been tested: their loading is tested with random weights of the published shapes.

There are two distances, which must not be mixed:

- `fad_published`, comparable with papers: batch norm uses the statistics of each batch of 250 images, as in the
  released code, and the reference is the distributed statistics of the test split. Shifts common to a whole set, such
  as its brightness, are normalised away.
- `fad_eval`, the sound one: batch norm in evaluation mode, and the protocol's own reference images. `fad_unbiased` is
  the same without the bias of few images (`leaderboard.metrics.streaming.FrechetDistance`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics import Metric, SumMetric

from datamodules.images import resize, to_array
from leaderboard.metrics.streaming import FrechetDistance
from leaderboard.record.records import MetricValue
from systems.checkpoints import load_checkpoint
from systems.ops.precision import full_precision

SOURCE = "https://github.com/kamata1729/FullySpikingVAE (folder metrics)"


@dataclass(frozen=True)
class Autoencoder:
    """A published autoencoder.

    Args:
        name: Name of the dataset in the published file names.
        num_features: Width `D` of the latent vector.
        channels: Image channels.
        depth: Convolutions of the encoder.
        test_images: Number of images of the test split, from which the published statistics were computed.
    """

    name: str
    num_features: int
    channels: int
    depth: int
    test_images: int


AUTOENCODERS = {
    "mnist": Autoencoder("mnist", 64, 1, 4, 10_000),
    "fmnist": Autoencoder("fashion", 64, 1, 4, 10_000),
    "cifar10": Autoencoder("cifar10", 128, 3, 4, 10_000),
    "celeba": Autoencoder("celeba", 128, 3, 5, 19_962),
}
"""Published autoencoders by dataset name of the suite."""

BATCH = 250
"""Number of images that share batch-norm statistics in `fad_published`."""


class FADEncoder(nn.Module):
    """Encoder of the autoencoder: 3x3 convolutions of stride 2 with batch norm, then a linear map to the latent vector.

    Training mode selects batch statistics, evaluation mode the stored ones, so the features depend on the mode.

    Args:
        in_channels: Channels of the images.
        num_features: Width `D` of the latent vector.
        depth: Number of convolutions; each halves the side length, down to 2x2 pixels.
    """

    def __init__(self, in_channels: int, num_features: int, depth: int = 4) -> None:
        super().__init__()
        self.size = 2 ** (depth + 1)  # side length of the images in pixels
        widths = (in_channels, *(32 * 2**level for level in range(depth)))
        self.encoder = nn.Sequential()
        for c_in, c_out in pairwise(widths):
            norm = nn.BatchNorm2d(c_out, momentum=0.0)  # training mode must not change the running statistics
            self.encoder.append(nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), norm, nn.LeakyReLU()))
        self.latent_layer = nn.Linear(4 * widths[-1], num_features)

    def forward(self, images: Tensor) -> Tensor:
        """Returns latent vectors `(B, D)` of images `(B, C, size, size)` in [-1, 1]."""
        features: Tensor = self.latent_layer(self.encoder(images).flatten(1))
        return features


def load_encoder(path: Path) -> FADEncoder:
    """Loads the encoder of a published autoencoder; only tensors are unpickled.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it does not contain such an autoencoder.
    """
    _require(path)
    try:
        state = load_checkpoint(path)
        depth = sum(key.startswith("encoder.") and key.endswith(".0.weight") for key in state)
        encoder = FADEncoder(state["encoder.0.0.weight"].shape[1], len(state["latent_layer.bias"]), depth)
        encoder.load_state_dict({k: v for k, v in state.items() if k.startswith(("encoder.", "latent_layer."))})
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not an autoencoder of the FAD ({reason}); fetch it again from {SOURCE}") from None
    return encoder.requires_grad_(False)


def to_encoder_input(images: Tensor, size: int = 32) -> Tensor:
    """Converts uint8 images `(B, C, H, W)` to float `(B, C, size, size)` in [-1, 1] (PIL, bilinear, 8 bits)."""
    if images.shape[-2:] != (size, size):
        pixels = images.cpu().movedim(1, -1).squeeze(-1).numpy()  # (B, H, W) or (B, H, W, 3)
        resized = [to_array(resize(Image.fromarray(image), size)) for image in pixels]
        images = torch.from_numpy(np.stack(resized)).to(images.device)
    return images.float() / 255 * 2 - 1


class FrechetAutoencoderDistance(nn.Module):
    """All FADs of one evaluation, updated in batches; memory does not grow with the number of images.

    Args:
        dataset: Name of the dataset, one of `AUTOENCODERS`.
        folder: Folder with `stat_checkpoints/` and `stats/` as published.
        num_groups: Groups of generated images for the jackknife error; image `k` belongs to group `k % num_groups`.
        is_first_process: Whether this process adds the published statistics; exactly one process must.
        keys: Which to compute: `"fad_published"`, `"fad_eval"`, `"fad_unbiased"`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the dataset has no published autoencoder, or a file has unexpected content.
    """

    def __init__(
        self,
        dataset: str,
        folder: str | Path,
        num_groups: int,
        is_first_process: bool = True,
        keys: tuple[str, ...] = ("fad_published", "fad_eval"),
    ) -> None:
        super().__init__()
        if dataset not in AUTOENCODERS:
            raise ValueError(
                f"{SOURCE} has no autoencoder of {dataset!r}, only of {', '.join(AUTOENCODERS)}; "
                "leave out --evaluation.fad_dir"
            )
        published = AUTOENCODERS[dataset]
        name = f"{published.name}_{published.num_features}.pth"
        path = Path(folder) / "stat_checkpoints" / name
        self.encoder = load_encoder(path)
        if (found := _shape(self.encoder)) != (published.channels, published.num_features, published.depth):
            raise ValueError(
                f"{path} has {found[0]} channels, {found[1]} features and {found[2]} convolutions; the autoencoder of "
                f"{dataset} has {published.channels}, {published.num_features} and {published.depth}"
            )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.identity, self.note, self.keys = f"fad {digest}", f"autoencoder {name} ({digest[:8]})", keys
        width = self.encoder.latent_layer.out_features
        self.published, self.own = FrechetDistance(width, num_groups), FrechetDistance(width, num_groups)
        statistics = Path(folder) / "stats" / f"{published.name}_test_{width}.npz"
        mean, covariance = _published_statistics(statistics, width)
        if is_first_process:
            add_reference_statistics(self.published, mean, covariance, published.test_images)
        self.generated_count = SumMetric()
        self._pending: list[tuple[Tensor, Tensor]] = []

    def reference_metrics(self) -> dict[str, Metric]:
        """Returns the metrics with reference statistics by name."""
        return {"own": self.own} if self._measures_own else {}

    def update_reference(self, images: Tensor, indices: Tensor) -> None:
        """Adds real images, uint8 `(B, C, H, W)`, with their indices `(B,)`, to the reference of `fad_eval`."""
        self.own.update(self.features(to_encoder_input(images, self.encoder.size), train=False), indices, real=True)

    def update_generated(self, images: Tensor, indices: Tensor) -> None:
        """Adds generated images, uint8 `(B, C, H, W)`, with their indices `(B,)`."""
        self.generated_count.update(len(images))
        x = to_encoder_input(images, self.encoder.size)
        if self._measures_own:
            self.own.update(self.features(x, train=False), indices, real=False)
        if "fad_published" in self.keys:
            self._pending.extend(zip(x, indices, strict=True))
        while len(self._pending) >= BATCH:
            self._finish_batch()

    def compute(self) -> dict[str, MetricValue]:
        """Returns the distances with their jackknife errors."""
        if self._pending:
            self._finish_batch()
        used = int(self.generated_count.compute())
        values = {}
        for key, distance, column, how in (
            ("fad_published", self.published, 0, f"batch statistics of {BATCH} images, distributed test statistics"),
            ("fad_eval", self.own, 0, "evaluation mode"),
            ("fad_unbiased", self.own, 2, "evaluation mode, bias of few images removed"),
        ):
            if key not in self.keys:
                continue
            estimates = distance.compute()[0].tolist()
            width = distance.num_features
            singular = f"; singular covariance: only {used} generated images for {width} features" * (used <= width)
            values[key] = MetricValue(estimates[column], estimates[1], used, f"{key}: {self.note}, {how}{singular}")
        return values

    @property
    def _measures_own(self) -> bool:
        return bool({"fad_eval", "fad_unbiased"} & set(self.keys))

    def features(self, x: Tensor, train: bool) -> Tensor:
        """Returns latent vectors `(B, D)` of `x` `(B, C, size, size)`, batch norm in training or evaluation mode."""
        self.encoder.train(train)
        with torch.no_grad(), full_precision(x.device.type):
            return self.encoder(x)

    def _finish_batch(self) -> None:
        batch, self._pending = self._pending[:BATCH], self._pending[BATCH:]
        images, indices = (torch.stack(part) for part in zip(*batch, strict=True))
        self.published.update(self.features(images, train=True), indices, real=False)


def add_reference_statistics(distance: FrechetDistance, mean: Tensor, covariance: Tensor, count: int) -> None:
    """Adds `count` reference images of which only mean `(D,)` and unbiased covariance `(D, D)` are known."""
    mean, covariance = (x.to(distance.reference_sum) for x in (mean, covariance))
    distance.reference_sum += count * mean
    distance.reference_outer += (count - 1) * covariance + count * torch.outer(mean, mean)
    distance.reference_count += count


def _shape(encoder: FADEncoder) -> tuple[int, int, int]:
    """Returns the image channels, the width of the latent vector and the number of convolutions of an encoder."""
    convolutions = [layer for layer in encoder.encoder.modules() if isinstance(layer, nn.Conv2d)]
    return convolutions[0].in_channels, encoder.latent_layer.out_features, len(convolutions)


def _published_statistics(path: Path, width: int) -> tuple[Tensor, Tensor]:
    """Returns mean `(D,)` and covariance `(D, D)` of the published features, in float64."""
    _require(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(file[key]).double() for key in ("mu", "sigma"))
    except (ValueError, KeyError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} does not contain statistics of the FAD ({error}); fetch it again from {SOURCE}"
        ) from None
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise ValueError(f"{path} has statistics of {len(mean)} features, but the autoencoder has {width}")
    return mean, covariance


def _require(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; set --evaluation.fad_dir to the folder with stat_checkpoints/ and stats/ from "
            f"{SOURCE}"
        )
