"""Facts that are written in more than one file agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmark import __version__

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ["benchmark", "datamodules", "systems", "leaderboard"]


def hook_revision(repository: str) -> str:
    """The revision that pre-commit takes of a repository."""
    config: dict[str, Any] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (revision,) = [repo["rev"] for repo in config["repos"] if repo["repo"].endswith(f"/{repository}")]
    return revision


@pytest.mark.parametrize(("tool", "repository"), [("ruff", "ruff-pre-commit"), ("codespell", "codespell")])
def test_hook_and_lint_use_the_same_version(tool: str, repository: str) -> None:
    pins = [line for line in PYPROJECT["project"]["optional-dependencies"]["dev"] if line.startswith(tool)]
    assert pins == [f"{tool}=={hook_revision(repository).removeprefix('v')}"]


def test_version_is_written_once() -> None:
    """CITATION.cff cannot read it, so it is compared."""
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "benchmark.__version__"}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_citation_names_the_authors_and_licence_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    authors = [author["name"] for author in citation["authors"]]
    assert authors == [author["name"] for author in PYPROJECT["project"]["authors"]]
    assert authors[0] in (ROOT / "LICENSE").read_text()
    assert citation["license"] == PYPROJECT["project"]["license"]


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_marked_as_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    assert PYPROJECT["tool"]["setuptools"]["package-data"]["*"] == ["py.typed"]


def test_ci_tests_the_oldest_python_that_is_allowed() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (lowest,) = [step["with"] for step in workflow["jobs"]["lowest"]["steps"] if "setup-python" in step.get("uses", "")]
    oldest = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"][0]
    assert PYPROJECT["project"]["requires-python"] == f">={oldest}"
    assert lowest["python-version"] == oldest


def test_every_make_target_of_ci_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for file in (".ci/run", ".github/workflows/ci.yml"):
        named = set(re.findall(r"\bmake ([a-z]+)", (ROOT / file).read_text()))
        assert named
        assert named <= targets
