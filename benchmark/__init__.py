"""The spiking diffusion benchmark: its command line (`python -m benchmark`) and its Python interface.

Everything a user needs can be imported from here; the names are resolved on first use, because torch takes seconds to
import.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmark.api import load as load
    from benchmark.api import measure as measure
    from benchmark.api import records as records
    from benchmark.api import sample as sample
    from datamodules import ImageDataModule as ImageDataModule
    from systems.base import DiffusionSystem as DiffusionSystem
    from systems.diffusion.gaussian import GaussianDiffusion as GaussianDiffusion
    from systems.spiking.adapter import multistep as multistep
    from systems.spiking.neurons import SpikingLayer as SpikingLayer

__version__ = "0.2.0"

_EXPORTS = {
    "load": "benchmark.api",
    "sample": "benchmark.api",
    "measure": "benchmark.api",
    "records": "benchmark.api",
    "DiffusionSystem": "systems.base",
    "GaussianDiffusion": "systems.diffusion.gaussian",
    "ImageDataModule": "datamodules",
    "SpikingLayer": "systems.spiking.neurons",
    "multistep": "systems.spiking.adapter",
}
"""Modules of the names that `benchmark` exports."""


class _SuitePackages:
    """Finds the suite's other packages beside this one, so that a user's folder `systems/` cannot shadow them."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name not in ("datamodules", "leaderboard", "systems"):
            return None
        return PathFinder.find_spec(name, [str(Path(__file__).parents[1])])


sys.meta_path.insert(0, _SuitePackages)  # a class with `find_spec` is a finder


def __getattr__(name: str) -> Any:
    """Imports an exported name on first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'benchmark' has no attribute {name!r}; it exports {', '.join(_EXPORTS)}")
    return getattr(import_module(_EXPORTS[name]), name)
