"""Failure of a solver: the run stops, or the layers are rounded.

A solver can fail where rounding to nearest cannot: its Hessian has no factorization, or is not
finite, or no calibration token reached the layer. A recipe's ``on_failure`` says what then.
``stop`` ends the run with the layer's name and figures; ``rtn`` rounds the layer to nearest with
the same format and range rule. The invariant: no layer is silently another than the plan says. One
that fell back carries the reason, where the record, the table and the command line
find it.

What rounding shares stops in any case: a damaged weight, a static range that has seen nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from prismquant.algorithms.methods import build_solver
from prismquant.algorithms.problem import LayerProblem, LayerResult, ProblemShape
from prismquant.algorithms.protocols import Solver, Statistic
from prismquant.diagnostics.solver_diagnostics import Failure, SolverDiagnostics
from prismquant.errors import NumericsError

if TYPE_CHECKING:
    from prismquant.recipe.layer_config import OnFailure

_REMEDY = "on_failure: rtn (--on-failure rtn) rounds such layers to nearest"


@dataclass(frozen=True)
class Guarded:
    """A solver whose failures are dealt with as the plan says.

    Attributes:
        solver: Who is asked first.
        on_failure: ``stop``: its error ends the run and names the way out. ``rtn``: what it cannot
            solve is rounded to nearest.
    """

    name: ClassVar[str] = "guarded"

    solver: Solver
    on_failure: OnFailure

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The solver's statistics."""
        return self.solver.statistics

    def solve(self, problem: LayerProblem) -> LayerResult:
        """Solve a problem, or round it to nearest where that is what the plan says.

        Args:
            problem: The layers, with whatever statistics there are.

        Returns:
            The solver's result, or one that says what failed.

        Raises:
            NumericsError: The solver failed and the plan says ``stop``, or rounding fails as well.
        """
        try:
            return self.solver.solve(problem)
        except NumericsError as error:
            if self.on_failure == "stop":
                raise with_way_out(error) from error
            return self.fall_back(problem, Failure(error.what, self.solver.name))

    def fall_back(self, problem: LayerProblem, failure: Failure) -> LayerResult:
        """Solve by the other method what could not be solved.

        The Hessian, if there is one, is not to be trusted: neither scales nor losses look at it, so
        the losses are squared errors of the weight.

        Args:
            problem: The layers.
            failure: Why, and by which method they were to be solved.

        Raises:
            NumericsError: The other method fails too.
        """
        result = build_solver(self.on_failure).solve(replace(problem, hessian=None))
        return replace(result, failure=failure)

    def cost(self, shape: ProblemShape) -> float:
        """About how many multiplications a problem takes; without a Hessian the solver has none."""
        falls_back = self.statistics and not shape.hessian and self.on_failure != "stop"
        return (build_solver(self.on_failure) if falls_back else self.solver).cost(shape)

    def peak_bytes(self, shape: ProblemShape) -> int:
        """The most memory that the solver takes."""
        return self.solver.peak_bytes(shape)

    def merge(self, parts: Sequence[SolverDiagnostics]) -> SolverDiagnostics:
        """Diagnostics of a whole problem, as the solver merges them."""
        return self.solver.merge(parts)


def with_way_out(error: NumericsError) -> NumericsError:
    """An error that the option would have averted, with a remedy that says so."""
    remedy = f"{error.remedy}; {_REMEDY}" if error.remedy else _REMEDY
    return NumericsError(error.what, where=error.where, remedy=remedy)
