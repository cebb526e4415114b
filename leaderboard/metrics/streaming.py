"""Fréchet distance (FID), feature table and Inception score, as running sums over features and logits.

- Fréchet distance: M. Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
  Equilibrium", NeurIPS 2017, https://arxiv.org/abs/1706.08500.
- Inception score: T. Salimans et al., "Improved Techniques for Training GANs", NeurIPS 2016,
  https://arxiv.org/abs/1606.03498.

All states are sums over images with known indices, so the states of processes add up and results do not depend on batch
size or order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from leaderboard.metrics.matrix_sqrt import ROOTS, Trace


class FrechetDistance(Metric):
    """Fréchet distance of two sets of features, with its jackknife standard error over groups of generated images.

    `|m_r - m_g|^2 + tr(C_r + C_g - 2 sqrt(C_r C_g))`, with means `m` and covariances `C` of reference and generated
    features.

    The distance of `N` generated images is biased upwards by about `c / N`. Two corrections use the sums of the groups:

    - unbiased: the jackknife estimate `G F - (G - 1) F_mean`, where `F_mean` is the mean distance without one group
      (M. Quenouille, Biometrika 43, 1956, https://doi.org/10.1093/biomet/43.3-4.353), unbiased up to `O(1 / N^2)`;
    - at infinity: the distance extrapolated to infinitely many images, the intercept of a straight line through the
      distances of sets of increasing size over `1 / N` (M. Chong, D. Forsyth, "Effectively Unbiased FID and Inception
      Score and Where to Find Them", CVPR 2020, https://arxiv.org/abs/1911.07023). Here the sets are runs of `G / 2` to
      `G` successive groups, each size averaged over all runs, instead of random subsets.

    Args:
        num_features: Width `D` of the features.
        num_groups: Number of groups `G`, each left out in turn; image `k` belongs to group `k % G`.
        roots: Matrix square roots (`leaderboard.metrics.matrix_sqrt.ROOTS`); one distance is computed for each. The
            error of `"newton_schulz"`, which is slow, is computed with the exact root.
        at_infinity: Whether to compute the distance at infinity; it takes about `G^2 / 2` times as long.
        kwargs: Options of `torchmetrics.Metric`.
    """

    full_state_update = False
    reference_sum: Tensor
    reference_outer: Tensor
    reference_count: Tensor
    generated_sum: Tensor
    generated_outer: Tensor
    generated_count: Tensor

    def __init__(
        self,
        num_features: int,
        num_groups: int = 10,
        roots: tuple[str, ...] = ("exact",),
        at_infinity: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_features, self.num_groups, self.roots, self.at_infinity = num_features, num_groups, roots, at_infinity
        for kind, groups in (("reference", 1), ("generated", num_groups)):
            zeros = torch.zeros(groups, num_features, num_features, dtype=torch.float64)
            self.add_state(f"{kind}_sum", zeros[:, 0].clone(), dist_reduce_fx="sum")
            self.add_state(f"{kind}_outer", zeros, dist_reduce_fx="sum")
            self.add_state(f"{kind}_count", torch.zeros(groups, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, features: Tensor, indices: Tensor, real: bool) -> None:
        """Adds the features `(B, D)` of images with the indices `(B,)`, real or generated."""
        features = features.double()
        kind, groups = ("reference", 1) if real else ("generated", self.num_groups)
        sums, outer, count = (getattr(self, f"{kind}_{name}") for name in ("sum", "outer", "count"))
        group_of = indices.to(features.device) % groups
        for group in range(groups):
            members = features[group_of == group]
            sums[group] += members.sum(0)
            outer[group] += members.T @ members
            count[group] += len(members)

    def compute(self) -> Tensor:
        """Returns the estimates for each of the `R` roots, `(R, 5)`.

        They are: the distance, its standard error, the unbiased distance (not defined for `"newton_schulz"`: NaN), the
        distance at infinity and its standard error (NaN unless `at_infinity`).
        """
        reference = (self.reference_sum[0], self.reference_outer[0], self.reference_count[0])
        mean, covariance = _moments(*reference)
        error_roots = ["exact" if root == "newton_schulz" else root for root in self.roots]
        traces = {root: ROOTS[root](covariance) for root in {*self.roots, *error_roots}}

        def distances(kept: Tensor, roots: Sequence[str]) -> Tensor:
            return self._distances(kept, mean, covariance, [traces[root] for root in roots])

        everything = torch.ones(self.num_groups, dtype=torch.bool)
        left_out = torch.eye(self.num_groups, dtype=torch.bool)
        whole = distances(everything, self.roots)
        parts = torch.stack([distances(~group, error_roots) for group in left_out])
        same = torch.tensor([root != "newton_schulz" for root in self.roots], device=whole.device)
        unbiased = torch.where(same, jackknife_estimate(whole, parts), torch.nan)
        infinity, infinity_error = torch.full_like(whole, torch.nan), torch.full_like(whole, torch.nan)
        if self.at_infinity:
            infinity = self._at_infinity(everything, lambda kept: distances(kept, error_roots))
            without = [self._at_infinity(~group, lambda kept: distances(kept, error_roots)) for group in left_out]
            infinity_error = jackknife_error(torch.stack(without))
        return torch.stack([whole, jackknife_error(parts), unbiased, infinity, infinity_error], dim=1)

    def _at_infinity(self, kept: Tensor, distances: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the distances `(R,)` of the kept groups, extrapolated to infinitely many images."""
        groups = kept.nonzero().flatten()
        inverse, means = [], []
        for size in range(-(-len(groups) // 2), len(groups) + 1):
            runs = torch.arange(len(groups))[:, None].add(torch.arange(size)).remainder(len(groups))
            if size == len(groups):
                runs = runs[:1]
            found = []
            for run in groups[runs]:
                members = torch.zeros_like(kept).index_fill(0, run, True)
                found.append(distances(members))
            counts = self.generated_count.cpu()[groups[runs]].sum(1)
            inverse.append(counts.double().reciprocal().mean())
            means.append(torch.stack(found).mean(0))
        x, y = torch.stack(inverse).to(means[0].device), torch.stack(means)  # (S,), (S, R)
        x = x - (centre := x.mean())
        return y.mean(0) - centre * (x @ y) / x.square().sum()

    def _distances(self, kept: Tensor, mean: Tensor, covariance: Tensor, traces: list[Trace]) -> Tensor:
        states = (self.generated_sum, self.generated_outer, self.generated_count)
        own_mean, own_covariance = _moments(*(state[kept.to(state.device)].sum(0) for state in states))
        without_root = (mean - own_mean).square().sum() + covariance.trace() + own_covariance.trace()
        return torch.stack([without_root - 2 * trace(own_covariance) for trace in traces])


def _moments(total: Tensor, outer: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean `(D,)` and unbiased covariance `(D, D)` from the sum, the sum of outer products and the count."""
    mean = total / count
    return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)


def jackknife_error(parts: Tensor) -> Tensor:
    """Returns the jackknife standard error from `G` values `(G, ...)`, each computed without one of `G` groups."""
    return ((len(parts) - 1) * (parts - parts.mean(0)).square().mean(0)).sqrt()


def jackknife_estimate(whole: Tensor, parts: Tensor) -> Tensor:
    """Returns `G whole - (G - 1) mean(parts)`, without the bias of order `1 / N` of `whole`.

    Args:
        whole: Value `(...)` of all images.
        parts: Values `(G, ...)`, each computed without one of `G` groups.
    """
    return len(parts) * whole - (len(parts) - 1) * parts.mean(0)


class FeatureTable(Metric):
    """Features of a bounded number of images: the first generated ones, and the real ones that `kept_images` names.

    Rows are indexed by image, so that the tables of several processes add up.

    Args:
        num_features: Width `D` of the features.
        num_images: Maximum number of generated and of real images.
        num_reference: Number of real images in the reference.
        whole_reference: Whether to store all real images, whatever `num_images`.
        seed: Seed by which real images are drawn; None spreads them evenly.
        kwargs: Options of `torchmetrics.Metric`.
    """

    full_state_update = False
    reference_table: Tensor
    reference_seen: Tensor
    generated_table: Tensor
    generated_seen: Tensor

    def __init__(
        self,
        num_features: int,
        num_images: int,
        num_reference: int,
        whole_reference: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_images, self.num_reference, self.seed = num_images, num_reference, seed
        self.stored = kept_images(num_reference, num_reference if whole_reference else num_images, seed)
        for kind, rows in (("reference", len(self.stored)), ("generated", num_images)):
            self.add_state(f"{kind}_table", torch.zeros(rows, num_features), dist_reduce_fx="sum")
            self.add_state(f"{kind}_seen", torch.zeros(rows, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, features: Tensor, indices: Tensor, real: bool) -> None:
        """Adds the features `(B, D)` of images with the indices `(B,)`, real or generated."""
        table, seen = (getattr(self, f"{'reference' if real else 'generated'}_{name}") for name in ("table", "seen"))
        rows = indices.to(table.device)
        if real:
            stored = self.stored.to(table.device)
            rows = torch.searchsorted(stored, rows.contiguous()).clamp(max=len(stored) - 1)
            in_table = stored[rows] == indices.to(table.device)
        else:
            in_table = rows < len(table)
        rows = rows[in_table]
        table.index_add_(0, rows, features[in_table].to(table.dtype))
        seen.index_add_(0, rows, torch.ones_like(rows))

    def real(self, features: Tensor, count: int) -> Tensor:
        """Returns the features of up to `count` real images.

        Args:
            features: Real features of `compute`, `(R, D)`.
            count: Number of images.
        """
        if self.seed is None:
            rows = kept_images(len(features), count, None)
        else:
            chosen = kept_images(self.num_reference, min(count, len(self.stored)), self.seed)
            rows = torch.searchsorted(self.stored, chosen)
        return features[rows.to(features.device)]

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns features `(N, D)` in float64, real and generated, and the indices of the generated images."""
        return (
            self._features(self.reference_table, self.reference_seen),
            self._features(self.generated_table, self.generated_seen),
            self.generated_seen.nonzero().flatten(),
        )

    @staticmethod
    def _features(table: Tensor, seen: Tensor) -> Tensor:
        rows = seen > 0
        return table[rows].double() / seen[rows, None]  # an index added twice is the same image


def kept_images(total: int, count: int, seed: int | None) -> Tensor:
    """Returns the indices of up to `count` of `total` real images, in order.

    Images that are spread evenly represent a split sorted by class, but not one that alternates between two kinds of
    images, as MNIST's does. With the same seed, a smaller set is part of a larger one.

    Args:
        total: Number of images.
        count: Number of images to keep.
        seed: Seed of `numpy.random.RandomState`, whose numbers no version of NumPy changes; None spreads the images
            evenly, at `r total // count`.
    """
    count = min(count, total)
    if seed is None:
        return torch.arange(count) * total // count
    drawn: Tensor = torch.from_numpy(np.random.RandomState(seed).permutation(total)[:count])
    return drawn.sort().values


class StreamingInceptionScore(Metric):
    """Inception score `exp(E_x KL(p(y|x) || p(y)))` by running sums; torchmetrics' `InceptionScore` stores all logits.

    Args:
        num_classes: Width `K` of the logits.
        splits: Number of splits; image `k` belongs to split `k % splits`.
        kwargs: Options of `torchmetrics.Metric`.
    """

    full_state_update = False
    probability_sum: Tensor
    negentropy_sum: Tensor
    count: Tensor

    def __init__(self, num_classes: int, splits: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.splits = splits
        self.add_state("probability_sum", torch.zeros(splits, num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("negentropy_sum", torch.zeros(splits, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(splits, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, indices: Tensor) -> None:
        """Adds the logits `(B, K)` of generated images with the indices `(B,)`."""
        log_p = logits.double().log_softmax(1)
        split = indices.to(logits.device) % self.splits
        self.probability_sum.index_add_(0, split, log_p.exp())
        self.negentropy_sum.index_add_(0, split, (log_p.exp() * log_p).sum(1))
        self.count.index_add_(0, split, torch.ones_like(log_p[:, 0]))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of the score over the splits."""
        marginal = self.probability_sum / self.count[:, None]
        scores = (self.negentropy_sum / self.count - torch.special.xlogy(marginal, marginal).sum(1)).exp()
        return scores.mean(), scores.std()
