"""Studies: designs that are fixed before the first run, and the files that belong to them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from benchmark.configs import design_of
from leaderboard.files import write_atomic
from leaderboard.schema import SchemaError, from_json

CURVES = "curves"
"""Folder within the results with everything that is not a ranked record."""


@dataclass(frozen=True)
class Search:
    """Search of learning rate and averaging, the same for every method.

    Args:
        dataset: Dataset on which is searched; the choice is used on all.
        seed: Seed of training.
        learning_rates: Values to try.
        decay: Decay of averaged weights.
        options: Options of `fit` that shorten the training.
    """

    dataset: str
    seed: int
    learning_rates: tuple[float, ...]
    decay: float
    options: dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """Tests of some checkpoints of a training.

    Args:
        steps: Training steps of the checkpoints.
        seeds: Seeds of the trainings that are measured.
        draft: Whether the test deviates from its protocol, as with fewer images; never ranked.
        half: Whether the weights are rounded to 16 bits before, as they are in the zoo.
        options: Options of `test`.
    """

    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    draft: bool = False
    half: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """A method in a study.

    Args:
        config: Method whose configuration and learning rate are used, if not its own.
        options: Options of `fit`.
        datasets: Datasets, if not all.
        without: Measurements that are left out.
        instead: Options of `search`, or of a measurement, in place of the study's.
    """

    config: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    datasets: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    instead: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Content of a design file.

    Args:
        name: Name with version; a changed design needs another one.
        steps: Training steps.
        batch_size: Images in a training step.
        decay: Decay of averaged weights, if the search chooses them.
        search: Search of the learning rate.
        measurements: Measurements by name, in the order in which they are made.
        datasets: Seeds of training, by dataset.
        zoo: Datasets whose models are published in the zoo: one for each method, trained with the seed of the search.
            Its weights are those that the first measurement with rounded weights tested.
        methods: Methods by name, those with the longest trainings first.
    """

    name: str
    steps: int
    batch_size: int
    decay: float
    search: Search
    measurements: dict[str, Measurement]
    datasets: dict[str, tuple[int, ...]]
    zoo: tuple[str, ...]
    methods: dict[str, Member]

    @property
    def rounded(self) -> str | None:
        """First measurement with rounded weights, or None."""
        return next((name for name, measurement in self.measurements.items() if measurement.half), None)


@dataclass(frozen=True)
class Place:
    """A study with its files.

    Args:
        path: Design file.
        study: Its content.
        roots: `--data.root` of datasets.
        output: Folder of the runs.
        results: Folder of what is found, which belongs into the repository.
    """

    path: Path
    study: Study
    roots: dict[str, str]
    output: Path
    results: Path

    @cached_property
    def design(self) -> dict[str, str]:
        """Name and hash of the design."""
        design = design_of(self.path)
        assert design is not None, "read_study requires a name"
        return design

    def config(self, method: str, dataset: str) -> Path:
        """Returns the configuration file of a method; the design may name another method's."""
        return self.path.parent / f"{self.study.methods[method].config or method}_{dataset}.yaml"

    def data_root(self, dataset: str) -> list[str]:
        """Returns the option that names the folder of a dataset; nothing if it is not given."""
        return [f"--data.root={self.roots[dataset]}"] if dataset in self.roots else []

    @property
    def curves(self) -> Path:
        """Folder of what is found, except for ranked records."""
        return self.results / CURVES / self.study.name

    @property
    def zoo(self) -> Path:
        """Folder of the zoo that belongs to the results."""
        return self.results.parent / "zoo"


def read_study(path: Path) -> Study:
    """Reads and checks a design.

    Raises:
        FileNotFoundError: If the file, or a configuration that it names, does not exist.
        ValueError: If it is malformed; names the field.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--design {path} is not a file; give the design of a study, such as design.yaml")
    try:
        study = from_json(Study, yaml.safe_load(path.read_text(encoding="utf-8")))
    except (SchemaError, yaml.YAMLError) as error:
        raise ValueError(f"--design {path}: {error}") from None
    names = {"search", *study.measurements}
    for name, member in study.methods.items():
        if unknown := sorted({*member.without, *member.instead} - names):
            raise ValueError(f"--design {path}: methods.{name} names {unknown[0]}; known: {', '.join(sorted(names))}")
        for dataset in member.datasets or study.datasets:
            if not (config := path.parent / f"{member.config or name}_{dataset}.yaml").is_file():
                raise FileNotFoundError(f"--design {path}: methods.{name} needs {config}, which does not exist")
    return study


def check_unchanged(place: Place) -> None:
    """Checks that no result was made under another version of the design.

    Raises:
        ValueError: If there is one.
    """
    found = [*place.curves.glob("search/*.json"), *place.curves.glob("trainings/*.json")]
    for path in sorted(found):
        design = read_json(path)["design"]
        if design != place.design:
            raise ValueError(
                f"{path} was made with other files of {place.path.parent}/ ({design['sha256'][:8]}, not "
                f"{place.design['sha256'][:8]}); restore them, or give the changed design another name in {place.path}"
            )


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file of the results."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file of the results."""
    write_atomic(path, json.dumps(content, indent=1, sort_keys=True) + "\n")
