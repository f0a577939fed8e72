"""Protocols that methods follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from prismquant.algorithms.problem import LayerProblem, LayerResult


class Solver(Protocol):
    """A method that chooses codes: a frozen dataclass whose fields are its options.

    Every field has a default; ``__post_init__`` raises RecipeError on a value out of bounds. A
    property ``idle`` may name options that change nothing as the others stand, and why.
    """

    name: ClassVar[str]

    @property
    def needs_hessian(self) -> bool:
        """Whether a problem without a Hessian is refused."""
        ...

    def solve(self, problem: LayerProblem) -> LayerResult:
        """Choose the codes of every layer of a problem."""
        ...
