"""Fréchet distance, kernel distance and Inception score as running sums, from features and logits computed elsewhere.

The distances themselves are torchmetrics' (https://lightning.ai/docs/torchmetrics), taken in float64. All states are
sums over images known by their index, so processes and parts merge, and nothing depends on batch size or order.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance


class _PassThrough(nn.Module):
    """Stands where torchmetrics expects an extractor, since the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance(Metric):
    """Fréchet distance of two sets of features, with its jackknife standard error over groups of generated images.

    Args:
        num_features: Width `D` of the features.
        num_groups: Groups `G` left out in turn; image `k` belongs to group `k % G`.
        kwargs: Options of `torchmetrics.Metric`.
    """

    full_state_update = False
    reference_sum: Tensor
    reference_outer: Tensor
    reference_count: Tensor
    generated_sum: Tensor
    generated_outer: Tensor
    generated_count: Tensor

    def __init__(self, num_features: int, num_groups: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_features, self.num_groups = num_features, num_groups
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

    def compute(self) -> tuple[Tensor, Tensor]:
        """Returns the distance of all images and its standard error."""
        everything = torch.ones(self.num_groups, dtype=torch.bool, device=self.generated_count.device)
        without = []
        for group in range(self.num_groups):
            kept = everything.clone()
            kept[group] = False
            without.append(self._distance(kept))
        parts = torch.stack(without)
        variance = (self.num_groups - 1) * (parts - parts.mean()).square().mean()
        return self._distance(everything), variance.sqrt()

    def _distance(self, kept: Tensor) -> Tensor:
        fid = FrechetInceptionDistance(feature=_PassThrough(self.num_features), sync_on_compute=False)
        fid = fid.to(self.reference_sum.device)
        fid.update(self.reference_sum[:0], real=True)  # no image, but sets the data type of the result to float64
        fid.merge_state(
            {
                "real_features_sum": self.reference_sum[0],
                "real_features_cov_sum": self.reference_outer[0],
                "real_features_num_samples": self.reference_count[0],
                "fake_features_sum": self.generated_sum[kept].sum(0),
                "fake_features_cov_sum": self.generated_outer[kept].sum(0),
                "fake_features_num_samples": self.generated_count[kept].sum(),
            }
        )
        distance: Tensor = fid.compute()
        return distance


class KernelDistance(Metric):
    """Kernel distance (KID with Inception features) of the first images, in bounded memory, by fixed random subsets.

    Features stand in a table by image index, so that a sum over processes puts it together.

    Args:
        num_features: Width `D` of the features.
        num_images: Images with an index below this take part; the others are ignored.
        subsets: Number of random subsets.
        subset_size: Images of each subset, or all where there are fewer.
        seed: Seed of the subsets; the global random state is neither read nor changed.
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
        num_images: int = 10_000,
        subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_images, self.subsets, self.subset_size, self.seed = num_images, subsets, subset_size, seed
        for kind in ("reference", "generated"):
            self.add_state(f"{kind}_table", torch.zeros(num_images, num_features), dist_reduce_fx="sum")
            self.add_state(f"{kind}_seen", torch.zeros(num_images, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, features: Tensor, indices: Tensor, real: bool) -> None:
        """Adds the features `(B, D)` of images with the indices `(B,)`, real or generated."""
        table, seen = (getattr(self, f"{'reference' if real else 'generated'}_{name}") for name in ("table", "seen"))
        rows = indices.to(table.device)
        taking_part = rows < self.num_images
        rows = rows[taking_part]
        table.index_add_(0, rows, features[taking_part].to(table.dtype))
        seen.index_add_(0, rows, torch.ones_like(rows))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation over the subsets."""
        reference = self._features(self.reference_table, self.reference_seen)
        generated = self._features(self.generated_table, self.generated_seen)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", ".*save all extracted features.*")  # bounded by the table
            kid = KernelInceptionDistance(
                feature=_PassThrough(reference.shape[1]),
                subsets=self.subsets,
                subset_size=min(self.subset_size, len(reference), len(generated)),
                sync_on_compute=False,
            )
            torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would touch CUDA as well
            kid.update(reference, real=True)
            kid.update(generated, real=False)
            return kid.compute()

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
