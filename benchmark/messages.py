"""One line for what is wrong with a command."""

from __future__ import annotations

NOISE = (
    "Does not validate against any",
    "Subtypes:",
    "Errors:",
    "- Expected a <class 'NoneType'>",
    "Given value type:",
)
LONG = 100
"""Characters above which the given value, which may be a whole configuration, is left out."""


def plain(message: str) -> str:
    """Returns the message of a parser without the types that it tried and the configuration that it repeats."""
    lines = [line.strip() for line in message.splitlines()]
    said = [line.removeprefix("- ") for line in lines if line and not line.startswith(NOISE)]
    return " ".join(line for line in said if not (line.startswith("Given value:") and len(line) > LONG))
