"""Fixtures shared by the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

SHARED = Path(__file__).parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the number of kills that the tests of killed runs try."""
    parser.addoption("--kills", type=int, default=2, help="kills of each kind in tests/benchmark/test_faults.py")


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, Tensor]]:
    """Loads a file of recorded reference numbers, or skips where the recordings are not at hand."""

    def load(name: str) -> dict[str, Tensor]:
        path = SHARED / "methods" / "reference" / name
        if not path.exists():
            pytest.skip(f"reference vectors {name} are not available here")
        return load_file(path)

    return load


@pytest.fixture(scope="module")
def uncompiled() -> Iterator[None]:
    """Neurons that start at once: compiling takes longer than the smallest trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("systems.neurons.COMPILE_FROM", 2**62)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images in parquet, or skips where it is not at hand."""
    path = SHARED / "data"
    if not path.exists():
        pytest.skip("the folder of real images is not available here")
    return path
