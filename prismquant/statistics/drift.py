"""Drift of a layer's input: how far what precedes it has moved it from the float model's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import DataError
from prismquant.statistics.hessian import Hessian

if TYPE_CHECKING:
    from prismquant.distributed import Ranks

# Every so many calls one is held out.
_HELD_OUT = 4


class Drift:
    """Moments of an input and of how far it has drifted from the float model's.

    Calls are dealt to two parts, one of them held out, so that what one suggests can be tried on
    the other.

    Args:
        in_features: Features of the input.
        device: Where to keep the sums.
        name: What errors call the input.

    Attributes:
        moments: Of the input, of each part; the second one is held out.
        drifts: Sums of ``(f - u) u^T`` of each part, float32 ``[in, in]``.
    """

    def __init__(
        self, in_features: int, device: torch.device | str = "cpu", name: str | None = None
    ) -> None:
        self.moments = [Hessian(in_features, device, name=name) for _ in range(2)]
        self.drifts = [torch.zeros(in_features, in_features, device=device) for _ in range(2)]
        self._calls = 0
        self.name = name

    def update(self, seen: Tensor, wanted: Tensor, weights: Tensor | None = None) -> None:
        """Take in a batch of tokens.

        Args:
            seen: ``[n, in]``, the input as the layer will see it.
            wanted: ``[n, in]``, what the float model has in its place.
            weights: ``[n]``, what each token counts for; 0 leaves it out.

        Raises:
            NumericsError: A counted token is not finite.
            DataError: The shapes do not fit.
        """
        if seen.shape != wanted.shape:
            raise DataError(
                f"inputs {list(seen.shape)} and {list(wanted.shape)} are not of the same tokens",
                where=self.name,
            )
        part = int(self._calls % _HELD_OUT == _HELD_OUT - 1)
        self._calls += 1
        self.moments[part].update(seen, weights)
        if weights is not None:
            counted = weights != 0
            seen, wanted, weights = seen[counted], wanted[counted], weights[counted]
        drift = wanted.to(torch.float32) - seen.to(torch.float32)
        if weights is not None:
            drift = drift * weights.to(drift).unsqueeze(1)
        self.drifts[part].addmm_(drift.T, seen.to(torch.float32))

    def share(self, ranks: Ranks) -> None:
        """Add the tokens that the other processes have seen; each of them calls this."""
        for moments, drift in zip(self.moments, self.drifts, strict=True):
            moments.share(ranks)
            ranks.sum_(drift)

    @property
    def count(self) -> float:
        """The sum of the weights of all tokens so far."""
        return sum(moments.count for moments in self.moments)

    def result(self, *, consume: bool = False) -> Tensor:
        """The Hessian: the mean of ``u u^T`` over all tokens, float32 ``[in, in]``.

        Args:
            consume: Nothing is saved by it here; see :meth:`Hessian.result`.
        """
        whole = Hessian.from_state_dict(self.moments[0].state_dict(), self.name)
        whole.merge(self.moments[1])
        return whole.result(consume=True)
