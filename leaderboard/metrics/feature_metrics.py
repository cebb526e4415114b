"""What needs the features themselves and not only their moments: kernel distance, precision and recall.

The kernel distance is torchmetrics' (https://lightning.ai/docs/torchmetrics), taken in float64.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from leaderboard.metrics.streaming import jackknife_error

_BLOCK = 1000
"""Images whose distances to all others are held at once."""


class _PassThrough(nn.Module):
    """Stands where torchmetrics expects an extractor, since the features are there already."""

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
        subset_size: Images of each subset, or all where there are fewer.
        seed: Seed of the subsets; the global random state is neither read nor changed.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", ".*save all extracted features.*")  # they are few
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

    T. Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019,
    https://arxiv.org/abs/1904.06991: the share of generated images that lie in a ball around some real image, and of
    real images in a ball around some generated one, a ball reaching to the `neighbours`-th nearest image of its kind.

    Args:
        reference: Features `(N, D)` of real images.
        generated: Features `(M, D)` of generated images.
        groups: Group `(M,)` of each generated image.
        neighbours: Nearest images that a ball reaches to.

    Raises:
        ValueError: If there are too few images for that many neighbours without one group.
    """
    members = [groups == group for group in groups.unique()]  # (M,) for each group
    least = min(len(reference), len(generated) - max(int(m.sum()) for m in members))
    if least <= neighbours:
        raise ValueError(f"{least} images are too few for {neighbours} nearest neighbours; give at least 20")
    everyone = torch.zeros_like(groups, dtype=torch.bool)
    left_out = torch.stack([everyone, *members])  # (G + 1, M), none in the first row
    real_reach = _reach(
        reference, neighbours, torch.zeros_like(reference[:1, 0], dtype=torch.bool).expand(1, len(reference))
    )
    reach = _reach(generated, neighbours, left_out)  # (G + 1, M)
    inside = torch.zeros_like(everyone)
    covered = torch.zeros(len(left_out), device=reference.device, dtype=torch.float64)
    for real, radius in zip(reference.split(_BLOCK), real_reach[0].split(_BLOCK), strict=True):
        distances = _squared_distances(real, generated)  # (B, M)
        inside |= (distances <= radius[:, None]).any(0)
        for i, (radii, out) in enumerate(zip(reach, left_out, strict=True)):
            covered[i] += ((distances <= radii) & ~out).any(1).sum()
    precision = torch.stack([inside[~out].double().mean() for out in left_out])
    recall = covered / len(reference)
    return (precision[0], jackknife_error(precision[1:])), (recall[0], jackknife_error(recall[1:]))


def _reach(features: Tensor, neighbours: int, left_out: Tensor) -> Tensor:
    """Returns how far each ball reaches, squared, `(G, N)`: for each row of those left out `(G, N)`, without them."""
    found = []
    for block in features.split(_BLOCK):
        distances = _squared_distances(block, features)
        reach = [distances.masked_fill(out, torch.inf).kthvalue(neighbours + 1).values for out in left_out]
        found.append(torch.stack(reach))  # the nearest one is the image itself
    return torch.cat(found, dim=1)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)
