"""Edits of a model before anything is rounded: a closed set, which every transform is made of.

A transform has two halves. The first needs the model alone and says where it edits. Rotations of a
tower are complete with it: a reader shows the weights as if they had been rotated, and where a
nonlinearity is in the way the other half of a rotation is done while the model runs. Scale along a
smooth edge, and columns that stay in floating point, are places so far: the second half fits them
to what calibration sees there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from prismquant.models.arch import Modality
    from prismquant.models.bound import BoundEdge, BoundSite
    from prismquant.models.rotation import RotatedTower


class Scope(Protocol):
    """The part of a model that a recipe means."""

    @property
    def modality(self) -> tuple[Modality, ...]:
        """Towers that it is about; empty: all."""

    def means(self, layer: BoundSite, /) -> bool:
        """Whether it means a layer."""


@dataclass(frozen=True)
class Edits:
    """Places at which one transform edits a model; None: it makes no edits of this kind.

    Attributes:
        towers: Towers whose weights are rotated.
        edges: Smooth edges along which scale moves.
        outlier_columns: By the layer's name, how many columns of its input, at most, stay in
            floating point.
    """

    towers: tuple[RotatedTower, ...] | None = None
    edges: tuple[BoundEdge, ...] | None = None
    outlier_columns: Mapping[str, int] | None = None


@dataclass(frozen=True, eq=False)
class ColumnProblem:
    """A layer's input of which single columns may stay in floating point.

    Attributes:
        magnitudes: ``[in]``, the largest magnitude of each column.
    """

    magnitudes: Tensor
