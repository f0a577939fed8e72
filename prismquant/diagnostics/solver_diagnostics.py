"""Diagnostics of layers: how a solver came by its codes, and what was done to input and weight.

One class for each method, and each says which method it is of: a record is read back as what it
was written from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from prismquant.arguments import EXACT


@dataclass(frozen=True)
class GPTQDiagnostics:
    """Diagnostics of GPTQ; all figures are of layers that share an input, together.

    Attributes:
        damping: The fraction of damping that was used.
        damping_attempts: Dampings that were tried until the Hessian could be factorized.
        precision: Precision of the factorization.
        order: Order of the columns.
        scale_weighting: Cost of an error in a column while a range rule searched.
        kernel: Kernel of the column loop: ``torch``, ``numba`` or ``triton``.
        dead_columns: Columns that calibration never excited; rounded to nearest.
        swept_loss: Loss after the column loop, under the damped Hessian.
        refined_loss: Loss after coordinate descent, under the damped Hessian.
        nearest_rows: Rows that fell back to rounding to nearest.
    """

    __pydantic_config__ = EXACT

    damping: float
    damping_attempts: int
    precision: str
    order: str
    scale_weighting: str
    kernel: str
    dead_columns: int
    swept_loss: float
    refined_loss: float
    nearest_rows: int
    method: Literal["gptq"] = "gptq"


@dataclass(frozen=True)
class RTNDiagnostics:
    """Diagnostics of rounding to nearest.

    Attributes:
        scale_weighting: Cost of an error while a range rule searched.
    """

    __pydantic_config__ = EXACT

    scale_weighting: str = "none"
    method: Literal["rtn"] = "rtn"


SolverDiagnostics = Annotated[GPTQDiagnostics | RTNDiagnostics, Field(discriminator="method")]

_BY_METHOD: Mapping[str, type[GPTQDiagnostics | RTNDiagnostics]] = {
    "gptq": GPTQDiagnostics,
    "rtn": RTNDiagnostics,
}


def solver_diagnostics(fields: Mapping[str, Any]) -> SolverDiagnostics:
    """Diagnostics from their fields, ``method`` among them."""
    return _BY_METHOD[fields["method"]](**fields)


@dataclass(frozen=True)
class Failure:
    """Reason for which a layer was rounded to nearest in place of being solved.

    Attributes:
        why: The error of the solver, or of what gathers its statistics.
        wanted: The method that the plan names.
    """

    __pydantic_config__ = EXACT

    why: str
    wanted: str


@dataclass(frozen=True)
class CorrectionDiagnostics:
    """Diagnostics of the correction of weights for what precedes them.

    Attributes:
        strength: Mean strength over layers that share an input.
        damping: The damping that was used.
    """

    __pydantic_config__ = EXACT

    strength: float
    damping: float


@dataclass(frozen=True)
class StaticInputRange:
    """Range that a static activation scale covers.

    Attributes:
        low: Its lower end.
        high: Its upper end.
        by_modality: Extremes of each modality, where there is more than one.
    """

    __pydantic_config__ = EXACT

    low: float
    high: float
    by_modality: Mapping[str, tuple[float, float]]
