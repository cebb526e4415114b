"""Strict conversion of JSON values to dataclasses: no unknown or missing fields, no implicit type conversion."""

from __future__ import annotations

import dataclasses
import math
import types
import unicodedata
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Data = TypeVar("Data")

LARGEST_INTEGER = 2**63 - 1
LARGEST_NUMBER = 1e30
"""Far above any measurement, yet small enough that computations do not overflow."""
LONGEST_TEXT = 4096
DEEPEST = 32
"""Maximum nesting depth of free JSON."""
_UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories that can mislead a terminal: control, invisible, lone surrogates, line and paragraph breaks."""


class SchemaError(ValueError):
    """A value does not match its declared type; the message starts with the path of the field."""


def from_json(kind: type[Data], value: Any, field: str = "") -> Data:
    """Builds a dataclass from a JSON object.

    Args:
        kind: Dataclass whose fields are bool, int, float, str, `Literal`, `None` unions, `dict[str, ...]`,
            `tuple[..., ...]` for lists, nested dataclasses, or `Any` for free JSON. Text and keys outside free JSON
            must not contain control characters.
        value: JSON object to convert.
        field: Path of the object in its file, for error messages.

    Raises:
        SchemaError: If a field is unknown, missing, of another type, too large, or not a finite number.
    """
    if not isinstance(value, dict):
        raise SchemaError(f"{field or 'the top level'}: expected an object, found {_shown(value)}")
    hints = get_type_hints(kind)
    required = {
        f.name
        for f in dataclasses.fields(kind)  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - value.keys()):
        raise SchemaError(f"{_join(field, missing[0])}: the field is missing")
    if unknown := sorted(value.keys() - hints.keys()):
        raise SchemaError(f"{_join(field, unknown[0])}: unknown field; expected one of: {', '.join(hints)}")
    return kind(**{name: _convert(hints[name], item, _join(field, name)) for name, item in value.items()})


def _convert(kind: Any, value: Any, field: str) -> Any:
    origin = get_origin(kind)
    if kind is Any:
        return _plain_json(value, field)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(kind):
            return None
        (kind,) = (k for k in get_args(kind) if k is not type(None))
        return _convert(kind, value, field)
    if origin is Literal:
        if not any(value == known and type(value) is type(known) for known in get_args(kind)):
            raise SchemaError(f"{field}: expected {' or '.join(map(repr, get_args(kind)))}, found {_shown(value)}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise SchemaError(f"{field}: expected an object, found {_shown(value)}")
        return {
            _plain_text(key, field): _convert(get_args(kind)[1], item, _join(field, key)) for key, item in value.items()
        }
    if origin is tuple:
        if not isinstance(value, list | tuple):  # a tuple if it does not come from a file
            raise SchemaError(f"{field}: expected a list, found {_shown(value)}")
        return tuple(_convert(get_args(kind)[0], item, _join(field, str(i))) for i, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value, field)  # type: ignore[arg-type]
    return _scalar(kind, value, field)


def _scalar(kind: type, value: Any, field: str) -> Any:
    _plain_json(value, field)
    if kind is float and type(value) is int:
        value = float(value)  # JSON does not distinguish 1 from 1.0
    if type(value) is not kind:
        raise SchemaError(f"{field}: expected {kind.__name__}, found {_shown(value)}")
    if isinstance(value, float) and abs(value) > LARGEST_NUMBER:
        raise SchemaError(f"{field}: expected a number of magnitude up to {LARGEST_NUMBER:g}, found {value:g}")
    return _plain_text(value, field) if isinstance(value, str) else value


def _plain_text(text: str, field: str) -> str:
    if len(text) > LONGEST_TEXT:
        raise SchemaError(f"{field}: expected at most {LONGEST_TEXT} characters, found {len(text)}")
    if any(unicodedata.category(character) in _UNSAFE for character in text):
        raise SchemaError(f"{field}: expected text without control characters, found {_shown(text)}")
    return text


def _plain_json(value: Any, field: str, level: int = 0) -> Any:
    if level > DEEPEST:
        raise SchemaError(f"{field[:200]}...: expected at most {DEEPEST} nested levels, found more")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise SchemaError(f"{field}: expected text keys, found {_shown(key)}")
            _plain_json(item, _join(field, key), level + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _plain_json(item, _join(field, str(i)), level + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise SchemaError(f"{field}: expected a finite number, found {value}")
    elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise SchemaError(f"{field}: expected a 64-bit integer, found one of {value.bit_length()} bits")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise SchemaError(f"{field}: expected a JSON value, found {_shown(value)}")
    return value


def _join(parent: str, name: str) -> str:
    """Returns the path of a field in a form that is safe to print."""
    name = name if name.isprintable() and len(name) <= 60 else _shown(name)
    return f"{parent}.{name}" if parent else name


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
