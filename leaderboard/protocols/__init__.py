"""Evaluation protocols: named, immutable descriptions of how results are measured, one YAML file each.

Every result has a protocol, and results under different protocols never share a table. The settings of a method's entry
(solver, number of function evaluations, SNN time steps) are part of the record and not of the protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from leaderboard.locked import Locked, read_locked

INCEPTION = "inception-v3-compat"
"""Name of torch-fidelity's port of the 2015 Inception network; only its Fréchet distance is called FID."""

TORCHVISION = "torchvision"
"""Name of torchvision's Inception network, whose weights differ from the 2015 network's."""

SUITE = "suite"
"""Placeholder for the classifier that the suite ships for the dataset."""

AUTOENCODER = "suite-autoencoder"
"""Placeholder for the suite's denoising autoencoder of the dataset, which needs no labels."""

DINOV2 = "dinov2-vit-l-14"
"""Name of torch-fidelity's DINOv2 network."""

FOLDER = Path(__file__).parent
"""Folder of the protocol files, `<name>.yaml`."""

LOCKED = {
    "standard-v3": "21f5f6c388da01de22f4ecd8d2e517a55854a626af8c6496ad76a4ec0805bbd8",
    "offline-v3": "075dee741bb0e5aba05127b230f8987368961c3a9581169309a3e93436cd6c1a",
    "standard-v1": "34f9e30f29a01c2bbb8ec5ee8c8e3709a653f1f397163d69a14d33b78d30ea59",
    "offline-v1": "1ce16feafdec348dc58aedecb87633f841c7186b32850a3cfb5dd245dc344e87",
    "standard-v2": "d5de938eabb3094d9520f4c89f139d306774373ccc90a32d3c745218236c285d",
    "offline-v2": "6f8ff1c941f3d0eb08ba8e1062f0e26b92b9704f11ccee421bdd694905adcbcd",
    "paper-sddpm": "2967d1b73a0f13a52ddcf71e0bffae46cc069a63a5ab3a3739f34acfca8f1e13",
    "paper-fsddim": "4df4ffb5a116320111eae6efb407f5314bc5a2d76393ac431326b031a5454df4",
    "paper-sdit": "7e5de453955622a9fd97c838ada56e213f2b609bd8ef77a23e9b8924479c0a38",
    "paper-spiking-diffusion": "a3e21a41cf665cf672c7afe10281107527c87e26f7a1a77a9e88e5a8484fb489",
}
"""Hash of each shipped protocol. Protocols never change: a changed one needs a new name."""

SUPERSEDED_BY = {
    "standard-v1": "standard-v2",
    "offline-v1": "offline-v2",
    "standard-v2": "standard-v3",
    "offline-v2": "offline-v3",
}
"""Protocols that have a successor. Their records stay valid and readable, in tables of their own."""

FAULTS = {
    ("mnist", name): "Its kernel distances, density and coverage use unrepresentative real images: read the Fréchet "
    "distances."
    for name in ("standard-v2", "offline-v2")
}
"""Known faults of results, by dataset and protocol."""

ProtocolName = Literal[
    "standard-v3",
    "offline-v3",
    "standard-v2",
    "offline-v2",
    "standard-v1",
    "offline-v1",
    "paper-sddpm",
    "paper-fsddim",
    "paper-sdit",
    "paper-spiking-diffusion",
]


@dataclass(frozen=True)
class Reference:
    """Real images to compare with.

    Args:
        split: Split of the dataset, in its order.
        split_of: Exceptions: the split of each dataset that uses another one.
        images: Number of images, the first ones of the split; None uses the whole split.
        mirrored: Datasets whose images are mirrored with probability 1/2, each with its random seed.
    """

    split: str
    split_of: dict[str, str]
    images: int | None
    mirrored: dict[str, int]


@dataclass(frozen=True)
class View:
    """One feature extractor and the metrics that are computed from its features.

    Args:
        extractor: `"inception-v3-compat"`, `"torchvision"`, `"dinov2-vit-l-14"`, or what is shipped for the dataset:
            `"suite"` for the classifier, `"suite-autoencoder"` for the autoencoder.
        weights: First digits of the SHA-256 of the weights file; empty for the suite's own.
        input: Preprocessing of the images: `"torch-fidelity"`, `"bilinear"`, `"clean"`, `"twice"`, `"unit"` or `"own"`
            (`leaderboard.extractors.inception`).
        about: Description of extractor and preprocessing in words.
        kept_images: Number of images whose features are stored for the metrics of features: the first generated ones,
            and as many real ones.
        metrics: Families of metrics with their parameters (`leaderboard.metrics.generation`); `datasets` restricts a
            metric to the datasets on which it is meaningful.
    """

    extractor: str
    weights: str
    input: str
    about: str
    kept_images: int
    metrics: dict[str, dict[str, Any]]

    def extractor_name(self, dataset: str) -> str:
        """Returns the name of the extractor in records and metric keys."""
        own = {SUITE: dataset, AUTOENCODER: f"{dataset}_ae", DINOV2: "dinov2"}
        return own.get(self.extractor, self.extractor)

    def metrics_for(self, dataset: str) -> dict[str, dict[str, Any]]:
        """Returns the metrics that are meaningful on a dataset, each with its parameters."""
        chosen = {
            name: options for name, options in self.metrics.items() if dataset in options.get("datasets", [dataset])
        }
        return {name: {k: v for k, v in options.items() if k != "datasets"} for name, options in chosen.items()}


@dataclass(frozen=True)
class Protocol(Locked):
    """How images are compared, whatever the method.

    Args:
        name: Name with a version; a changed protocol needs a new name.
        title: Description in one line.
        num_samples: Number of generated images; a run with fewer is a draft, which never ranks.
        max_samples: Largest number of generated images under this protocol.
        sample_seed: Image `k` is generated from the seed `sample_seed + k`.
        size: Side length in pixels at which the images of each dataset are compared; empty for native size.
        resolution: How images are resized, in words.
        quantisation: Conversion of generated images `x` in [-1, 1] to [0, 255]: `"round"` to uint8 by
            `round((x + 1) * 127.5)`, clipped; `"truncate"` the same without rounding; `"none"` keeps floats, which may
            exceed the range.
        reference: Real images.
        views: Feature extractors with their metrics.
        fad: Fréchet autoencoder distances, computed if the published autoencoder is available.
        reconstruction: Metrics of the method's own autoencoder on the test split, for methods that have one.
        jackknife_groups: Number of groups of generated images (image `k` in group `k % groups`); leaving out each in
            turn yields the uncertainty of Fréchet distances, precision and recall.
        notes: Caveats for the reader, such as mistakes of a release and details it does not specify.
        reference_seed: Seed by which the real images for the metrics of features are drawn from the reference; None
            spreads them evenly over it.
    """

    title: str
    num_samples: int
    max_samples: int
    sample_seed: int
    size: dict[str, int]
    resolution: str
    quantisation: Literal["round", "truncate", "none"]
    reference: Reference
    views: tuple[View, ...]
    fad: tuple[str, ...]
    reconstruction: tuple[str, ...]
    jackknife_groups: int
    notes: tuple[str, ...]
    reference_seed: int | None = None

    def description(self) -> dict[str, Any]:
        """Returns the whole description as a JSON object."""
        found = super().description()
        if self.reference_seed is None:  # which earlier protocols do not mention
            del found["reference_seed"]
        return found

    @property
    def superseded_by(self) -> str | None:
        """Name of the protocol that replaces this one; None if there is none."""
        return SUPERSEDED_BY.get(self.name)

    def reference_split(self, dataset: str) -> str:
        """Returns the split of a dataset that generated images are compared with."""
        return self.reference.split_of.get(dataset, self.reference.split)

    def deviations(self, dataset: str, native: int, size: int, num_samples: int, sample_seed: int) -> list[str]:
        """Describes each deviation of a run from the protocol in words; a run without any may rank.

        Args:
            dataset: Name of the dataset.
            native: Native side length of its images in pixels.
            size: Side length in pixels at which images are compared.
            num_samples: Number of images to generate.
            sample_seed: Seed of the first image.

        Raises:
            ValueError: If there are more images than the protocol allows.
        """
        if num_samples > self.max_samples:
            raise ValueError(
                f"{num_samples} generated images are not the protocol {self.name!r}, which takes {self.num_samples} "
                f"to {self.max_samples}; generate at most {self.max_samples}: --data.num_samples {self.max_samples}"
            )
        found = []
        if num_samples < self.num_samples:
            found.append(f"it takes {self.num_samples:,} generated images, not {num_samples:,}")
        expected = self.size.get(dataset, None if self.size else native)
        if expected is None:
            found.append(f"it is defined for {', '.join(self.size)}, not for {dataset}")
        elif size != expected:
            way = (
                "leave out --data.fit resize"
                if expected == native
                else f"--data.image_size {expected} --data.fit resize"
            )
            found.append(f"it compares {dataset} at {expected}x{expected} pixels, not {size}x{size} ({way})")
        if sample_seed != self.sample_seed:
            found.append(f"its first image has the seed {self.sample_seed}, not {sample_seed}")
        return found


def read_protocol(path: Path) -> Protocol:
    """Reads a protocol and checks its hash against the one published under its name.

    Raises:
        ValueError: If the file is not a protocol, or was changed.
    """
    return read_locked(Protocol, path, LOCKED, "a protocol")


PROTOCOLS = {name: read_protocol(FOLDER / f"{name}.yaml") for name in LOCKED}
"""All protocols of the suite by name."""

STANDARD_V3 = PROTOCOLS["standard-v3"]
"""The default: 50,000 images at native resolution against the whole train split."""

OFFLINE_V3 = PROTOCOLS["offline-v3"]
"""Needs no download: the suite's own extractors, whose distances are never called FID."""

STANDARD_V2 = PROTOCOLS["standard-v2"]
"""Superseded by `STANDARD_V3`."""

OFFLINE_V2 = PROTOCOLS["offline-v2"]
"""Superseded by `OFFLINE_V3`; its Fréchet distances and authenticity are the same."""

STANDARD_V1 = PROTOCOLS["standard-v1"]
"""Superseded by `STANDARD_V2`."""

OFFLINE_V1 = PROTOCOLS["offline-v1"]
"""Superseded by `OFFLINE_V2`."""
