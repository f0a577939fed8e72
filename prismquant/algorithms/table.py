"""The methods by name: a new one is a file and a line here.

Modules are imported when they are asked for, so the table costs nothing and no solver can come to
depend on another.
"""

from __future__ import annotations

import importlib
import typing
from dataclasses import fields
from typing import Any, Literal, cast

from prismquant.algorithms.base import Solver
from prismquant.errors import RecipeError, suggest

if typing.TYPE_CHECKING:
    from collections.abc import Mapping

SOLVERS: Mapping[str, str] = {
    "gptq": "prismquant.algorithms.gptq:GPTQ",
    "rtn": "prismquant.algorithms.rtn:RTN",
}


def build_solver(name: str, options: Mapping[str, Any] | None = None) -> Solver:
    """Make a solver from a recipe's words.

    Args:
        name: A key of :data:`SOLVERS`.
        options: Values for its fields; what is missing takes its default.

    Returns:
        The solver, its options checked.

    Raises:
        RecipeError: The name or an option is unknown, or a value has the wrong type or is out of
            bounds.
    """
    if name not in SOLVERS:
        raise RecipeError(f"there is no solver {name!r}", remedy=suggest(name, SOLVERS))
    module, _, attribute = SOLVERS[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    types = typing.get_type_hints(cls)
    known = [field.name for field in fields(cls)]
    given = dict(options or {})
    for option, value in given.items():
        if option not in known:
            raise RecipeError(
                f"{name} has no option {option!r}", where=name, remedy=suggest(str(option), known)
            )
        given[option] = _checked(value, types[option], f"{name}.{option}")
    return cast(Solver, cls(**given))


def _checked(value: object, kind: Any, where: str) -> object:
    """Accept a value of an option's declared type: a bool is no number, an int is a float."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise RecipeError(
                f"{value!r} is not a choice", where=where, remedy=suggest(str(value), choices)
            )
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecipeError(f"{value!r} is not of type {kind.__name__}", where=where)
    return value
