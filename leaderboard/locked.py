"""Published descriptions: immutable YAML files, each with a hash that is locked in the code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from leaderboard.files import canonical_sha256
from leaderboard.schema import SchemaError, from_json

Published = TypeVar("Published", bound="Locked")


@dataclass(frozen=True)
class Locked:
    """A description that never changes once it is published.

    Args:
        name: Name of its file without suffix, with a version; a changed description needs a new name.
    """

    name: str

    def description(self) -> dict[str, Any]:
        """Returns the whole description as a JSON object."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def sha256(self) -> str:
        """Hash of the description."""
        return canonical_sha256(self.description())


def read_locked(kind: type[Published], path: Path, locked: Mapping[str, str], called: str) -> Published:
    """Reads a description and checks its hash against the one published under its name.

    Args:
        kind: Class of the description.
        path: YAML file.
        locked: Hash of each published description, by name.
        called: What such a description is called in messages, with an article, such as `"a protocol"`.

    Raises:
        ValueError: If the file is not such a description, or was changed.
    """
    try:
        found = from_json(kind, yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, SchemaError) as error:
        raise ValueError(f"{path} is not {called} ({error}); restore the file") from error
    if found.sha256 != locked.get(path.stem) or found.name != path.stem:
        plural = called.removeprefix("an ").removeprefix("a ").capitalize() + "s"
        raise ValueError(
            f"{path} was changed: its description has the hash {found.sha256}, expected {locked.get(path.stem)}. "
            f"{plural} are immutable: restore the file and publish changes as a new one under a new name"
        )
    return found
