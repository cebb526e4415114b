"""Looks up data modules by name, by class path, or in a config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import datamodules
from datamodules import ImageDataModule
from datamodules.own import import_path


def data_module(name: str) -> type[ImageDataModule]:
    """Returns a data module.

    Args:
        name: Name of a dataset, such as `mnist`, or of a class, such as `ImageFolder`, in any case; or the path of a
            class of one's own, such as `mypackage.data.Shapes`.

    Raises:
        ValueError: If there is no such dataset.
    """
    if "." in name:
        found = import_path(name)
        if not isinstance(found, type) or not issubclass(found, ImageDataModule):
            raise ValueError(f"data={name!r} is not a class of images; derive it from datamodules.ImageDataModule")
        return found
    modules = [
        kind for kind in vars(datamodules).values() if isinstance(kind, type) and issubclass(kind, ImageDataModule)
    ]
    known = {getattr(kind, "name", None) or kind.__name__: kind for kind in modules if kind is not ImageDataModule}
    found = {key.lower(): kind for key, kind in known.items()}.get(name.lower())
    if found is None:
        raise ValueError(
            f"data={name!r} is not a dataset of the suite; choose one of: "
            f"{', '.join(sorted(known, key=str.lower))}, or give the path of a class, such as mypackage.data.Shapes"
        )
    return found


def make_data(name: str, options: Mapping[str, Any]) -> ImageDataModule:
    """Builds a data module.

    Raises:
        ValueError: If there is no such dataset, or it does not accept an option.
    """
    kind = data_module(name)
    try:
        return kind(**options)
    except TypeError as error:
        wrong = str(error).rsplit(") ", 1)[-1]
        raise ValueError(f"data={name!r} does not accept the options {', '.join(options)}: {wrong}") from None


def find_data(name: str, config: str | None, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns name and options of a data module that is given by name or by a config.

    Args:
        name: Name of a dataset or the path of a class; empty if there is a config.
        config: Config of a training or of a run, whose block `data` is read.
        options: Options, which replace those of the config.

    Raises:
        ValueError: If neither or both are given, or the config has no data.
    """
    if bool(name) == (config is not None):
        raise ValueError(
            "give either the name of a dataset, such as mnist, or the path of a class, or --config FILE, whose block "
            "`data` is used"
        )
    if config is None:
        return name, dict(options)
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {config} cannot be read ({error}); give a YAML file") from error
    data = content.get("data") if isinstance(content, dict) else None
    data = {"class_path": data} if isinstance(data, str) else data
    if not isinstance(data, dict) or not isinstance(data.get("class_path"), str):
        raise ValueError(f"--config {config} has no block `data` with a class_path; give the config of a training")
    return data["class_path"], (data.get("init_args") or {}) | dict(options)
