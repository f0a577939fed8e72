"""Second moments of the input of layers that share it, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prismquant.algorithms.correction import Correction
from prismquant.diagnostics.solver_diagnostics import CorrectionDiagnostics
from prismquant.distributed import Ranks
from prismquant.errors import NumericsError
from prismquant.statistics.drift import Drift
from prismquant.statistics.hessian import Hessian
from prismquant.statistics.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Gathered:
    """A Hessian for all who have the same input: who takes it needs no pass over the data.

    Attributes:
        hessian: float32 ``[in, in]``. A solver may work in its memory, and leaves it as it was.
        tokens: Number of tokens that it is of, each by its weight.
        seen: These tokens, for the record.
    """

    hessian: Tensor
    tokens: float
    seen: Tokens


class GroupMoments:
    """The Hessian of an input; with a correction also its drift from the float model's.

    Args:
        name: What errors call the input.
        width: Its features.
        device: Where to keep the sums.
        correction: What is to be done with the drift, if anything.

    Attributes:
        failure: Why there are no moments; None: they can be gathered.
        given: A Hessian that another group has gathered from the same input.
    """

    def __init__(
        self, name: str, width: int, device: torch.device, correction: Correction | None
    ) -> None:
        self._name, self._width, self._device = name, width, device
        self._correction = correction
        self._record: Hessian | Drift | None = None
        self.failure: str | None = None
        self.given: Gathered | None = None

    @property
    def tokens(self) -> float | None:
        """Number of tokens that the Hessian is of."""
        if self.given is not None:
            return self.given.tokens
        return None if self._record is None else self._record.count

    def update(
        self, seen: Tensor, wanted: Tensor | None, weights: Tensor | None, products: torch.dtype
    ) -> None:
        """Take in a batch of tokens.

        Args:
            seen: ``[n, in]``, the input as the layer will see it.
            wanted: ``[n, in]``, what the float model has in its place; needed for a drift.
            weights: ``[n]``, what each token counts for.
            products: In which dtype the layers multiply: what is rounded for that can be rounded
                here, where it saves time.
        """
        if self._correction is not None and wanted is not None:
            if not isinstance(self._record, Drift):
                self._record = Drift(seen.shape[1], seen.device, self._name)
            self._record.update(seen, wanted, weights)
            return
        if not isinstance(self._record, Hessian):
            self._record = Hessian(seen.shape[1], seen.device, self._name)
        self._record.update(seen.to(products), weights)

    def share(self, ranks: Ranks) -> None:
        """Take in what all ranks have seen."""
        kind = Hessian if self._correction is None else Drift
        self._record = self._record or kind(self._width, self._device, self._name)
        self._record.share(ranks)

    def hessian(self, columns: Tensor | None) -> Tensor | None:
        """The Hessian, if it was gathered; columns that were split off are no longer in it."""
        if self.given is not None:
            return self.given.hessian
        if self._record is None:
            return None
        hessian = self._record.result(consume=True)
        if columns is None:
            return hessian
        return hessian.index_fill(0, columns, 0.0).index_fill(1, columns, 0.0)

    def corrected(
        self, weights: Sequence[Tensor]
    ) -> tuple[list[Tensor], CorrectionDiagnostics | None]:
        """The weights that are to be approached."""
        if self._correction is None or not isinstance(self._record, Drift):
            return list(weights), None
        corrected, diagnostics = self._correction.correct(self._record, weights)
        return list(corrected), diagnostics

    def release(self) -> None:
        """Give the memory of the sums back."""
        self._record = self.given = None

    def give_up(self, why: str) -> None:
        """Do without moments."""
        self.failure = why
        self.release()

    def require(self, remedy: str, what: str) -> None:
        """Refuse to go on where nothing was seen.

        Raises:
            NumericsError: Nothing was.
        """
        if self._record is None and self.given is None:
            raise NumericsError(what, where=self._name, remedy=remedy)
