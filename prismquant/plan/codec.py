"""Frozen values as JSON types, and back: every field is written, and no other is read.

A dataclass becomes a mapping of its fields, a tuple a list, an enumeration its value, a dtype its
name. What is read is checked against the type that each field declares.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ValidationError

from prismquant.algorithms.correction import Correction
from prismquant.errors import PrismQuantError, StorageError
from prismquant.recipe.layer_config import Options

T = TypeVar("T")

_PLAIN = (str, bool, int, float)


def to_json(value: Any) -> Any:
    """A value as JSON types."""
    if value is None or value.__class__ in _PLAIN:
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {name: to_json(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(inner) for inner in value]
    found = {name: getattr(value, name) for name in _hints(value.__class__)}
    for name, inner in found.items():
        # A call for each plain value of tens of thousands of layers takes a second.
        if inner is not None and inner.__class__ not in _PLAIN:
            found[name] = to_json(inner)
    return found


def from_json(kind: type[T], content: Any, where: str) -> T:
    """Read back what :func:`to_json` gave.

    Args:
        kind: The type of the value.
        content: JSON types.
        where: Name of the value in errors.

    Raises:
        StorageError: The content is of another type, or misses a field, or has one more; says
            where.
    """
    read: T = _read(kind, content, where)
    return read


def _read(kind: Any, content: Any, where: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _union(inner, content, where)
    if origin is Literal:
        found = [choice for choice in inner if choice == content and type(choice) is type(content)]
        return found[0] if found else _refuse(content, where)
    if origin is tuple:
        return _tuple(inner, content, where)
    if kind in (type(None), *_PLAIN):
        return _plain(kind, content, where)
    if kind is torch.dtype:
        dtype = getattr(torch, content, None) if isinstance(content, str) else None
        # Some dtypes have two names, of which one is written.
        return dtype if str(dtype) == f"torch.{content}" else _refuse(content, where)
    try:
        if issubclass(kind, Enum):
            return kind(content)
        if kind is Options and isinstance(content, Mapping):
            return Options({str(name): value for name, value in content.items()})
        if issubclass(kind, BaseModel):
            return kind.model_validate(content)
        return _dataclass(kind, content, where)
    except (ValidationError, ValueError, TypeError) as error:
        raise StorageError(f"the plan is damaged: {where}: {error}") from error
    except StorageError:
        raise
    except PrismQuantError as error:
        raise StorageError(f"the plan is damaged: {where}: {error.what}") from error


def _dataclass(kind: Any, content: Any, where: str) -> Any:
    if not isinstance(content, Mapping):
        return _refuse(content, where)
    hints = _hints(kind)
    for name in [*hints, *content]:
        if name not in content or name not in hints:
            what = "is missing" if name in hints else "is unknown"
            raise StorageError(f"the plan is damaged: {where}.{name} {what}")
    return kind(**{name: _read(hints[name], content[name], f"{where}.{name}") for name in hints})


def _tuple(inner: tuple[Any, ...], content: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(content, list):
        return _refuse(content, where)
    kinds = [inner[0]] * len(content) if inner[1:] == (...,) else list(inner)
    if len(kinds) != len(content):
        return _refuse(content, where)
    pairs = enumerate(zip(kinds, content, strict=True))
    return tuple(_read(kind, item, f"{where}[{index}]") for index, (kind, item) in pairs)


def _union(kinds: tuple[Any, ...], content: Any, where: str) -> Any:
    if content is None:
        return None if type(None) in kinds else _refuse(content, where)
    named = [kind for kind in kinds if kind is not type(None)]
    for kind in named[:-1]:
        try:
            return _read(kind, content, where)
        except StorageError:
            continue
    return _read(named[-1], content, where)


def _plain(kind: type, content: Any, where: str) -> Any:
    if kind is float and type(content) is int:
        return float(content)
    return content if type(content) is kind else _refuse(content, where)


def _refuse(content: Any, where: str) -> typing.NoReturn:
    raise StorageError(f"the plan is damaged: {where} cannot be {str(content)[:60]!r}")


@functools.cache
def _hints(kind: Any) -> Mapping[str, Any]:
    """The fields of a dataclass and their types."""
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        raise TypeError(f"{kind} is no value of a plan")
    # Named for type checkers only where it is used, so that a recipe is read without torch.
    hints = typing.get_type_hints(kind, localns={"Correction": Correction})
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
