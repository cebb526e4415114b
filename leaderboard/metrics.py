"""Metrics of an evaluation: each batch of images passes the extractor once and leaves only running sums behind.

State size depends on the extractor alone: about 1 GB on the device with Inception's 2,048 features. Under distributed
evaluation each process must see images of its own: a sampler that repeats some to fill up would count these twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric, SumMetric

from leaderboard.distances import FrechetDistance, KernelDistance, StreamingInceptionScore
from leaderboard.features import Extractor
from leaderboard.protocols import INCEPTION, Protocol
from leaderboard.records import MetricValue


class GenerationMetrics(nn.Module):
    """All metrics of one evaluation, fed batch by batch with real and generated images.

    Keys are `fid`, `kid_mean` and `is_mean` with Inception. With any other extractor the Fréchet and the kernel
    distance are `fd_<extractor>` and `kd_<extractor>`, since only Inception's are called FID and KID.

    Args:
        extractor: Network run once on each batch.
        metrics: Families to compute, such as `protocol.metrics_for(dataset)`: any of `"fid"`, `"kid"`, `"is"` with
            Inception, of `"fd"`, `"kd"` with another extractor.
        protocol: Gives groups, splits and subsets.
        note: What a reader of every value should know.

    Raises:
        ValueError: If a metric does not exist with this extractor.
    """

    minimum = 20
    """Fewest images, generated and real, that give a value at all."""

    def __init__(self, extractor: Extractor, metrics: Sequence[str], protocol: Protocol, note: str = "") -> None:
        super().__init__()
        is_inception = extractor.name == INCEPTION
        known = ("fid", "kid", "is") if is_inception else ("fd", "kd")
        if not metrics or not set(metrics) <= set(known):
            raise ValueError(
                f"metrics={list(metrics)} cannot be computed with the extractor {extractor.name!r}; "
                f"choose from: {', '.join(known)}"
            )
        frechet, kernel = known[:2]
        width = extractor.num_features
        built: dict[str, Metric] = {}
        if frechet in metrics:
            key = "fid" if is_inception else f"fd_{extractor.name}"
            built[key] = FrechetDistance(width, protocol.jackknife_groups)
        if kernel in metrics:
            key = "kid_mean" if is_inception else f"kd_{extractor.name}"
            size = protocol.kernel_subset_size
            built[key] = KernelDistance(width, protocol.kernel_images, protocol.kernel_subsets, size)
        if "is" in metrics:
            built["is_mean"] = StreamingInceptionScore(extractor.num_classes, protocol.score_splits)
        self.extractor = extractor
        self.note = note
        self.metrics = nn.ModuleDict(built)
        self.reference_count, self.generated_count = SumMetric(), SumMetric()
        self._seen = 0

    def update_reference(self, images: Tensor, indices: Tensor | None = None) -> None:
        """Adds real images.

        Args:
            images: uint8 images `(B, C, H, W)`.
            indices: Their places `(B,)` in the reference split; may be left out by a single process that sees the split
                in order.

        Raises:
            ValueError: If there is not one index per image, or none although several processes evaluate together.
        """
        if indices is None:
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                raise ValueError(
                    "reference images came without indices to one of several processes; give their indices"
                )
            indices = torch.arange(self._seen, self._seen + len(images))
            self._seen += len(images)
        self._update(images, indices, real=True)

    def update_generated(self, images: Tensor, indices: Tensor) -> None:
        """Adds generated images.

        Args:
            images: uint8 images `(B, C, H, W)`.
            indices: Their indices `(B,)`, image `k` being the one sampled from the `k`-th noise.

        Raises:
            ValueError: If there is not one index per image.
        """
        self._update(images, indices, real=False)

    def _update(self, images: Tensor, indices: Tensor, real: bool) -> None:
        if indices.shape != images.shape[:1]:
            raise ValueError(
                f"{len(images)} images came with indices of shape {tuple(indices.shape)}; give one index per image"
            )
        features, logits = self.extractor(images)
        (self.reference_count if real else self.generated_count).update(len(images))
        for _, metric in self._built():
            if not isinstance(metric, StreamingInceptionScore):
                metric.update(features, indices, real)
            elif not real:
                metric.update(logits, indices)

    def compute(self) -> dict[str, MetricValue]:
        """Returns every metric; the uncertainty is the jackknife error, or the spread over subsets or splits.

        Raises:
            ValueError: If there are too few images for any value.
        """
        counts = {"reference": int(self.reference_count.compute()), "generated": int(self.generated_count.compute())}
        for kind, count in counts.items():
            if count < self.minimum:
                raise ValueError(
                    f"{count} {kind} images are too few to compare; give at least {self.minimum}, and as many as the "
                    "protocol asks for"
                )
        values: dict[str, MetricValue] = {}
        for key, metric in self._built():
            value, uncertainty = (float(number) for number in metric.compute())
            used = counts["generated"]
            if isinstance(metric, KernelDistance):
                used = min(used, metric.num_images)
            notes = [self.note, self._note(counts) if isinstance(metric, FrechetDistance) else ""]
            values[key] = MetricValue(value, uncertainty, used, "; ".join(filter(None, notes)))
        return values

    def _note(self, counts: dict[str, int]) -> str:
        width = self.extractor.num_features
        few = [f"{count} {kind}" for kind, count in counts.items() if count <= width]
        return f"singular covariance: only {' and '.join(few)} images for {width} features" if few else ""

    def _built(self) -> Iterable[tuple[str, Metric]]:
        return cast(Iterable[tuple[str, Metric]], self.metrics.items())
