"""Diagnostics: one dataclass a method, told apart by its name, read back as what was written."""

from __future__ import annotations

import json
import typing
from dataclasses import asdict
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from prismquant.algorithms.methods import SOLVERS, TRANSFORMS, TUNERS, build_transform
from prismquant.diagnostics.edge_diagnostics import (
    AWQChoice,
    Choice,
    EdgeDiagnostics,
    SmoothQuantChoice,
)
from prismquant.diagnostics.solver_diagnostics import (
    GPTQDiagnostics,
    RTNDiagnostics,
    SolverDiagnostics,
    solver_diagnostics,
)
from prismquant.diagnostics.tuning_diagnostics import TuningDiagnostics

GPTQ = GPTQDiagnostics(0.1, 2, "float64", "pivot", "none", "numba", 3, 2.5, 1.5, 4)


def methods_of(union: Any) -> set[str]:
    """Names of the methods whose diagnostics a union holds."""
    members = typing.get_args(typing.get_args(union)[0])
    return {member.__dataclass_fields__["method"].default for member in members}


def test_every_method_has_its_own() -> None:
    assert methods_of(SolverDiagnostics) == set(SOLVERS)
    fitted = {name for name in TRANSFORMS if hasattr(build_transform(name), "fit")}
    # Kept columns are told by their numbers alone.
    assert methods_of(Choice) == fitted - {"split"}
    tuners = typing.get_type_hints(TuningDiagnostics)["method"]
    assert set(typing.get_args(tuners)) == set(TUNERS)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (SolverDiagnostics, GPTQ),
        (SolverDiagnostics, RTNDiagnostics("group")),
        (EdgeDiagnostics, EdgeDiagnostics(AWQChoice(0.5, True), "no gain", 7, 2.0, 3.0, 0.5, 2.0)),
        (EdgeDiagnostics, EdgeDiagnostics(SmoothQuantChoice(0.5, "vision"), error_before=1.0)),
        (EdgeDiagnostics, EdgeDiagnostics(skipped="no token")),
        (TuningDiagnostics, TuningDiagnostics("zeroquant", 0.01, settled_loss=0.5)),
    ],
)
def test_what_is_read_is_what_was_written(kind: Any, value: Any) -> None:
    reader: TypeAdapter[Any] = TypeAdapter(kind)
    content = json.loads(json.dumps(asdict(value)))
    assert reader.validate_json(json.dumps(content), strict=True) == value
    with pytest.raises(ValidationError):
        reader.validate_json(json.dumps(content | {"unknown": 1}), strict=True)
    if "method" in content:
        with pytest.raises(ValidationError):
            reader.validate_json(json.dumps(content | {"method": "other"}), strict=True)


@pytest.mark.parametrize("value", [GPTQ, RTNDiagnostics("diagonal")])
def test_ranks_send_them_as_fields(value: SolverDiagnostics) -> None:
    assert solver_diagnostics(json.loads(json.dumps(asdict(value)))) == value
