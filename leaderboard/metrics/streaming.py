"""Fréchet distance, kept features and Inception score as running sums, from features and logits computed elsewhere.

All states are sums over images known by their index, so processes and parts merge, and nothing depends on batch size or
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from leaderboard.metrics.matrix_sqrt import ROOTS, Trace


class FrechetDistance(Metric):
    """Fréchet distance of two sets of features, with its jackknife standard error over groups of generated images.

    Args:
        num_features: Width `D` of the features.
        num_groups: Groups `G` left out in turn; image `k` belongs to group `k % G`.
        roots: How the root of the covariances' product is taken; several give several distances of the same sums.
            Newton-Schulz iterations, which approximate the exact root slowly, have the error of the exact one.
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
        self, num_features: int, num_groups: int = 10, roots: tuple[str, ...] = ("exact",), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.num_features, self.num_groups, self.roots = num_features, num_groups, roots
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
        """Returns distance and standard error, `(R, 2)`, for each of the roots."""
        reference = (self.reference_sum[0], self.reference_outer[0], self.reference_count[0])
        mean, covariance = _moments(*reference)
        of_parts = ["exact" if root == "newton_schulz" else root for root in self.roots]
        traces = {root: ROOTS[root](covariance) for root in {*self.roots, *of_parts}}

        def distances(kept: Tensor, roots: Sequence[str]) -> Tensor:
            return self._distances(kept, mean, covariance, [traces[root] for root in roots])

        whole = distances(torch.ones(self.num_groups, dtype=torch.bool), self.roots)
        parts = [distances(~left_out, of_parts) for left_out in torch.eye(self.num_groups, dtype=torch.bool)]
        return torch.stack([whole, jackknife_error(torch.stack(parts))], dim=1)

    def _distances(self, kept: Tensor, mean: Tensor, covariance: Tensor, traces: list[Trace]) -> Tensor:
        states = (self.generated_sum, self.generated_outer, self.generated_count)
        own_mean, own_covariance = _moments(*(state[kept.to(state.device)].sum(0) for state in states))
        apart = (mean - own_mean).square().sum() + covariance.trace() + own_covariance.trace()
        return torch.stack([apart - 2 * trace(own_covariance) for trace in traces])


def _moments(total: Tensor, outer: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(D,)` and unbiased covariance `(D, D)` of sums."""
    mean = total / count
    return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)


def jackknife_error(parts: Tensor) -> Tensor:
    """Standard error from the values `(G, ...)` that are found without each of `G` groups in turn."""
    return ((len(parts) - 1) * (parts - parts.mean(0)).square().mean(0)).sqrt()


class FeatureTable(Metric):
    """Features of some images, in bounded memory: the first generated ones, and real ones spread over their split.

    They stand in a table by image index, so that a sum over processes puts it together. A split sorted by class is
    represented as well as a shuffled one.

    Args:
        num_features: Width `D` of the features.
        num_images: Images of each kind.
        num_reference: Real images there are.
        kwargs: Options of `torchmetrics.Metric`.
    """

    full_state_update = False
    reference_table: Tensor
    reference_seen: Tensor
    generated_table: Tensor
    generated_seen: Tensor

    def __init__(self, num_features: int, num_images: int, num_reference: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_images, self.num_reference = num_images, num_reference
        for kind, rows in (("reference", min(num_images, num_reference)), ("generated", num_images)):
            self.add_state(f"{kind}_table", torch.zeros(rows, num_features), dist_reduce_fx="sum")
            self.add_state(f"{kind}_seen", torch.zeros(rows, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, features: Tensor, indices: Tensor, real: bool) -> None:
        """Adds the features `(B, D)` of images with the indices `(B,)`, real or generated."""
        table, seen = (getattr(self, f"{'reference' if real else 'generated'}_{name}") for name in ("table", "seen"))
        rows = indices.to(table.device)
        if real:  # row r holds the image r * N // R
            rows = (rows * len(table) + self.num_reference - 1) // self.num_reference
            taking_part = (rows < len(table)) & (rows * self.num_reference // len(table) == indices.to(table.device))
        else:
            taking_part = rows < len(table)
        rows = rows[taking_part]
        table.index_add_(0, rows, features[taking_part].to(table.dtype))
        seen.index_add_(0, rows, torch.ones_like(rows))

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
        return table[rows].double() / seen[rows, None]  # an index met twice holds the same image


class StreamingInceptionScore(Metric):
    """Inception score by running sums, where torchmetrics' `InceptionScore` keeps all logits.

    Args:
        num_classes: Width `K` of the logits.
        splits: Splits; image `k` belongs to split `k % splits`.
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
        """Returns mean and standard deviation over the splits: `exp(mean KL(p(y|x) || p(y)))` of each."""
        marginal = self.probability_sum / self.count[:, None]
        scores = (self.negentropy_sum / self.count - torch.special.xlogy(marginal, marginal).sum(1)).exp()
        return scores.mean(), scores.std()
