"""The zoo: trained models that come with the suite, as folders made by `export` under `leaderboard/zoo/`."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

import leaderboard

ZOO = Path(leaderboard.__file__).parent / "zoo"
"""Folder of the models, `<method>_<dataset>/` each."""
PREFIX = "zoo:"
"""Beginning of the name of a model where a checkpoint is expected."""


def zoo_folders() -> list[Path]:
    """Returns the folders of the models, sorted by name."""
    return sorted(path.parent for path in ZOO.glob("*/config.yaml"))


def find_in_zoo(path: Path) -> Path:
    """Returns the folder of the model that `zoo:NAME` names; any other path is returned unchanged.

    Raises:
        FileNotFoundError: If the zoo has no model of this name; the message lists the names.
    """
    if not str(path).startswith(PREFIX):
        return path
    name, known = str(path).removeprefix(PREFIX), {folder.name: folder for folder in zoo_folders()}
    if name not in known:
        close = get_close_matches(name, known, n=1)
        meant = f"did you mean {PREFIX}{close[0]}? " if close else ""
        raise FileNotFoundError(f"the zoo has no model {name!r}; {meant}it has: {', '.join(known) or 'none yet'}")
    return known[name]
