"""Evaluation protocols: named, immutable descriptions of how a number was measured, with a hash that records carry.

Results under different protocols never share a table. What belongs to a method's entry (solver, number of function
evaluations, SNN time steps) is part of the record and not of the protocol.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

INCEPTION = "inception-v3-compat"
"""Name of torch-fidelity's port of the 2015 Inception network, whose Fréchet distance alone is called FID."""

SUITE = "suite"
"""Stands for the extractor that the suite ships for the dataset."""

INCEPTION_SCORE_DATASETS = ("cifar10",)
"""Datasets with classes near ImageNet's; elsewhere the Inception score means nothing."""


def canonical_sha256(value: Any) -> str:
    """Returns the SHA-256 of a JSON value, independent of key order and spacing."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Protocol:
    """How images are compared, whatever the method and the dataset.

    Args:
        name: Name with a version; a changed protocol gets a new name.
        num_samples: Generated images; fewer make a draft, which is never ranked.
        max_samples: Generated images above which a run is no longer this protocol.
        extractor: `"inception-v3-compat"`, or `"suite"` for the extractor shipped for the dataset.
        resize: How images reach the size that the extractor takes.
        metrics: Metrics computed, by family: `"fid"`, `"kid"`, `"is"` with Inception, `"fd"`, `"kd"` with the suite's.
        reference_split: Split of real images, used whole.
        quantisation: Data type and range of the compared images.
        sample_seed: Seed from which the noise of image `k` is derived.
        jackknife_groups: Groups of generated images (image `k` in group `k % groups`) behind the Fréchet uncertainty.
        kernel_subsets: Random subsets of the kernel distance.
        kernel_subset_size: Images of each subset.
        kernel_images: First images, generated and real, that feed the kernel distance.
        score_splits: Splits of the Inception score (image `k` in split `k % splits`).
    """

    name: str
    num_samples: int
    max_samples: int
    extractor: str
    resize: str
    metrics: tuple[str, ...]
    reference_split: str = "train"
    quantisation: str = "uint8, round((x + 1) * 127.5) clipped to 0..255"
    sample_seed: int = 0
    jackknife_groups: int = 10
    kernel_subsets: int = 100
    kernel_subset_size: int = 1000
    kernel_images: int = 10_000
    score_splits: int = 10

    def description(self) -> dict[str, Any]:
        """Returns the whole protocol as a JSON object, as records carry it."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def sha256(self) -> str:
        """Hash of the description."""
        return canonical_sha256(self.description())

    def metrics_for(self, dataset: str) -> tuple[str, ...]:
        """Returns the metrics that mean something on a dataset: the Inception score is left out where it does not."""
        return tuple(m for m in self.metrics if m != "is" or dataset in INCEPTION_SCORE_DATASETS)

    def is_draft(self, num_samples: int) -> bool:
        """Whether a run with so many generated images is a draft.

        Raises:
            ValueError: If there are more images than the protocol allows.
        """
        if num_samples > self.max_samples:
            raise ValueError(
                f"{num_samples} generated images are not the protocol {self.name!r}, which takes {self.num_samples} "
                f"to {self.max_samples}; generate at most {self.max_samples}"
            )
        return num_samples < self.num_samples


STANDARD_V1 = Protocol(
    name="standard-v1",
    num_samples=50_000,
    max_samples=50_000,
    extractor=INCEPTION,
    resize="torch-fidelity's TensorFlow 1 bilinear to 299x299; grey replicated to 3 channels",
    metrics=("fid", "kid", "is"),
)
"""The default: 50,000 images at native resolution against the whole train split."""

OFFLINE_V1 = Protocol(
    name="offline-v1",
    num_samples=2_000,
    max_samples=10_000,
    extractor=SUITE,
    resize="none",
    metrics=("fd", "kd"),
)
"""No download anywhere: the suite's own extractor. Its distance is never called FID."""
