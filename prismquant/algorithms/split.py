"""Keeping single input columns in floating point where they alone set the range.

After an online rotation without signs, one column of a layer's input holds the sum of many, and a
mean that the others do not have (Yu et al., MQuant, arXiv 2502.00425, section 4.3, "rotation
magnitude suppression"). Split off, it no longer stretches the scale of the rest. Which column that
is, and whether it is worth it, is measured here, not assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prismquant.errors import check_bounds

if TYPE_CHECKING:
    from torch import Tensor

    from prismquant.algorithms.model_outline import ModelOutline, Scope


@dataclass(frozen=True)
class KeptColumns:
    """Columns of a layer's input that may stay in floating point.

    Attributes:
        layer: The layer's name.
        columns: So many at most.
    """

    layer: str
    columns: int


@dataclass(frozen=True, eq=False)
class ColumnProblem:
    """A layer's input of which single columns may stay in floating point.

    Attributes:
        magnitudes: ``[in]``, the largest magnitude of each column.
    """

    magnitudes: Tensor


@dataclass(frozen=True)
class Split:
    """When columns are split off.

    Attributes:
        threshold: A column goes when its largest magnitude is this many times that of all that
            remain.
        columns: At most so many of a layer.

    Raises:
        RecipeError: A value is out of bounds.
    """

    name: ClassVar[str] = "split"
    edit: ClassVar[type[KeptColumns]] = KeptColumns

    threshold: float = 2.0
    columns: int = 1

    def __post_init__(self) -> None:
        bounds = {
            "threshold": (1 <= self.threshold <= 1e6, "from 1 to 1e6"),
            "columns": (1 <= self.columns <= 64, "from 1 to 64"),
        }
        check_bounds(self, bounds)

    def plan(self, model: ModelOutline, scope: Scope) -> list[KeptColumns]:
        """Every layer that is meant may have columns of its own."""
        meant = (layer for layer in model.sites if scope.means(layer))
        return [KeptColumns(layer.name, self.columns) for layer in meant]

    def fit(self, problem: ColumnProblem) -> list[int]:
        """Find the columns that alone stretch the range of a layer's input.

        Args:
            problem: Magnitudes of the input's columns.

        Returns:
            The fewest columns, at most ``columns`` and in ascending order, without which the range
            is ``threshold`` times smaller; none when no number of them achieves that.
        """
        order = problem.magnitudes.argsort(descending=True, stable=True)
        count = min(self.columns, len(order) - 1)
        if count < 1:
            return []
        ranked = problem.magnitudes[order].tolist()
        for taken in range(1, count + 1):
            if ranked[taken - 1] >= self.threshold * ranked[taken] and ranked[taken - 1] > 0:
                return sorted(order[:taken].tolist())
        return []
