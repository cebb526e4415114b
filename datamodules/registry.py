"""Looks up data modules by the name of their dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datamodules
from datamodules import ImageDataModule


def data_module(name: str) -> type[ImageDataModule]:
    """Returns the data module of a dataset.

    Args:
        name: Name of the dataset, such as `mnist`, in any case.

    Raises:
        ValueError: If there is no such dataset.
    """
    modules = [
        kind for kind in vars(datamodules).values() if isinstance(kind, type) and issubclass(kind, ImageDataModule)
    ]
    known = {kind.name: kind for kind in modules if kind is not ImageDataModule}
    if name.lower() not in known:
        raise ValueError(f"data={name!r} is not a dataset of the suite; choose one of: {', '.join(sorted(known))}")
    return known[name.lower()]


def make_data(name: str, options: Mapping[str, Any]) -> ImageDataModule:
    """Builds the data module of a dataset.

    Raises:
        ValueError: If there is no such dataset, or it has no such option.
    """
    try:
        return data_module(name)(**options)
    except TypeError as error:
        wrong = str(error).rsplit(") ", 1)[-1]
        raise ValueError(f"data={name!r} does not accept the options {', '.join(options)}: {wrong}") from None
