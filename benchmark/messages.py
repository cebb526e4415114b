"""Error messages of the option parser in one line."""

from __future__ import annotations

NOISE = (
    "Does not validate against any",
    "Subtypes:",
    "Errors:",
    "- Expected a <class 'NoneType'>",
    "Given value type:",
)
"""Beginnings of lines that are left out."""
MAX_VALUE_LENGTH = 100
"""Characters above which the given value, possibly a whole config, is left out."""


def condense(message: str) -> str:
    """Joins a parser's message to one line, without the types it tried and without long values."""
    lines = [line.strip() for line in message.splitlines()]
    kept = [line.removeprefix("- ") for line in lines if line and not line.startswith(NOISE)]
    return " ".join(line for line in kept if not (line.startswith("Given value:") and len(line) > MAX_VALUE_LENGTH))
