"""Files: atomic writes, and hashes of contents."""

from __future__ import annotations

import hashlib
import json
import os
from itertools import count
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: readers see either the old or the complete new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def free_path(path: Path) -> Path:
    """Returns the path, or if it exists, the first of `name-2.ext`, `name-3.ext`, ... that does not."""
    return next(p for n in count(1) if not (p := path if n == 1 else path.with_stem(f"{path.stem}-{n}")).exists())


def refuse_existing(*paths: Path, option: str) -> None:
    """Refuses to replace files.

    Args:
        paths: Files to be written.
        option: Option of the command that names them, for the message.

    Raises:
        FileExistsError: If there is one already.
    """
    if there := [str(path) for path in paths if path.exists()]:
        raise FileExistsError(f"{', '.join(there)} exists already; move it away, or give another {option}")


def is_report(path: Path, start: str) -> bool:
    """Whether a file is a report that the suite wrote, by its first words, so that a new version may replace it."""
    try:
        return path.read_text(encoding="utf-8").startswith(start)
    except (OSError, UnicodeDecodeError):
        return False


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_sha256(value: Any) -> str:
    """Returns the SHA-256 of a JSON value in hexadecimal digits, independent of key order and whitespace."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
