"""Fixtures shared by the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, Tensor]]:
    """Loads a file of recorded reference numbers, or skips where the recordings are not at hand."""

    def load(name: str) -> dict[str, Tensor]:
        path = SHARED / "methods" / "reference" / name
        if not path.exists():
            pytest.skip(f"reference vectors {name} are not available here")
        return load_file(path)

    return load


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images in parquet, or skips where it is not at hand."""
    path = SHARED / "data"
    if not path.exists():
        pytest.skip("the folder of real images is not available here")
    return path
