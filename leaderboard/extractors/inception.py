"""Inception networks with the preprocessing of the papers' released code, for the papers' own protocols.

`standard-v1` uses `leaderboard.extractors.base.InceptionExtractor`. This module has the same 2015 weights with other
resizing (clean-fid: G. Parmar et al., CVPR 2022, https://arxiv.org/abs/2104.11222), and torchvision's network, whose
weights differ.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import Inception_V3_Weights, inception_v3

from leaderboard.extractors.base import Extractor, InceptionExtractor, load_extractor, published_weights
from leaderboard.extractors.dinov2 import DinoV2Extractor
from leaderboard.protocols import AUTOENCODER, DINOV2, SUITE, TORCHVISION, View
from systems.checkpoints import load_checkpoint

URL_TORCHVISION = str(Inception_V3_Weights.IMAGENET1K_V1.url)
SIZE = 299
"""Side length of the network input in pixels."""


def view_extractor(
    view: View,
    dataset: str,
    inception_weights: str | None = None,
    torchvision_weights: str | None = None,
    extractor: str | None = None,
) -> Extractor:
    """Returns the extractor of a view.

    Args:
        view: View of a protocol.
        dataset: Dataset of the shipped extractor, for views with `"suite"` or `"suite-autoencoder"`.
        inception_weights: Local file of the 2015 weights; downloaded if not given.
        torchvision_weights: Local file of torchvision's weights; downloaded if not given.
        extractor: File of a small extractor to use instead of the shipped one.

    Raises:
        FileNotFoundError: If weights do not exist; the message says how to get them.
        RuntimeError: If weights cannot be downloaded.
    """
    if view.extractor in (SUITE, AUTOENCODER):
        return load_extractor(extractor or view.extractor, dataset)
    if view.extractor == DINOV2:
        return DinoV2Extractor()
    if view.extractor == TORCHVISION:
        return TorchvisionInception(torchvision_weights, view.input)
    if view.input == "torch-fidelity":
        return load_extractor(view.extractor, dataset, inception_weights)
    return ResizedInception(inception_weights, view.input)


class ResizedInception(InceptionExtractor):
    """The 2015 Inception network with the resizing of another program.

    Args:
        weights_path: Local file of weights; downloaded if not given.
        resize: `"bilinear"`, or `"clean"` for the resizing of clean-fid.
    """

    dtypes = (torch.uint8, torch.float32)

    def __init__(self, weights_path: str | None, resize: str) -> None:
        super().__init__(weights_path)
        self.resize = {"bilinear": _bilinear, "clean": _clean}[resize]
        *trunk, self.classifier = self.network.children()  # in the order in which they run
        self.trunk = nn.Sequential(*trunk)

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Computes pooled features and unbiased logits."""
        features = self.trunk(self.resize(_three_channels(images))).flatten(1)
        return features, features @ cast(nn.Linear, self.classifier).weight.T


class TorchvisionInception(Extractor):
    """torchvision's Inception network with the preprocessing of Spiking-Diffusion's released code.

    Args:
        weights_path: Local file of weights; downloaded if not given.
        scaling: `"twice"` applies the network's own input transform, which expects [0, 1], to images in [-1, 1];
            `"unit"` uses images in [0, 1] without a transform.

    Raises:
        FileNotFoundError: If the file does not exist.
        RuntimeError: If the download fails.
        ValueError: If the file does not contain weights of this network.
    """

    def __init__(self, weights_path: str | None, scaling: str) -> None:
        path, sha256 = published_weights(weights_path, URL_TORCHVISION, "torchvision_weights")
        super().__init__(TORCHVISION, num_features=2048, num_classes=1000, sha256=sha256)
        self.twice = scaling == "twice"
        self.network = inception_v3(weights=None, transform_input=self.twice, init_weights=False)
        try:
            self.network.load_state_dict(load_checkpoint(path))
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} does not contain weights of torchvision's inception_v3 ({str(error).splitlines()[0]}); use a "
                f"copy of {URL_TORCHVISION}"
            ) from None
        self.classifier = self.network.fc
        self.network.fc = nn.Identity()  # so that the network ends with the pooled features
        self.requires_grad_(False)
        self.eval()

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Computes pooled features and logits."""
        x = _interpolate(_three_channels(images) / 255)
        features = self.network(2 * x - 1 if self.twice else x)
        return features, self.classifier(features)


def _three_channels(images: Tensor) -> Tensor:
    """Converts images of 1 or 3 channels to float images of 3 channels."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"Inception expects images of 1 or 3 channels, found shape {tuple(images.shape)}")
    return images.float().expand(-1, 3, -1, -1)


def _interpolate(images: Tensor) -> Tensor:
    return F.interpolate(images, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=False)


def _bilinear(images: Tensor) -> Tensor:
    """Resizes bilinearly with half-pixel centres and without antialiasing; maps [0, 255] to [-1, 1]."""
    return 2 * _interpolate(images / 255) - 1


def _clean(images: Tensor) -> Tensor:
    """Resizes each channel with PIL's bicubic filter on floats, clips without rounding; maps [0, 255] to [-1, 1)."""
    grey = bool((images[:, :1] == images).all())
    channels = (images[:, :1] if grey else images).cpu().numpy()
    resized = [
        np.asarray(Image.fromarray(channel).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        for channel in channels.reshape(-1, *channels.shape[2:])
    ]
    found = torch.from_numpy(np.stack(resized)).view(len(images), -1, SIZE, SIZE).to(images.device)
    return (found.clamp(0, 255).expand(-1, 3, -1, -1) - 128) / 128
