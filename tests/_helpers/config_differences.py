"""Differences between configurations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a config under dotted keys, without `init_args`."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from flatten(child, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    else:
        yield key, value


def differences(configs: list[Path]) -> dict[str, dict[str, Any]]:
    """Keys that differ between configs, each with its value per file; a missing key differs from every value."""
    flat = {path.stem: dict(flatten(yaml.safe_load(path.read_text()))) for path in configs}
    keys = sorted({key for values in flat.values() for key in values})
    values = {key: {name: content.get(key, "(missing)") for name, content in flat.items()} for key in keys}
    return {key: found for key, found in values.items() if len({repr(value) for value in found.values()}) > 1}
