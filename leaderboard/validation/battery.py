"""Sets of images whose faults are known, with increasing severity, and the orders that a good metric keeps.

All sets are made of real images. A metric that prefers a worse set to a better one cannot be trusted to rank methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

REAL = "real"
"""Name of the set of unchanged test images, the floor of a distance."""

SEVERITIES: Mapping[str, tuple[float, ...]] = {
    "blurred": (0.5, 1, 2),
    "shifted": (1, 2, 3),
    "noised": (0.05, 0.1, 0.2),
    "overlays": (0.1, 0.5, 1),
    "few classes": (0.5, 0.8, 0.9),
    "copied": (0.1, 0.5, 1),
}
"""Kinds of faults with their severities:

- blurred: standard deviation of a Gaussian filter, in pixels;
- shifted: displacement of each image up, down, left or right, in pixels, repeating the border;
- noised: standard deviation of Gaussian noise, for pixels in [0, 1];
- overlays: share of images that are replaced by the pixelwise maximum with another image;
- few classes: share of the classes that are missing (0.9 of ten classes leaves the images of one);
- copied: share of images that are replaced by training images.
"""

GROSS = (("overlays", 1), ("few classes", 0.9))
"""Sets that are worse than every set of `MILD`."""

MILD = (("blurred", 0.5), ("shifted", 1), ("noised", 0.05))
"""Sets that are hardly distinguishable from real images."""


@dataclass(frozen=True)
class KnownSet:
    """Images with a known fault.

    Args:
        kind: Kind of fault, a key of `SEVERITIES`, or `REAL`.
        severity: How large the fault is, in the unit of its kind.
        images: uint8 images `(N, C, H, W)`.
    """

    kind: str
    severity: float
    images: Tensor

    @property
    def title(self) -> str:
        """The set in words."""
        return set_title(self.kind, self.severity)


def set_title(kind: str, severity: float) -> str:
    """Returns a known set in a few words."""
    share = f"{severity:.0%}"
    return {
        REAL: "real test images",
        "blurred": f"blurred, {severity:g} px",
        "shifted": f"shifted, {severity:g} px",
        "noised": f"noise, {severity:g}",
        "overlays": f"overlays, {share}",
        "few classes": f"{share} of classes missing",
        "copied": f"training images, {share}",
    }[kind]


def known_sets(test: Tensor, labels: Tensor, train: Tensor, seed: int = 0) -> Iterator[KnownSet]:
    """Yields the real test images and every known set made of them.

    Sets of few classes are left out if the images have no labels (-1).

    Args:
        test: Test images, uint8 `(N, C, H, W)`.
        labels: Their classes `(N,)`.
        train: Training images, uint8 `(M, C, H, W)`.
        seed: Seed of all random draws.
    """
    yield KnownSet(REAL, 0, test)
    for kind, severities in SEVERITIES.items():
        if kind == "few classes" and int(labels.min()) < 0:
            continue
        for severity in severities:
            generator = torch.Generator().manual_seed(seed)  # so that severities differ in nothing else
            yield KnownSet(kind, severity, _made(kind, severity, test, labels, train, generator))


def _made(
    kind: str, severity: float, test: Tensor, labels: Tensor, train: Tensor, generator: torch.Generator
) -> Tensor:
    def permutation(count: int) -> Tensor:
        return torch.randperm(count, generator=generator)

    if kind == "blurred":
        return blurred(test, severity)
    if kind == "shifted":
        return shifted(test, int(severity), torch.randint(4, (len(test),), generator=generator))
    if kind == "noised":
        noise = torch.randn(test.shape, generator=generator)
        return (test + 255 * severity * noise).round().clamp(0, 255).to(torch.uint8)
    if kind == "few classes":
        classes = int(labels.max()) + 1
        return test[labels < max(1, round(classes * (1 - severity)))]
    chosen = permutation(len(test))[: round(severity * len(test))]
    result = test.clone()
    if kind == "overlays":
        distance = torch.randint(1, max(2, len(test)), (len(chosen),), generator=generator)  # never 0: another image
        result[chosen] = torch.maximum(test[chosen], test[(chosen + distance) % len(test)])
    else:
        result[chosen] = train[permutation(len(train)).repeat(-(-len(chosen) // len(train)))[: len(chosen)]]
    return result


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Filters uint8 images `(N, C, H, W)` with a Gaussian of `sigma` pixels, repeating the border."""
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    x = images.flatten(0, 1)[:, None].float()
    x = F.conv2d(F.pad(x, (reach,) * 4, mode="replicate"), kernel[None, None, :, None])
    x = F.conv2d(x, kernel[None, None, None, :])
    return x.round().clamp(0, 255).to(torch.uint8).view_as(images)


def shifted(images: Tensor, pixels: int, directions: Tensor) -> Tensor:
    """Shifts each image `(N, C, H, W)` by some pixels, down, up, right or left (directions 0 to 3 `(N,)`)."""
    result = images.clone()
    for direction, (axis, sign) in enumerate(((2, 1), (2, -1), (3, 1), (3, -1))):
        members = directions == direction
        source = (torch.arange(images.shape[axis]) - sign * pixels).clamp(0, images.shape[axis] - 1)
        result[members] = images[members].index_select(axis, source)
    return result
