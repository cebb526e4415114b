"""Published results with source, protocol and known caveats; stored separately from measured records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from leaderboard.schema import SchemaError, from_json

PUBLISHED: Final = Path(__file__).parents[1] / "data" / "published.yaml"


class PublishedError(ValueError):
    """A file of published results violates the schema; the message names the file and the field."""


@dataclass(frozen=True)
class Source:
    """Source of published results.

    Args:
        name: Short name.
        citation: Authors, title, venue and year.
        url: Web address, if it has one.
    """

    name: str
    citation: str
    url: str | None = None


@dataclass(frozen=True)
class PublishedResult:
    """One published result; `None` where the source states no value.

    Args:
        method: Name of the method.
        kind: Spiking network (SNN), artificial network (ANN), or mixed.
        dataset: Name of the dataset, spelled as by the suite's datamodule if it has one.
        metrics: Printed values by the suite's metric keys; their uncertainty is unknown.
        source: Key in `Published.sources`.
        table: Table or section in the source.
        protocol: Key in `Published.protocols`; results under different protocols never share a table.
        reproduced: Whether this suite, with the method and settings of the source, has reproduced the figure.
        variant: Distinguishes this row from others of the method.
        resolution: Side of the compared images in pixels.
        num_steps: SNN time steps `T`.
        solver: Sampler of the denoising chain.
        sampling_steps: Diffusion steps, one network evaluation each; released samplers may add one more at the end.
        parameters_m: Parameters in "M" as printed; the unit may differ between sources.
        energy_mj: Energy in mJ as printed; a caveat states what it covers.
        also_in: Other places that print the same numbers; may be empty.
        note: Further information printed about this row; may be empty.
        caveats: Keys in `Published.caveats`.
    """

    method: str
    kind: Literal["SNN", "ANN", "mixed"]
    dataset: str
    metrics: dict[str, float]
    source: str
    table: str
    protocol: str
    reproduced: Literal["yes", "no", "not tried"]
    variant: str = ""
    resolution: int | None = None
    num_steps: int | None = None
    solver: str | None = None
    sampling_steps: int | None = None
    parameters_m: float | None = None
    energy_mj: float | None = None
    also_in: str = ""
    note: str = ""
    caveats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """All published results, in the order of their sources' tables.

    Args:
        sources: Papers and other sources, by key.
        protocols: Descriptions of how results were measured, by name.
        caveats: Known problems of results, by key.
        results: The results.
    """

    sources: dict[str, Source]
    protocols: dict[str, str]
    caveats: dict[str, str]
    results: tuple[PublishedResult, ...]


def read_published(path: str | Path = PUBLISHED) -> Published:
    """Reads and validates a file of published results.

    Raises:
        PublishedError: If the file is not valid YAML, violates the schema, refers to an undefined source, protocol or
            caveat, defines one that no result uses, or contains a result twice.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise PublishedError(f"{path}: not a readable YAML file ({error})") from error
    try:
        if isinstance(data, dict) and "groups" in data:
            data["results"] = _results(data.pop("groups"))
        published = from_json(Published, data)
        _check(published)
    except SchemaError as error:
        raise PublishedError(f"{path}: field {error}") from error
    return published


def _results(groups: Any) -> list[dict[str, Any]]:
    """Returns the results of all groups, each with the fields shared by its group."""
    results = []
    for i, group in enumerate(groups if isinstance(groups, list) else [groups]):
        if not isinstance(group, dict) or not isinstance(group.get("results"), list):
            raise SchemaError(f"groups.{i}: expected an object with a list of results")
        shared = {key: value for key, value in group.items() if key != "results"}
        for j, result in enumerate(group["results"]):
            if not isinstance(result, dict):
                raise SchemaError(f"groups.{i}.results.{j}: expected an object, found {result!r}")
            both = shared | result
            lists = [part["caveats"] for part in (shared, result) if isinstance(part.get("caveats"), list)]
            if len(lists) == 2:
                both["caveats"] = [*lists[0], *lists[1]]
            if isinstance(answer := both.get("reproduced"), bool):  # YAML reads a bare yes or no as a boolean
                both["reproduced"] = "yes" if answer else "no"
            results.append(both)
    return results


def _check(published: Published) -> None:
    """Checks constraints that the field types do not express."""
    for key, source in published.sources.items():
        if source.url is not None and not source.url.startswith("https://"):
            raise SchemaError(f"sources.{key}.url: expected an https:// address, found {source.url!r}")
    used: dict[str, set[str]] = {"sources": set(), "protocols": set(), "caveats": set()}
    seen: list[PublishedResult] = []
    for i, result in enumerate(published.results):
        where = f"results.{i} ({result.method}, {result.dataset}, {result.table})"
        named = {"sources": (result.source,), "protocols": (result.protocol,), "caveats": result.caveats}
        for section, names in named.items():
            for name in names:
                if name not in getattr(published, section):
                    raise SchemaError(f"{where}: {name!r} is not defined under {section}; define it or correct it")
            used[section].update(names)
        if not result.metrics:
            raise SchemaError(f"{where}: expected at least one metric")
        if result in seen:
            raise SchemaError(f"{where}: the result occurs twice; remove one")
        seen.append(result)
    for section, found in used.items():
        if unused := sorted(getattr(published, section).keys() - found):
            raise SchemaError(f"{section}.{unused[0]}: no result uses it; remove it or correct the spelling")
