"""Methods of analysis, by name."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from prismquant.arguments import as_choice
from prismquant.errors import ArgumentError
from prismquant.search.analysis import AnalysisMethod

_HOME = "prismquant.search.methods"
METHODS: Mapping[str, str] = MappingProxyType(
    {
        "fisher": f"{_HOME}.fisher:Fisher",
        "gradient": f"{_HOME}.gradient:SquaredGradients",
        "kl_div": f"{_HOME}.kl_div:KLDivergence",
        "output": f"{_HOME}.layer_output:OutputError",
        "weight": f"{_HOME}.weight_error:WeightError",
    }
)
"""Module and class of each method; the first one is the default."""


MAX_DRAWS = 4096


def method_name(name: Any) -> str:
    """A method's name, checked; None stands for the default.

    Raises:
        ArgumentError: There is no such method.
    """
    return next(iter(METHODS)) if name is None else as_choice(name, "method", METHODS)


def build_method(name: str, options: Mapping[str, Any]) -> AnalysisMethod:
    """Make a method from its name and options.

    Args:
        name: A key of :data:`METHODS`.
        options: Values by the option's name; None says nothing.

    Raises:
        ArgumentError: It has no such option.
    """
    module, _, kind = METHODS[name].partition(":")
    made = getattr(importlib.import_module(module), kind)
    known = {field.name for field in dataclasses.fields(made)}
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in known:
            raise ArgumentError(
                f"the method {name} has no {key}",
                where=f"{key} (--{key.replace('_', '-')})",
                remedy="leave it out, or use another --method",
            )
    method: AnalysisMethod = made(**given)
    return method
