from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from leaderboard.reports.published import Published, PublishedError, PublishedResult, read_published

METHODS = Path(__file__).parents[4] / "shared" / "methods"
SMALL: dict[str, Any] = {
    "sources": {"paper": {"name": "Paper", "citation": "A. Author", "url": "https://example.org"}},
    "protocols": {"theirs": "Some images."},
    "caveats": {"doubt": "A doubt.", "other": "Another."},
    "groups": [
        {
            "source": "paper",
            "table": "Table 1",
            "protocol": "theirs",
            "reproduced": "not tried",
            "dataset": "mnist",
            "caveats": ["doubt"],
            "results": [
                {"method": "A", "kind": "SNN", "metrics": {"fid": 3}, "num_steps": 4},
                {
                    "method": "B",
                    "kind": "ANN",
                    "metrics": {"fid": 4.5},
                    "table": "Table 2",
                    "reproduced": True,
                    "caveats": ["other"],
                },
            ],
        }
    ],
}


@pytest.fixture(scope="module")
def published() -> Published:
    return read_published()


@pytest.fixture
def page() -> Callable[[str], str]:
    """Reads a description of the papers; skips the test if it is missing."""

    def read(name: str) -> str:
        if not METHODS.exists():
            pytest.skip("the descriptions of the papers are not available here")
        return (METHODS / name).read_text()

    return read


def _rows(text: str, heading: str) -> list[list[str]]:
    """Returns the cells of the first table after a heading, without bold and footnote markup."""
    lines = text.split(heading, 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    stop = next((i for i, line in enumerate(lines[start:], start) if not line.startswith("|")), len(lines))
    table = [line for line in lines[start:stop] if not line.startswith("|---")]
    return [[re.sub(r"\*", "", cell).strip() for cell in line.strip().strip("|").split("|")] for line in table]


def _found(published: Published, **wanted: Any) -> list[PublishedResult]:
    return [r for r in published.results if all(getattr(r, key) == value for key, value in wanted.items())]


def test_each_result_has_the_fields_of_its_group(tmp_path: Path) -> None:
    file = tmp_path / "published.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    a, b = read_published(file).results
    assert (a.table, a.caveats, a.num_steps, a.metrics) == ("Table 1", ("doubt",), 4, {"fid": 3.0})
    assert (b.table, b.caveats, b.num_steps, b.dataset) == ("Table 2", ("doubt", "other"), None, "mnist")
    assert (a.reproduced, b.reproduced) == ("not tried", "yes")  # a bare `yes` in YAML is a boolean


def _set(data: Any, path: str, value: Any) -> None:
    *parents, last = (int(name) if name.isdigit() else name for name in path.split("."))
    for name in parents:
        data = data[name]
    if value is ...:
        del data[last]
    else:
        data[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("groups.0.results.0.metrics.fid", "3", r"field results\.0\.metrics\.fid: expected float, found '3' \(str\)"),
        ("groups.0.results.0.metrics", {}, r"field results\.0 .*: expected at least one metric"),
        ("groups.0.results.0.metrics.fid", float("inf"), r"field results\.0\.metrics\.fid: expected a finite number"),
        ("groups.0.results.0.kind", "snn", r"field results\.0\.kind: expected 'SNN' or 'ANN' or 'mixed', found 'snn'"),
        ("groups.0.results.1.fid", 3, r"field results\.1\.fid: unknown field; expected one of: method, "),
        ("groups.0.reproduced", ..., r"field results\.0\.reproduced: the field is missing"),
        (
            "groups.0.reproduced",
            "perhaps",
            r"field results\.0\.reproduced: expected 'yes' or 'no' or 'not tried', found",
        ),
        ("groups.0.dataset", ..., r"field results\.0\.dataset: the field is missing"),
        ("groups.0.source", "papr", r"field results\.0 .*: 'papr' is not defined under sources"),
        ("groups.0.results.1.caveats", ["typo"], r"field results\.1 .*: 'typo' is not defined under caveats"),
        ("groups.0.results.1.caveats", "other", r"field results\.1\.caveats: expected a list, found 'other'"),
        ("groups.0.protocol", "none", "'none' is not defined under protocols"),
        ("caveats.unused", "A text.", r"field caveats\.unused: no result uses it"),
        ("sources.paper.url", "javascript:alert(1)", r"field sources\.paper\.url: expected an https:// address"),
        ("groups.0.results", {}, r"field groups\.0: expected an object with a list of results"),
        ("groups", ..., "field results: the field is missing"),
    ],
)
def test_broken_field_is_named_with_its_file(tmp_path: Path, path: str, value: Any, message: str) -> None:
    data = deepcopy(SMALL)
    _set(data, path, value)
    file = tmp_path / "published.yaml"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(PublishedError, match=rf"published\.yaml: .*{message}"):
        read_published(file)


def test_duplicate_result_is_refused(tmp_path: Path) -> None:
    data = deepcopy(SMALL)
    data["groups"][0]["results"].append(data["groups"][0]["results"][0])
    file = tmp_path / "published.yaml"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(PublishedError, match=r"results\.2 \(A, mnist, Table 1\): the result occurs twice"):
        read_published(file)


@pytest.mark.parametrize("text", ["", "[]", "a: [", "groups: 3"])
def test_file_without_results_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "published.yaml"
    file.write_text(text)
    with pytest.raises(PublishedError, match=r"published\.yaml: "):
        read_published(file)


def test_shipped_numbers_are_plausible(published: Published) -> None:
    assert len(published.results) > 80
    for result in published.results:
        assert all(value > 0 for value in result.metrics.values()), result
        assert result.caveats or "quoted" in result.protocol or result.protocol == "paper-sddpm", result
        assert result.metrics.keys() <= {"fid", "is_mean", "fad_published", "precision", "recall"}, result
        assert (result.kind == "ANN") <= (result.num_steps is None), result


def test_every_row_of_the_sdm_overview_is_there(published: Published, page: Callable[[str], str]) -> None:
    names = {"MNIST": "mnist", "Fashion-MNIST": "fmnist", "LSUN bedroom": "lsun_bedroom", "CelebA": "celeba"}
    names["CIFAR-10"] = "cifar10"
    dataset, checked = "", 0
    for data, model, kind, parameters, steps, score, fid in _rows(page("sddpm_sdm.md"), "Table 1 (T =")[1:]:
        dataset = names[data] if data else dataset
        wanted = {"dataset": dataset, "num_steps": None if steps == "/" else int(steps), "kind": kind}
        match = [r for r in _found(published, **wanted) if r.metrics["fid"] == float(fid)]
        assert len(match) == 1, (dataset, model, fid)
        (result,) = match
        assert result.source == "sdm" or "SDM, Table 1" in result.also_in
        assert score == "-" or result.metrics["is_mean"] == float(score)
        assert parameters == "-" or result.parameters_m == float(parameters.split()[0])
        checked += 1
    assert checked == 39


def test_solvers_and_thresholds_of_sdm_are_there(published: Published, page: Callable[[str], str]) -> None:
    text = page("sddpm_sdm.md")
    (_, *steps), *solvers = _rows(text, "Table 6, solvers")
    methods = ["DDIM", "DDIM", "DPM-Solver", "Analytic-DPM"]
    for solver, (name, *values) in zip(methods, solvers, strict=True):
        kind = "ANN" if "ANN" in name else "SNN"
        for count, fid in zip(steps, values, strict=True):
            wanted = {"solver": solver, "sampling_steps": int(count), "kind": kind}
            found = _found(published, source="sdm", num_steps=None if kind == "ANN" else 8, **wanted)
            assert [r.metrics["fid"] for r in found] == [float(fid)], (name, count)
    (_, *thresholds), (_, *fids), (_, *scores) = _rows(text, "Table 3, threshold guidance")
    for threshold, fid, score in zip(thresholds[1:], fids[1:], scores[1:], strict=True):
        (result,) = _found(published, variant=f"threshold {threshold}")
        assert result.metrics == {"fid": float(fid), "is_mean": float(score)}


def test_ablation_conversion_and_energy_of_sdm_are_there(published: Published, page: Callable[[str], str]) -> None:
    text = page("sddpm_sdm.md")
    ablation = text.split("Table 5, ablation")[1].split("Table 6")[0]
    assert all(f"{r.metrics['fid']}" in ablation for r in _found(published, table="Table 5"))
    assert len(_found(published, table="Table 5")) == 4
    conversion = text.split("Table 2, direct")[1].split("Table 3")[0]
    for result in _found(published, table="Table 2"):
        assert f"{result.metrics['is_mean']}, {result.metrics['fid']}" in conversion
    assert len(_found(published, table="Table 2")) == 2
    energy = text.split("Table 4, energy")[1].split("Table 5")[0]
    with_energy = [r for r in published.results if r.energy_mj is not None]
    assert all(f"{r.metrics['fid']}, {r.energy_mj} mJ" in energy for r in with_energy)
    assert len(with_energy) == 3
    (retrained,) = _found(published, source="sddpm-issue-15")
    assert f"FID {retrained.metrics['fid']} / IS {retrained.metrics['is_mean']}" in text


def test_every_row_of_fsddim_is_there(published: Published, page: Callable[[str], str]) -> None:
    names = {"MNIST": "mnist", "FashionMNIST": "fmnist", "CIFAR-10": "cifar10", "CelebA": "celeba"}
    rows = _rows(page("fsddim.md"), "## 12. Published results")[1:]
    for data, steps, fid, fad in rows:
        (result,) = _found(published, source="fsddim", dataset=names[data], num_steps=int(steps))
        assert result.metrics == {"fid": float(fid), "fad_published": float(fad)}
    assert len(_found(published, source="fsddim")) == len(rows) == 7


def test_every_row_of_spiking_diffusion_is_there(published: Published, page: Callable[[str], str]) -> None:
    names = {"MNIST": "mnist", "FashionMNIST": "fmnist", "KMNIST": "kmnist", "Letters": "letters"}
    names["CIFAR-10"] = "cifar10"
    text = page("spiking_diffusion.md")
    rows = _rows(text, "## 8. Published results")[1:]
    for data, fid, reduction, baseline in rows:
        ours, theirs = (
            next(iter(_found(published, source="spiking-diffusion", dataset=names[data], method=method)))
            for method in ("Spiking-Diffusion", "FSVAE")
        )
        assert ours.metrics == {"fid": float(fid)}
        assert reduction in ours.note
        assert theirs.metrics == {"fid": float(baseline)}
        percent = float(reduction.rstrip("% "))
        assert theirs.metrics["fid"] * (1 - percent / 100) == pytest.approx(ours.metrics["fid"], rel=2e-3)
    assert len(rows) == 5
    (later,) = _found(published, source="public-leaderboard")
    for value in later.metrics.values():
        assert f"{value}" in text


def test_every_figure_of_sdit_is_there(published: Published, page: Callable[[str], str]) -> None:
    (line,) = (line for line in page("sdit.md").splitlines() if line.startswith("- (P) Results"))
    for dataset, name in {"mnist": "MNIST", "fmnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}.items():
        (result,) = _found(published, source="sdit", dataset=dataset)
        assert re.search(rf"{result.metrics['fid']} on {name}\b", line)
