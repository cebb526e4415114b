"""Evaluation protocols: named, immutable descriptions of how a number was measured, one YAML file each beside this.

Results under different protocols never share a table, and a result without one is none. What belongs to a method's
entry (solver, number of function evaluations, SNN time steps) is part of the record and not of the protocol.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from leaderboard.files import canonical_sha256
from leaderboard.schema import SchemaError, from_json

INCEPTION = "inception-v3-compat"
"""Name of torch-fidelity's port of the 2015 Inception network, whose Fréchet distance alone is called FID."""

TORCHVISION = "torchvision"
"""Name of torchvision's Inception network, trained otherwise on other images."""

SUITE = "suite"
"""Stands for the extractor that the suite ships for the dataset."""

FOLDER = Path(__file__).parent
"""Folder of the files, `<name>.yaml`."""

LOCKED = {
    "standard-v1": "34f9e30f29a01c2bbb8ec5ee8c8e3709a653f1f397163d69a14d33b78d30ea59",
    "offline-v1": "1ce16feafdec348dc58aedecb87633f841c7186b32850a3cfb5dd245dc344e87",
    "paper-sddpm": "2967d1b73a0f13a52ddcf71e0bffae46cc069a63a5ab3a3739f34acfca8f1e13",
    "paper-fsddim": "4df4ffb5a116320111eae6efb407f5314bc5a2d76393ac431326b031a5454df4",
    "paper-spiking-diffusion": "a3e21a41cf665cf672c7afe10281107527c87e26f7a1a77a9e88e5a8484fb489",
}
"""Hash of each shipped description. A protocol never changes: another one gets another name."""

ProtocolName = Literal["standard-v1", "offline-v1", "paper-sddpm", "paper-fsddim", "paper-spiking-diffusion"]


@dataclass(frozen=True)
class Reference:
    """Real images to compare with.

    Args:
        split: Split of the dataset, in its order.
        split_of: Split of single datasets, where it is another one.
        images: First images that are taken; none takes the whole split.
        mirrored: Datasets whose images are mirrored with probability 1/2, with the seed of the draws.
    """

    split: str
    split_of: dict[str, str]
    images: int | None
    mirrored: dict[str, int]


@dataclass(frozen=True)
class View:
    """One network that looks at the images, and what is measured on its features.

    Args:
        extractor: `"inception-v3-compat"`, `"torchvision"`, or `"suite"` for the one shipped for the dataset.
        weights: Beginning of the SHA-256 of the file of weights; empty where the suite ships its own.
        input: How images reach the network: `"torch-fidelity"`, `"bilinear"`, `"clean"`, `"twice"`, `"unit"` or `"own"`
            (`leaderboard.extractors.inception`).
        about: The same in words.
        kept_images: Images, generated (the first) and real (evenly spread over the reference), whose features are kept
            for kernel distance, precision and recall.
        metrics: Families of metrics with their parameters (`leaderboard.metrics.generation`); `datasets` names those on
            which a metric means something, where it does not on all.
    """

    extractor: str
    weights: str
    input: str
    about: str
    kept_images: int
    metrics: dict[str, dict[str, Any]]

    def metrics_for(self, dataset: str) -> dict[str, dict[str, Any]]:
        """Returns the metrics that mean something on a dataset, each with its parameters."""
        chosen = {
            name: options for name, options in self.metrics.items() if dataset in options.get("datasets", [dataset])
        }
        return {name: {k: v for k, v in options.items() if k != "datasets"} for name, options in chosen.items()}


@dataclass(frozen=True)
class Protocol:
    """How images are compared, whatever the method.

    Args:
        name: Name with a version; a changed protocol gets a new name.
        title: What it is, in a line.
        num_samples: Generated images; fewer make a draft, which never ranks.
        max_samples: Generated images above which a run is no longer this protocol.
        sample_seed: Seed from which the noise of image `k` is derived, as `sample_seed + k`.
        size: Side length in pixels at which the images of each dataset are compared; empty for the dataset's own.
        resolution: How images get that size, in words.
        quantisation: What becomes of generated images in [-1, 1]: `"round"` to uint8 by `round((x + 1) * 127.5)`,
            clipped, `"truncate"` the same without rounding, or `"none"` for floats that may leave the range.
        reference: Real images.
        views: Networks, and what is measured on the features of each.
        fad: Fréchet autoencoder distances, where the published autoencoder is at hand.
        reconstruction: Measures of the autoencoder of methods that have one, on the test split.
        jackknife_groups: Groups of generated images (image `k` in group `k % groups`), each left out in turn, behind
            the uncertainty of Fréchet distances, precision and recall.
        notes: What a reader must know: mistakes of a release, and what it leaves open.
    """

    name: str
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

    def description(self) -> dict[str, Any]:
        """Returns the whole protocol as a JSON object, as records carry it."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def sha256(self) -> str:
        """Hash of the description."""
        return canonical_sha256(self.description())

    def reference_split(self, dataset: str) -> str:
        """Returns the split of a dataset that images are compared with."""
        return self.reference.split_of.get(dataset, self.reference.split)

    def departures(self, dataset: str, native: int, size: int, num_samples: int, sample_seed: int) -> list[str]:
        """Returns in words what a run does otherwise than the protocol: nothing for a run that may rank.

        Args:
            dataset: Name of the dataset.
            native: Its own side length in pixels.
            size: Side length in pixels at which images are compared.
            num_samples: Images to generate.
            sample_seed: Seed of the first.

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
    """Reads a protocol and checks that it is the one that was published under its name.

    Raises:
        ValueError: If the file is no protocol, or was changed.
    """
    try:
        protocol = from_json(Protocol, yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, SchemaError) as error:
        raise ValueError(f"{path} is not a protocol ({error}); restore the file") from error
    if protocol.sha256 != LOCKED.get(path.stem) or protocol.name != path.stem:
        raise ValueError(
            f"{path} was changed: its description has the hash {protocol.sha256}, expected {LOCKED.get(path.stem)}. "
            "Protocols are immutable: restore the file, and make a new version under a new name"
        )
    return protocol


PROTOCOLS = {name: read_protocol(FOLDER / f"{name}.yaml") for name in LOCKED}
"""Every protocol of the suite by its name."""

STANDARD_V1 = PROTOCOLS["standard-v1"]
"""The default: 50,000 images at native resolution against the whole train split."""

OFFLINE_V1 = PROTOCOLS["offline-v1"]
"""No download anywhere: the suite's own extractor. Its distance is never called FID."""
