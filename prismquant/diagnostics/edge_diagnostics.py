"""Diagnostics of smooth edges: the scale that was chosen, or why the edge stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from prismquant.arguments import EXACT


@dataclass(frozen=True)
class SmoothQuantChoice:
    """The scale that SmoothQuant chose.

    Attributes:
        alpha: Share of the scale that the input takes.
        modality: Whose inputs counted.
    """

    __pydantic_config__ = EXACT

    alpha: float
    modality: str
    method: Literal["smoothquant"] = "smoothquant"


@dataclass(frozen=True)
class AWQChoice:
    """The scale that AWQ chose.

    Attributes:
        exponent: Of the mean input.
        weight_term: Whether the mean weight enters as well.
    """

    __pydantic_config__ = EXACT

    exponent: float
    weight_term: bool
    method: Literal["awq"] = "awq"


Choice = Annotated[SmoothQuantChoice | AWQChoice, Field(discriminator="method")]


@dataclass(frozen=True)
class EdgeDiagnostics:
    """Outcome of one smooth edge.

    Attributes:
        choice: The scale that was judged last; None: there was none to judge.
        skipped: Why the edge stays as it is; empty: its scale has moved.
        tried: Scales that a search looked at; 0 without a search.
        error_before: Error of the outputs without the scale; None: not measured.
        error_after: Error of the outputs with the scale, also of one that was refused.
        smallest_scale: Smallest entry of the scale.
        largest_scale: Largest entry of the scale.
    """

    __pydantic_config__ = EXACT

    choice: Choice | None = None
    skipped: str = ""
    tried: int = 0
    error_before: float | None = None
    error_after: float | None = None
    smallest_scale: float | None = None
    largest_scale: float | None = None
