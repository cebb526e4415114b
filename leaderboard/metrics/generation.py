"""All metrics of one view: FID, KID, Inception score, precision and recall, by streaming.

Each batch of images passes the extractor once and is reduced to running sums. Their size depends only on the extractor:
about 1 GB on the device for Inception's 2,048 features. In distributed evaluation, processes must receive disjoint
images: images repeated by a padding sampler would count twice.

Sources: `leaderboard.metrics.streaming` (Fréchet distance, Inception score) and `leaderboard.metrics.feature_metrics`
(kernel distance, precision and recall).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn
from torchmetrics import Metric, SumMetric

from leaderboard.extractors.base import Extractor
from leaderboard.metrics.feature_metrics import kernel_distance, precision_recall
from leaderboard.metrics.streaming import FeatureTable, FrechetDistance, StreamingInceptionScore
from leaderboard.protocols import INCEPTION, TORCHVISION
from leaderboard.record.records import MetricValue

FRECHET = {"fid": "exact", "fd": "exact", "fid_newton_schulz": "newton_schulz", "fid_svd": "svd"}
"""Matrix square root of each Fréchet distance, a key of `leaderboard.metrics.matrix_sqrt.ROOTS`."""

FAMILIES = {
    INCEPTION: ("fid", "fid_newton_schulz", "kid", "is", "precision_recall"),
    TORCHVISION: ("fid_svd", "is"),
}
"""Families of metrics for each Inception network."""

OWN_FAMILIES = ("fd", "kd", "precision_recall")
"""Families of metrics for the suite's own extractors."""

MINIMUM = 20
"""Minimum number of generated and of real images."""


def metric_keys(family: str, extractor: str) -> tuple[str, ...]:
    """Returns the record keys of a family of metrics for an extractor name."""
    if family in FRECHET and family != "fd":
        return (family,)
    if extractor == INCEPTION:
        return {"kid": ("kid_mean",), "is": ("is_mean",), "precision_recall": ("precision", "recall")}[family]
    return tuple(f"{key}_{extractor}" for key in (family.split("_") if family == "precision_recall" else (family,)))


class GenerationMetrics(nn.Module):
    """All metrics of one view, updated with batches of real and generated images.

    Keys are `fid`, `kid_mean`, `is_mean`, `precision` and `recall` with Inception; only its Fréchet and kernel
    distances are called FID and KID. With another extractor they contain its name: `fd_<extractor>`, `kd_<extractor>`,
    `is_<extractor>`, `precision_<extractor>`, `recall_<extractor>`. Fréchet distances with another matrix square root
    are named after it: `fid_svd`, `fid_newton_schulz`.

    Args:
        extractor: Feature extractor, run once on each batch.
        metrics: Families to compute with their parameters, such as `view.metrics_for(dataset)`.
        num_reference: Number of real images in the reference.
        num_groups: Groups of generated images for the jackknife errors.
        kept_images: Number of images whose features are stored for kernel distance, precision and recall.
        note: Remark that is added to every value.

    Raises:
        ValueError: If a metric is not defined for this extractor.
    """

    def __init__(
        self,
        extractor: Extractor,
        metrics: Mapping[str, Mapping[str, Any]],
        num_reference: int,
        num_groups: int = 10,
        kept_images: int = 10_000,
        note: str = "",
    ) -> None:
        super().__init__()
        known = FAMILIES.get(extractor.name, OWN_FAMILIES)
        if not set(metrics) <= set(known):
            raise ValueError(
                f"metrics={list(metrics)} cannot be computed with the extractor {extractor.name!r}; "
                f"choose from: {', '.join(known)}"
            )
        self.extractor, self.options, self.num_groups, self.kept_images = extractor, metrics, num_groups, kept_images
        width = extractor.num_features
        roots = tuple(FRECHET[family] for family in metrics if family in FRECHET)
        built: dict[str, Metric] = {}
        if roots:
            built["frechet"] = FrechetDistance(width, num_groups, roots)
        if {"kid", "kd", "precision_recall"} & set(metrics):
            built["table"] = FeatureTable(width, kept_images, num_reference)
        if "is" in metrics:
            built["score"] = StreamingInceptionScore(extractor.num_classes, **metrics["is"])
        self.metrics = nn.ModuleDict(built)
        self.generated_count = SumMetric()
        self.note = note
        self.num_reference = num_reference
        self.identity = f"{extractor.name} {extractor.sha256}"

    def update_reference(self, images: Tensor, indices: Tensor) -> None:
        """Adds real images.

        Args:
            images: uint8 images `(B, C, H, W)`.
            indices: Their indices `(B,)` in the reference.

        Raises:
            ValueError: If there is not one index per image.
        """
        self._update(images, indices, real=True)

    def update_generated(self, images: Tensor, indices: Tensor) -> None:
        """Adds generated images.

        Args:
            images: Images `(B, C, H, W)`, uint8, or floats in the same range if the protocol does not quantise.
            indices: Their indices `(B,)`; image `k` is generated from the `k`-th seed.

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
        if not real:
            self.generated_count.update(len(images))
        for metric in cast(Iterable[Metric], self.metrics.values()):
            if not isinstance(metric, StreamingInceptionScore):
                metric.update(features, indices, real)
            elif not real:
                metric.update(logits, indices)

    def reference_metrics(self) -> dict[str, Metric]:
        """Returns the metrics with reference statistics by name."""
        return {name: cast(Metric, metric) for name, metric in self.metrics.items() if name != "score"}

    def compute(self) -> dict[str, MetricValue]:
        """Returns every metric; uncertainties are jackknife errors, or standard deviations over subsets or splits.

        Raises:
            ValueError: If there are fewer than `MINIMUM` real or generated images.
        """
        counts = {"reference": self.num_reference, "generated": int(self.generated_count.compute())}
        for kind, count in counts.items():
            if count < MINIMUM:
                raise ValueError(
                    f"{count} {kind} images are too few to compare; give at least {MINIMUM}, and as many as the "
                    "protocol asks for"
                )
        values = self._frechet(counts) if "frechet" in self.metrics else {}
        if "table" in self.metrics:
            values |= self._feature_metrics()
        if "score" in self.metrics:
            value, error = self._result("score")
            (key,) = metric_keys("is", self.extractor.name)
            values[key] = MetricValue(float(value), float(error), counts["generated"])
        return {k: replace(v, note="; ".join(filter(None, (self.note, v.note)))) for k, v in values.items()}

    def _frechet(self, counts: Mapping[str, int]) -> dict[str, MetricValue]:
        width, used = self.extractor.num_features, counts["generated"]
        few = [f"{count} {kind}" for kind, count in counts.items() if count <= width]
        note = f"singular covariance: only {' and '.join(few)} images for {width} features" if few else ""
        families = [family for family in self.options if family in FRECHET]
        values: dict[str, MetricValue] = {}
        for family, (value, error) in zip(families, self._result("frechet").tolist(), strict=True):
            if family == "fid_newton_schulz" and not (math.isfinite(value) and math.isfinite(error)):
                warnings.warn(
                    f"{family} is omitted: its Newton-Schulz iterations diverge on these covariances"
                    f"{note and f' ({note})'}",
                    stacklevel=2,
                )
            else:
                (key,) = metric_keys(family, self.extractor.name)
                values[key] = MetricValue(value, error, used, note)
        return values

    def _feature_metrics(self) -> dict[str, MetricValue]:
        reference, generated, indices = self._result("table")
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for family, options in self.options.items():
            keys = metric_keys(family, self.extractor.name)
            if family in ("kid", "kd"):
                found[keys[0]] = kernel_distance(reference, generated, **options)
            elif family == "precision_recall":
                groups = indices % self.num_groups
                found |= zip(keys, precision_recall(reference, generated, groups, **options), strict=True)
        return {key: MetricValue(float(value), float(error), len(generated)) for key, (value, error) in found.items()}

    def _result(self, name: str) -> Any:
        return cast(Metric, self.metrics[name]).compute()
