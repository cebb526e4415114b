"""Kernel distance (KID), precision and recall: metrics of the features themselves, not only their moments.

- Kernel distance: M. Bińkowski et al., "Demystifying MMD GANs", ICLR 2018, https://arxiv.org/abs/1801.01401, by
  torchmetrics (https://lightning.ai/docs/torchmetrics) in float64.
- Precision and recall: T. Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models",
  NeurIPS 2019, https://arxiv.org/abs/1904.06991.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from leaderboard.metrics.streaming import jackknife_error

_BLOCK = 1000
"""Number of images whose distances to all others are in memory at once."""


class _PassThrough(nn.Module):
    """Identity in place of the extractor that torchmetrics expects, because its inputs already are features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def kernel_distance(
    reference: Tensor, generated: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of the kernel distance (KID with Inception features) over random subsets.

    Args:
        reference: Features `(N, D)` of real images.
        generated: Features `(M, D)` of generated images.
        subsets: Number of subsets.
        subset_size: Images of each subset; reduced to the number of images if that is smaller.
        seed: Seed of the subsets; the global random state is neither used nor changed.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", ".*save all extracted features.*")  # their number is bounded
        kid = KernelInceptionDistance(
            feature=_PassThrough(reference.shape[1]),
            subsets=subsets,
            subset_size=min(subset_size, len(reference), len(generated)),
            sync_on_compute=False,
        )
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch CUDA as well
        kid.update(reference, real=True)
        kid.update(generated, real=False)
        return kid.compute()


def precision_recall(
    reference: Tensor, generated: Tensor, groups: Tensor, neighbours: int = 3
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns precision and recall, each with its jackknife standard error over groups of generated images.

    Precision is the fraction of generated images within a ball around any real image; recall is the fraction of real
    images within a ball around any generated image. The radius of a ball is the distance to the `neighbours`-th nearest
    image of the same set.

    Args:
        reference: Features `(N, D)` of real images.
        generated: Features `(M, D)` of generated images.
        groups: Group `(M,)` of each generated image.
        neighbours: Number of nearest neighbours within a ball.

    Raises:
        ValueError: If leaving out one group leaves too few images for that many neighbours.
    """
    members = [groups == group for group in groups.unique()]  # (M,) for each group
    least = min(len(reference), len(generated) - max(int(m.sum()) for m in members))
    if least <= neighbours:
        raise ValueError(f"{least} images are too few for {neighbours} nearest neighbours; generate at least 20")
    nobody = torch.zeros_like(groups, dtype=torch.bool)
    left_out = torch.stack([nobody, *members])  # (G + 1, M), no image in the first row
    real_radii = _squared_radii(
        reference, neighbours, torch.zeros_like(reference[:1, 0], dtype=torch.bool).expand(1, len(reference))
    )  # (1, N)
    radii = _squared_radii(generated, neighbours, left_out)  # (G + 1, M)
    inside = torch.zeros_like(nobody)
    covered = torch.zeros(len(left_out), device=reference.device, dtype=torch.float64)
    for real, radius in zip(reference.split(_BLOCK), real_radii[0].split(_BLOCK), strict=True):
        distances = _squared_distances(real, generated)  # (B, M)
        inside |= (distances <= radius[:, None]).any(0)
        for i, (own_radii, out) in enumerate(zip(radii, left_out, strict=True)):
            covered[i] += ((distances <= own_radii) & ~out).any(1).sum()
    precision = torch.stack([inside[~out].double().mean() for out in left_out])
    recall = covered / len(reference)
    return (precision[0], jackknife_error(precision[1:])), (recall[0], jackknife_error(recall[1:]))


def _squared_radii(features: Tensor, neighbours: int, left_out: Tensor) -> Tensor:
    """Returns the squared radius of the ball around each image, `(G, N)`, without the images that each row leaves out.

    Args:
        features: Features `(N, D)`.
        neighbours: Number of nearest neighbours within a ball.
        left_out: Images to leave out, `(G, N)` booleans.
    """
    found = []
    for block in features.split(_BLOCK):
        distances = _squared_distances(block, features)
        # one more neighbour, because the nearest one is the image itself
        radii = [distances.masked_fill(out, torch.inf).kthvalue(neighbours + 1).values for out in left_out]
        found.append(torch.stack(radii))
    return torch.cat(found, dim=1)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Returns the squared Euclidean distances `(N, M)` of `a` `(N, D)` and `b` `(M, D)`."""
    return (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)
