"""Kernel distance (KID), density, coverage, precision, recall and authenticity, from features, not only their moments.

- Kernel distance: M. Bińkowski et al., "Demystifying MMD GANs", ICLR 2018, https://arxiv.org/abs/1801.01401, by
  torchmetrics (https://lightning.ai/docs/torchmetrics) in float64, or as the U-statistic of all images.
- Density and coverage: M. Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020,
  https://arxiv.org/abs/2002.09797.
- Precision and recall: T. Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models",
  NeurIPS 2019, https://arxiv.org/abs/1904.06991.
- Authenticity: A. Alaa et al., "How Faithful is your Synthetic Data?", ICML 2022, https://arxiv.org/abs/2102.08921.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from leaderboard.metrics.streaming import jackknife_error

_BLOCK = 1000
"""Number of images whose distances to all others are in memory at once."""
_SMALL_BLOCK = 100
"""The same for comparisons with the whole reference."""


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


def unbiased_kernel_distance(
    reference: Tensor, generated: Tensor, among_reference: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the U-statistic of the squared kernel distance of all images, and its standard error.

    `mean_{i!=j} k(x_i, x_j) + mean_{i!=j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)`, `k(x, y) = (x.y / D + 1)^3`. It is
    unbiased, so it may be negative for equal distributions. The standard error is the jackknife's over single generated
    images (J. Arvesen, Ann. Math. Stat. 40, 1969, https://doi.org/10.1214/aoms/1177697287), for a fixed reference. It
    is somewhat too large where the distributions are equal, since the statistic then is degenerate.

    Args:
        reference: Features `(N, D)` of real images.
        generated: Features `(M, D)` of generated images.
        among_reference: `mean_kernel(reference)`, if it is known.
    """
    n, m = len(reference), len(generated)
    across = torch.cat([_kernel_sums(block, reference) for block in generated.split(_SMALL_BLOCK)]) / n  # (M,)
    own = torch.cat([_kernel_sums(block, generated) for block in generated.split(_SMALL_BLOCK)])
    own = own - _kernel_diagonal(generated)  # (M,) sums over all others
    constant = mean_kernel(reference) if among_reference is None else among_reference
    value = constant + own.sum() / (m * (m - 1)) - 2 * across.mean()
    parts = (own.sum() - 2 * own) / ((m - 1) * (m - 2)) - 2 * (across.sum() - across) / (m - 1)
    return value, jackknife_error(parts)


def mean_kernel(features: Tensor) -> Tensor:
    """Returns the mean cubic kernel of all pairs of different rows of `features` `(N, D)`."""
    total = torch.stack([_kernel_sums(block, features).sum() for block in features.split(_SMALL_BLOCK)]).sum()
    return (total - _kernel_diagonal(features).sum()) / (len(features) * (len(features) - 1))


def _kernel_sums(a: Tensor, b: Tensor) -> Tensor:
    """Returns the sum over `b` `(M, D)` of the cubic kernel of each row of `a` `(N, D)`, `(N,)`."""
    kernel = (a @ b.T).div_(a.shape[1]).add_(1)
    return (kernel * kernel).mul_(kernel).sum(1)


def _kernel_diagonal(a: Tensor) -> Tensor:
    """Returns the cubic kernel of each row of `a` `(N, D)` with itself, `(N,)`."""
    return (a.square().mean(1) + 1) ** 3


def density_coverage(
    reference: Tensor, generated: Tensor, groups: Tensor, neighbours: int = 5
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns density and coverage, each with its jackknife standard error over groups of generated images.

    The ball around each real image reaches to its `neighbours`-th nearest real image. Density is the mean number of
    balls around a generated image, divided by `neighbours`; it may exceed 1. Coverage is the fraction of balls with any
    generated image inside. For equal distributions and as many generated as real images, density is 1 and coverage
    `1 - 2^-neighbours` in expectation (Naeem et al.).

    Args:
        reference: Features `(N, D)` of real images.
        generated: Features `(M, D)` of generated images.
        groups: Group `(M,)` of each generated image.
        neighbours: Number of nearest neighbours within a ball.

    Raises:
        ValueError: If there are too few real images for that many neighbours.
    """
    if len(reference) <= neighbours:
        raise ValueError(f"{len(reference)} images are too few for {neighbours} nearest neighbours; give more")
    labels = groups.unique()
    members = (groups == labels[:, None]).to(reference)  # (G, M)
    nobody = torch.zeros(1, len(reference), dtype=torch.bool, device=reference.device)
    radii = _squared_radii(reference, neighbours, nobody)[0]  # (N,)
    balls = torch.zeros(len(generated), dtype=reference.dtype, device=reference.device)
    inside = []  # number of images of each group in each ball
    for real, radius in zip(reference.split(_BLOCK), radii.split(_BLOCK), strict=True):
        close = (_squared_distances(real, generated) < radius[:, None]).to(reference)  # (B, M)
        balls += close.sum(0)
        inside.append(close @ members.T)
    counts = torch.cat(inside)  # (N, G)
    total, sizes = members @ balls, members.sum(1)  # (G,), (G,)
    density = balls.mean() / neighbours
    densities = (total.sum() - total) / (sizes.sum() - sizes) / neighbours
    covered = counts.sum(1, keepdim=True)
    coverages = (covered - counts > 0).double().mean(0)
    coverage = (covered > 0).double().mean()
    return (density, jackknife_error(densities)), (coverage, jackknife_error(coverages))


def authenticity(reference: Tensor, generated: Tensor, groups: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Returns the share of authentic images with its jackknife standard error, and the nearest real images.

    A generated image is authentic unless its nearest training image is nearer to it than to every other training image
    (AuthPct). Copies of training images are not authentic. Real test images have a share below 1 too, so compare with
    theirs; images of bad quality are far from all training images and therefore authentic.

    Args:
        reference: Features `(N, D)` of all training images.
        generated: Features `(M, D)` of generated images.
        groups: Group `(M,)` of each generated image.

    Returns:
        Share and error, and the index `(M,)` of the training image nearest to each generated one.
    """
    nearest = _nearest(generated, reference)
    distances = (generated - reference[nearest]).square().sum(1)
    chosen, position = nearest.unique(return_inverse=True)
    neighbour = _nearest(reference[chosen], reference, chosen)
    own = (reference[chosen] - reference[neighbour]).square().sum(1)
    authentic = (distances >= own[position]).double()
    parts = torch.stack([authentic[groups != group].mean() for group in groups.unique()])
    return (authentic.mean(), jackknife_error(parts)), nearest


def _nearest(features: Tensor, others: Tensor, own: Tensor | None = None) -> Tensor:
    """Returns the index `(M,)` of the row of `others` `(N, D)` nearest to each row of `features` `(M, D)`.

    Args:
        features: Features `(M, D)`.
        others: Features `(N, D)`.
        own: Indices `(M,)` of rows of `others` that are left out, each for one row of `features`.
    """
    norms, found = others.square().sum(1), []
    for start in range(0, len(features), _SMALL_BLOCK):
        block = slice(start, start + _SMALL_BLOCK)
        scores = torch.addmm(norms, features[block], others.T, alpha=-2)  # squared distances but for |features|^2
        if own is not None:
            scores.scatter_(1, own[block, None], torch.inf)
        found.append(scores.argmin(1))
    return torch.cat(found)


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
