"""Identifies code outside the suite that a result depends on: its package, version, git commit and source files."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, requires
from pathlib import Path
from typing import Any

from torch import nn

from datamodules.own import FromDataset
from leaderboard.files import canonical_sha256, file_sha256

DISTRIBUTION = "spiking-diffusion-benchmark"
_ROOT = Path(__file__).parents[2]
SUITE_PACKAGES = frozenset({"benchmark", "datamodules", "leaderboard", "systems"})


@dataclass(frozen=True)
class ExternalCode:
    """A package outside the suite that a result depends on.

    Args:
        distribution: Name of the installed distribution; `None` if the code is not installed.
        version: Version of the distribution.
        git_commit: Commit of the checkout that tracks the code; `None` outside one.
        git_dirty: Whether its source files differ from that commit, new ones included.
        sha256: `canonical_sha256` of the SHA-256 of each source file of the package by relative path.
    """

    distribution: str | None
    version: str | None
    git_commit: str | None
    git_dirty: bool | None
    sha256: str

    def __str__(self) -> str:
        """Version, commit and start of the hash, in parentheses."""
        version = f"{self.distribution} {self.version}" if self.distribution else "not a distribution"
        commit = (
            f"commit {self.git_commit[:8]}{' with changes' * bool(self.git_dirty)}" if self.git_commit else "no commit"
        )
        return f"({version}, {commit}, source {self.sha256[:8]})"


def external_code(system: nn.Module, data: Any, config: Any = None) -> dict[str, ExternalCode]:
    """Returns the packages outside the suite that a result depends on, by import name.

    These define a class, or a base of a class, of the method, its layers, its attributes such as the sampler, the data
    module or its dataset, or a `class_path` of the configuration. The packages that the suite itself requires are left
    out: records contain their versions. All source files of a package count, since a class may use any of them; of a
    module that belongs to no package, its own file.

    Args:
        system: The method.
        data: Data module.
        config: Resolved configuration, as JSON.
    """
    used = [data, *system.modules(), *(value for module in system.modules() for value in vars(module).values())]
    modules = {base.__module__ for cls in map(type, used) for base in cls.__mro__} | set(_class_paths(config))
    modules |= {data.dataset} if isinstance(data, FromDataset) else set()
    names = sorted({module.partition(".")[0] for module in modules} - SUITE_PACKAGES - sys.stdlib_module_names)
    return {name: _identify(name) for name in names if name not in _required_packages()}


def _class_paths(config: Any) -> Iterator[str]:
    """Yields every class path in a configuration."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if key == "class_path" and isinstance(value, str):
            yield value
        yield from _class_paths(value)
    for item in config if isinstance(config, list) else ():
        yield from _class_paths(item)


@cache
def _required_packages() -> frozenset[str]:
    """Import names of everything that the suite requires, directly or through other packages."""
    names: set[str] = set()
    left = [DISTRIBUTION]
    while left:
        if (name := left.pop()) not in names:
            names.add(name)
            left += [_normal(re.split(r"[^\w.-]", text, maxsplit=1)[0]) for text in _requirements(name)]
    return frozenset(
        package
        for package, distributions in packages_distributions().items()
        if any(_normal(d) in names for d in distributions)
    )


def _requirements(name: str) -> list[str]:
    """Returns the requirements of a distribution without its extras; none if it is not installed."""
    try:
        return [text for text in requires(name) or [] if "extra ==" not in text]
    except PackageNotFoundError:
        if name != DISTRIBUTION:
            return []
    needed: list[str] = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return needed


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _identify(name: str) -> ExternalCode:
    file = getattr(sys.modules.get(name), "__file__", None)
    folders = list(getattr(sys.modules.get(name), "__path__", []))  # a namespace package has no file
    root = Path(folders[0]) if folders else Path(file).parent if file else None
    files = sorted(Path(folders[0]).rglob("*.py")) if folders else [Path(file)] if file else []
    sources = {path.relative_to(root).as_posix(): file_sha256(path) for path in files} if root else {}
    found = packages_distributions().get(name, [None])[0]
    commit, dirty = _git(root, files) if root else (None, None)
    return ExternalCode(found, distribution(found).version if found else None, commit, dirty, canonical_sha256(sources))


def _git(root: Path, files: list[Path]) -> tuple[str | None, bool | None]:
    """Returns the commit of the checkout that tracks any of these files, and whether its sources differ."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not files or not git("ls-files", "--", *map(str, files[:100])):
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", ":(glob)**/*.py"))
    except (OSError, subprocess.CalledProcessError):
        return None, None
