"""Strict conversion of JSON values to dataclasses: nothing unknown, nothing missing, no silent change of type."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Data = TypeVar("Data")


class SchemaError(ValueError):
    """A value that does not fit its declared type; the message starts with the path of the field."""


def from_json(kind: type[Data], value: Any, field: str = "") -> Data:
    """Builds a dataclass from a JSON object.

    Args:
        kind: Dataclass whose fields are bool, int, float, str, `Literal`, `None` unions, `dict[str, ...]`,
            `tuple[..., ...]` for lists, nested dataclasses, or `Any` for free JSON.
        value: JSON object to convert.
        field: Path of the object in its file, for messages.

    Raises:
        SchemaError: If a field is unknown, missing, of another type, or not a finite number.
    """
    if not isinstance(value, dict):
        raise SchemaError(f"{field or 'the top level'}: expected an object, found {_shown(value)}")
    hints = get_type_hints(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}  # type: ignore[arg-type]
    if missing := sorted(required - value.keys()):
        raise SchemaError(f"{_join(field, missing[0])}: the field is missing")
    if unknown := sorted(value.keys() - hints.keys()):
        raise SchemaError(f"{_join(field, unknown[0])}: unknown field; expected one of: {', '.join(hints)}")
    return kind(**{name: _convert(hints[name], item, _join(field, name)) for name, item in value.items()})


def _convert(kind: Any, value: Any, field: str) -> Any:
    origin = get_origin(kind)
    if kind is Any:
        return _finite_json(value, field)
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
        return {key: _convert(get_args(kind)[1], item, _join(field, key)) for key, item in value.items()}
    if origin is tuple:
        if not isinstance(value, list):
            raise SchemaError(f"{field}: expected a list, found {_shown(value)}")
        return tuple(_convert(get_args(kind)[0], item, _join(field, str(i))) for i, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value, field)  # type: ignore[arg-type]
    return _scalar(kind, value, field)


def _scalar(kind: type, value: Any, field: str) -> Any:
    if kind is float and type(value) is int:
        value = float(value)  # JSON does not tell 1 from 1.0
    if type(value) is not kind:
        raise SchemaError(f"{field}: expected {kind.__name__}, found {_shown(value)}")
    return _finite_json(value, field)


def _finite_json(value: Any, field: str) -> Any:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise SchemaError(f"{field}: expected text keys, found {_shown(key)}")
            _finite_json(item, _join(field, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _finite_json(item, _join(field, str(i)))
    elif isinstance(value, float) and not math.isfinite(value):
        raise SchemaError(f"{field}: expected a finite number, found {value}")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise SchemaError(f"{field}: expected a JSON value, found {_shown(value)}")
    return value


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
