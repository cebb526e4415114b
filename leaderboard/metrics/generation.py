"""All metrics of one view: FID, KID, Inception score, density, coverage, authenticity, precision and recall.

Each batch of images passes the extractor once and is reduced to running sums. Their size depends only on the extractor:
about 1 GB on the device for Inception's 2,048 features; authenticity adds the features of all training images, 15 MB
for 60,000 images of 64 features. In distributed evaluation, processes must receive disjoint images: images repeated by
a padding sampler would count twice.

Sources: `leaderboard.metrics.streaming` (Fréchet distance, Inception score) and `leaderboard.metrics.feature_metrics`
(all others).
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
from leaderboard.metrics.feature_metrics import (
    authenticity,
    density_coverage,
    kernel_distance,
    mean_kernel,
    precision_recall,
    unbiased_kernel_distance,
)
from leaderboard.metrics.streaming import FeatureTable, FrechetDistance, StreamingInceptionScore
from leaderboard.protocols import INCEPTION, TORCHVISION
from leaderboard.record.records import MetricValue

FRECHET = {"fid": "exact", "fd": "exact", "fid_newton_schulz": "newton_schulz", "fid_svd": "svd"}
"""Matrix square root of each Fréchet distance, a key of `leaderboard.metrics.matrix_sqrt.ROOTS`."""

CORRECTED = {"fid_unbiased": "fid", "fd_unbiased": "fd", "fd_infinity": "fd"}
"""Fréchet distances without the bias of few images, each with the family that it corrects."""

FAMILIES = {
    INCEPTION: ("fid", "fid_newton_schulz", "fid_unbiased", "kid", "is", "precision_recall", "density_coverage"),
    TORCHVISION: ("fid_svd", "is"),
}
"""Families of metrics for each Inception network."""

OWN_FAMILIES = ("fd", "fd_unbiased", "fd_infinity", "kd", "precision_recall", "density_coverage", "authenticity")
"""Families of metrics for all other extractors."""

OF_FEATURES = {"kid", "kd", "precision_recall", "density_coverage", "authenticity"}
"""Families that need the features themselves."""

MINIMUM = 20
"""Minimum number of generated and of real images."""


def metric_keys(family: str, extractor: str) -> tuple[str, ...]:
    """Returns the record keys of a family of metrics for an extractor name."""
    if family.startswith("fid"):
        return (family,)
    if extractor == INCEPTION and family in ("kid", "is"):
        return (f"{family}_mean",)
    names = tuple(family.split("_")) if family in ("precision_recall", "density_coverage") else (family,)
    return names if extractor == INCEPTION else tuple(f"{name}_{extractor}" for name in names)


class GenerationMetrics(nn.Module):
    """All metrics of one view, updated with batches of real and generated images.

    Keys are `fid`, `fid_unbiased`, `kid_mean`, `is_mean`, `precision`, `recall`, `density` and `coverage` with
    Inception; only its Fréchet and kernel distances are called FID and KID. With another extractor they contain its
    name, such as `fd_<extractor>`, `fd_unbiased_<extractor>`, `fd_infinity_<extractor>`, `kd_<extractor>` and
    `authenticity_<extractor>`. Fréchet distances with another matrix square root are named after it: `fid_svd`,
    `fid_newton_schulz`.

    The uncertainty of every value is its standard error over sets of as many images of the same model, with the
    reference fixed: the jackknife's, over the groups of generated images or, for kernel distances without subsets, over
    single ones. Exceptions are standard deviations: of kernel distances over subsets, of Inception scores over splits.

    Args:
        extractor: Feature extractor, run once on each batch.
        metrics: Families to compute with their parameters, such as `view.metrics_for(dataset)`.
        num_reference: Number of real images in the reference.
        num_groups: Groups of generated images for the jackknife errors.
        kept_images: Number of images whose features are stored for the metrics of features. Authenticity uses all
            real images. The option `images` of a family selects fewer: up to as many generated as real ones.
        reference_seed: Seed by which the real images for the metrics of features are drawn; None spreads them evenly.
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
        reference_seed: int | None = None,
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
        if wanting := [base for family, base in CORRECTED.items() if family in metrics and base not in metrics]:
            raise ValueError(
                f"metrics={list(metrics)} corrects {wanting[0]!r} without measuring it; add {wanting[0]!r}"
            )
        roots = tuple(FRECHET[family] for family in metrics if family in FRECHET)
        built: dict[str, Metric] = {}
        if roots:
            built["frechet"] = FrechetDistance(width, num_groups, roots, at_infinity="fd_infinity" in metrics)
        if OF_FEATURES & set(metrics):
            built["table"] = FeatureTable(width, kept_images, num_reference, "authenticity" in metrics, reference_seed)
        if "is" in metrics:
            built["score"] = StreamingInceptionScore(extractor.num_classes, **metrics["is"])
        self.metrics = nn.ModuleDict(built)
        self.generated_count = SumMetric()
        self.note = note
        self.num_reference = num_reference
        self.identity = f"{extractor.name} {extractor.sha256}"
        self._among_real: Tensor | None = None  # depends on the reference only
        self.nearest: Tensor | None = None
        """Indices `(M,)` of the real images nearest to the generated ones, once authenticity is computed."""

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
        """Returns every metric with its uncertainty.

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
        for family, estimates in zip(families, self._result("frechet").tolist(), strict=True):
            value, error, unbiased, infinity, infinity_error = estimates
            if family == "fid_newton_schulz" and not (math.isfinite(value) and math.isfinite(error)):
                warnings.warn(
                    f"{family} is omitted: its Newton-Schulz iterations diverge on these covariances"
                    f"{note and f' ({note})'}",
                    stacklevel=2,
                )
                continue
            found = {family: (value, error)}
            found |= {f"{family}_unbiased": (unbiased, error), f"{family}_infinity": (infinity, infinity_error)}
            for name in (name for name in found if name in self.options):
                (key,) = metric_keys(name, self.extractor.name)
                values[key] = MetricValue(*found[name], used, note)
        return values

    def _feature_metrics(self) -> dict[str, MetricValue]:
        reference, generated, indices = self._result("table")
        table = cast(FeatureTable, self.metrics["table"])
        kept = table.real(reference, self.kept_images)
        found: dict[str, MetricValue] = {}
        for family, options in self.options.items():
            if family not in OF_FEATURES:
                continue
            few = {name: value for name, value in options.items() if name != "images"}
            real, fake = kept, generated
            if "images" in options:
                real = table.real(reference, options["images"])
                fake = generated[: len(real)]
            groups = indices[: len(fake)] % self.num_groups
            pairs: tuple[tuple[Tensor, Tensor], ...]
            if family in ("kid", "kd"):
                pairs = (kernel_distance(real, fake, **few) if few else self._unbiased_kernel_distance(real, fake),)
            elif family == "precision_recall":
                pairs = precision_recall(real, fake, groups, **few)
            elif family == "density_coverage":
                pairs = density_coverage(real, fake, groups, **few)
            else:
                share, self.nearest = authenticity(reference, fake, groups)
                pairs = (share,)
            for key, (value, error) in zip(metric_keys(family, self.extractor.name), pairs, strict=True):
                found[key] = MetricValue(float(value), float(error), len(fake))
        return found

    def _unbiased_kernel_distance(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        if self._among_real is None:
            self._among_real = mean_kernel(real)
        return unbiased_kernel_distance(real, fake, self._among_real)

    def _result(self, name: str) -> Any:
        return cast(Metric, self.metrics[name]).compute()
