"""Data modules by the name of their dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datamodules
from datamodules import ImageDataModule


def data_module(name: str) -> type[ImageDataModule]:
    """Finds a data module by its dataset's name, or its own."""
    kinds = [
        kind for kind in vars(datamodules).values() if isinstance(kind, type) and issubclass(kind, ImageDataModule)
    ]
    known = {kind.name: kind for kind in kinds if kind is not ImageDataModule}
    if name.lower() not in known:
        raise ValueError(f"data={name!r} is not a dataset of the suite; choose one of: {', '.join(sorted(known))}")
    return known[name.lower()]


def make_data(name: str, options: Mapping[str, Any]) -> ImageDataModule:
    """Makes the data module of a dataset.

    Raises:
        ValueError: If there is no such dataset, or it has no such option.
    """
    try:
        return data_module(name)(**options)
    except TypeError as error:
        wrong = str(error).rsplit(") ", 1)[-1]
        raise ValueError(f"the options {', '.join(options)} are not those of data={name!r}: {wrong}") from None
