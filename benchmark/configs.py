"""The suite's configurations, which an installed package carries, so that they are found from any folder."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml

from leaderboard.files import canonical_sha256, file_sha256

CONFIGS = Path(__file__).parents[1] / "configs"
"""Folder of the configurations, in a checkout as in an installed package."""
DESIGN = "design.yaml"
"""Name of the design file; the configurations beside it belong to its study."""
_OPTIONS = ("--config", "-c")


def find_config(name: str | Path) -> Path:
    """Returns the file of a configuration.

    Args:
        name: A file; or, if the working folder has no such file, the name of a configuration of the suite with or
            without `configs/` and `.yaml`, such as `fsddim_celeba` or `small/sdit_digits`.

    Returns:
        The file. A name that is neither is returned unchanged, so that its reader reports it.
    """
    path = Path(name)
    inside = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    try:
        if path.is_absolute() or path.exists() or ".." in path.parts:
            return path
        found = (CONFIGS / inside, CONFIGS / f"{inside}.yaml")
        return next((file for file in found if file.suffix == ".yaml" and file.is_file()), path)
    except (OSError, ValueError):  # cannot be a file name
        return path


def find_configs(folder: str | Path) -> Path:
    """Returns a folder of configurations: `folder`, or that of the suite for `configs` and its subfolders."""
    path = Path(folder)
    if path.is_absolute() or path.is_dir() or path.parts[:1] != ("configs",) or ".." in path.parts:
        return path
    return found if (found := CONFIGS.joinpath(*path.parts[1:])).is_dir() else path


def design_of(config: Path) -> dict[str, str] | None:
    """Returns name and hash of the design that a configuration belongs to; None if its folder has no design.

    The hash covers names and contents of all `*.yaml` files of the folder, so that no setting can change unnoticed.
    Options that are typed in addition are not part of it; a record has them in its configuration.

    Args:
        config: File of a configuration.

    Raises:
        ValueError: If the design has no name.
    """
    path = config.parent / DESIGN
    if not path.is_file():
        return None
    design = yaml.safe_load(path.read_text(encoding="utf-8"))
    name = design.get("name") if isinstance(design, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"{path} has no name; give the study one, such as `name: track-v1`")
    files = {file.name: file_sha256(file) for file in config.parent.glob("*.yaml")}
    return {"name": name, "sha256": canonical_sha256(files)}


def locate_configs(args: Sequence[str]) -> list[str]:
    """Replaces the names of configurations in typed options by their files."""
    located: list[str] = []
    for position, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if equals and option in _OPTIONS:
            arg = f"{option}={find_config(value)}"
        elif position and args[position - 1] in _OPTIONS and not arg.startswith("-"):
            arg = str(find_config(arg))
        located.append(arg)
    return located


def suggestion(name: str) -> str:
    """Returns where configurations are looked for, and the names that resemble a mistyped one."""
    known = sorted(str(file.relative_to(CONFIGS).with_suffix("")) for file in CONFIGS.rglob("*.yaml"))
    close = get_close_matches(Path(name).stem, known, n=3)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{meant}--config takes a file, or the name of a configuration of the suite in {CONFIGS}"
