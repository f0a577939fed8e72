"""Protocols that methods follow, and what each declares so that others need not know its name."""

from __future__ import annotations

from typing import (
    TYPE_CHECKING,
    ClassVar,
    Literal,
    Protocol,
    TypeAlias,
    TypeVar,
    runtime_checkable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from prismquant.algorithms.block_problem import BlockProblem, BlockResult
    from prismquant.algorithms.model_outline import ModelOutline, Scope
    from prismquant.algorithms.problem import (
        LayerProblem,
        LayerResult,
        ProblemShape,
        SolvedWeight,
    )
    from prismquant.algorithms.rotation import RotatedTower
    from prismquant.algorithms.smooth_edge import ScaledEdge
    from prismquant.algorithms.split import KeptColumns
    from prismquant.diagnostics.solver_diagnostics import SolverDiagnostics
    from prismquant.formats.spec import NumberSpec
    from prismquant.numerics.rules import RangeRule
    from prismquant.numerics.scales import ScaleFormat

ProblemT = TypeVar("ProblemT", contravariant=True)
FittedT = TypeVar("FittedT", covariant=True)

Edit: TypeAlias = "RotatedTower | ScaledEdge | KeptColumns"
"""An edit of a model before anything is rounded: a closed set, which all transforms are made of."""

Statistic = Literal["hessian"]
"""Statistics of an input that a solver may ask for."""


class Solver(Protocol):
    """A method that chooses codes: a frozen dataclass whose fields are its options.

    Every field has a default; ``__post_init__`` raises RecipeError on a value out of bounds. A
    property ``idle`` may name options that change nothing as the others stand, and why.
    """

    name: ClassVar[str]

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """Statistics without which a problem is refused."""
        ...

    def solve(self, problem: LayerProblem) -> LayerResult:
        """Choose the codes of every layer of a problem."""
        ...

    def cost(self, shape: ProblemShape) -> float:
        """About how many multiplications a problem takes."""
        ...

    def peak_bytes(self, shape: ProblemShape) -> int:
        """The most memory that a solve takes on a CPU, beside its problem."""
        ...

    def merge(self, parts: Sequence[SolverDiagnostics]) -> SolverDiagnostics:
        """Diagnostics of a whole problem, from those of its row shards; there is one at least."""
        ...


@runtime_checkable
class WeightSolver(Protocol):
    """A solver that can take a weight by itself, as it is stored, a block of rows at a time."""

    def solve_weight(
        self,
        weight: Tensor,
        spec: NumberSpec,
        rule: RangeRule,
        form: ScaleFormat,
        pulse: Callable[[], None] | None = None,
    ) -> SolvedWeight:
        """Choose the codes of one weight, without statistics.

        Args:
            weight: ``[out, in]``, any floating dtype.
            spec: A static format.
            rule: How scales are chosen.
            form: How scales are stored, with the global scale where there is one.
            pulse: Called before every block; what it raises ends the work.
        """
        ...


class Transform(Protocol):
    """A change of the model before anything is rounded, which leaves its float function as it is.

    A frozen dataclass whose fields are its options. Every field has a default; ``__post_init__``
    raises RecipeError on a value out of bounds. A property ``idle`` may name options that change
    nothing as the others stand, and why. ``edit`` is the one kind of edit that it makes. A mapping
    ``rough`` may give options with which it is quicker, and good enough to be compared with others.

    It has two halves. The first, ``plan``, needs the model alone. A tower that is rotated is
    complete with it: a reader shows the weights as if they had been rotated, and behind a
    nonlinearity the other half of the rotation is done while the model runs. Scale along a smooth
    edge, and columns that stay in floating point, are places so far: the second half, ``fit``, fits
    them to what calibration sees there.
    """

    name: ClassVar[str]
    edit: ClassVar[type[Edit]]

    def plan(self, model: ModelOutline, scope: Scope) -> Sequence[Edit]:
        """Say where it edits a model, from the model alone.

        Raises:
            PlanError: What is meant cannot be edited.
        """
        ...


class FittedTransform(Transform, Protocol[ProblemT, FittedT]):
    """A transform whose edits are fitted to what calibration sees at their places.

    Edges ask for an :class:`EdgeProblem` and give an :class:`EdgeResult`; columns of a layer's
    input ask for a :class:`ColumnProblem` and give the indices of those that stay in floating
    point.
    """

    def fit(self, problem: ProblemT, /) -> FittedT:
        """Fit the edit at one place."""
        ...


class Tuner(Protocol):
    """A method that tunes a block: a frozen dataclass whose fields are its options.

    Every field has a default; ``__post_init__`` raises RecipeError on a value out of bounds.
    ``same_inputs`` says what the targets are: the float block's outputs for the inputs that the
    quantized model gives it, or those of the float model.
    """

    name: ClassVar[str]
    same_inputs: ClassVar[bool]

    def tune(self, problem: BlockProblem) -> BlockResult:
        """Choose codes and scales of every layer of a block; never worse than the start."""
        ...
