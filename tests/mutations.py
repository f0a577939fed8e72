"""One change at one place of a JSON value: a key gone or added, another type, another number."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 10**30, 0.5, math.nan),
    *("", "unknown", "re:(", [], ["x"], [None], {}, {"x": 1}),
)
_Path = tuple[str | int, ...]


def mutations(value: Any, seed: str, most: int | None = None) -> list[tuple[str, Any]]:
    """``(what was changed, the changed value)``, in an order that the seed decides.

    Of a list only the first two entries are changed.
    """
    every = list(_changes(value))
    random.Random(seed).shuffle(every)
    return [
        (f"{kind} {path} {new!r:.30}", _changed(value, kind, path, new))
        for kind, path, new in every[:most]
    ]


def _changes(value: Any) -> Iterator[tuple[str, _Path, Any]]:
    for path in _paths(value):
        yield from (("set", path, new) for new in VALUES)
        if path:
            yield "drop", path, None
        if isinstance(_at(value, path), dict):
            yield "add", path, "strange"


def _paths(value: Any, path: _Path = ()) -> Iterator[_Path]:
    yield path
    members = value.items() if isinstance(value, dict) else []
    if isinstance(value, list):
        members = enumerate(value[:2])
    for key, member in members:
        yield from _paths(member, (*path, key))


def _at(value: Any, path: _Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _changed(value: Any, kind: str, path: _Path, new: Any) -> Any:
    if not path and kind == "set":
        return new
    made = copy.deepcopy(value)
    if kind == "add":
        _at(made, path)[new] = 1
        return made
    owner = _at(made, path[:-1])
    if kind == "drop":
        del owner[path[-1]]
    else:
        owner[path[-1]] = new
    return made
