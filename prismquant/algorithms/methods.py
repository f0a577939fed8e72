"""The methods by name: a new one is a file and a line here.

Modules are imported when they are asked for, so the tables cost nothing and no method can come to
depend on another.
"""

from __future__ import annotations

import importlib
import types
import typing
from dataclasses import fields
from typing import Any, Literal, cast

from prismquant.errors import RecipeError, suggest

if typing.TYPE_CHECKING:
    from collections.abc import Mapping

    from prismquant.algorithms.protocols import FittedTransform, Solver, Transform, Tuner

SOLVERS: Mapping[str, str] = {
    "gptq": "prismquant.algorithms.gptq:GPTQ",
    "rtn": "prismquant.algorithms.rtn:RTN",
}
"""Solvers choose the codes of layers that share an input."""

TRANSFORMS: Mapping[str, str] = {
    "rotation": "prismquant.algorithms.rotation:Rotation",
    "split": "prismquant.algorithms.split:Split",
    "awq": "prismquant.algorithms.awq:AWQ",
    "smoothquant": "prismquant.algorithms.smoothquant:SmoothQuant",
}
"""Transforms change the model before anything is rounded, and leave its float function alone."""
WHOLE_TOWERS = frozenset({"rotation"})
"""Transforms that take whole towers, and can only be matched by modality."""

TUNERS: Mapping[str, str] = {
    "autoround": "prismquant.algorithms.autoround:AutoRound",
    "zeroquant": "prismquant.algorithms.zeroquant:ZeroQuant",
}
"""Tuners improve the codes of a whole block on the block's output."""


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
    return cast("Solver", _build(SOLVERS, "solver", name, options))


def build_transform(name: str, options: Mapping[str, Any] | None = None) -> Transform:
    """Make a transform from a recipe's words; as :func:`build_solver`, for :data:`TRANSFORMS`."""
    return cast("Transform", _build(TRANSFORMS, "transform", name, options))


def build_fitted(name: str, options: Mapping[str, Any] | None = None) -> FittedTransform[Any, Any]:
    """Make a transform that is fitted to calibration data; as :func:`build_transform`."""
    return cast("FittedTransform[Any, Any]", build_transform(name, options))


def build_tuner(name: str, options: Mapping[str, Any] | None = None) -> Tuner:
    """Make a tuner from a recipe's words; as :func:`build_solver`, for :data:`TUNERS`."""
    return cast("Tuner", _build(TUNERS, "tuner", name, options))


def refuse_idle(made: object, given: Mapping[str, Any], name: str) -> None:
    """Refuse options that change nothing as the others stand.

    Args:
        made: What was made from the options; its ``idle``, where it has one, names those.
        given: The options as they were given.
        name: Of what was made.

    Raises:
        RecipeError: One changes nothing.
    """
    idle: Mapping[str, str] = getattr(made, "idle", {})
    for option in given:
        # Zero and false say themselves that nothing is wanted.
        if option in idle and given[option]:
            raise RecipeError(
                f"{name} option {option!r} has no effect: {idle[option]}",
                where=name,
                remedy=f"leave out {option}",
            )


def checked_options(cls: type, options: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """Check options against the fields of the dataclass that they are for.

    Raises:
        RecipeError: An option is unknown or has a value of the wrong type.
    """
    # They are slow to find, and recipes of large models come here once a layer.
    kinds = typing.get_type_hints(cls) if options else {}
    known = [field.name for field in fields(cls)]
    given = dict(options or {})
    for option, value in given.items():
        if option not in known:
            raise RecipeError(
                f"{name} has no option {option!r}", where=name, remedy=suggest(str(option), known)
            )
        given[option] = _checked(value, kinds[option], f"{name}.{option}")
    return given


def _build(
    table: Mapping[str, str], what: str, name: str, options: Mapping[str, Any] | None
) -> object:
    if name not in table:
        raise RecipeError(f"there is no {what} {name!r}", remedy=suggest(name, table))
    module, _, attribute = table[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    return cls(**checked_options(cls, options, name))


def _checked(value: object, kind: Any, where: str) -> object:
    """Accept a value of an option's declared type: a bool is no number, an int is a float."""
    if isinstance(kind, types.UnionType):
        return _checked_union(value, typing.get_args(kind), where)
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


def _checked_union(value: object, kinds: tuple[Any, ...], where: str) -> object:
    if value is None and type(None) in kinds:
        return None
    named = [kind for kind in kinds if kind is not type(None)]
    for kind in named[:-1]:
        try:
            return _checked(value, kind, where)
        except RecipeError:
            continue
    return _checked(value, named[-1], where)
