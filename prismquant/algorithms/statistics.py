"""What calibration leaves behind of a layer's input: its second moments.

A :class:`HessianRecord` is a running sum of ``w x x^T`` and of ``w``; the mean is one division at
the very end. So a token counts the same in whichever batch it comes, two records merge by addition,
and tokens of weight 0 (padding) leave no trace, whatever they hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import DataError, NumericsError
from prismquant.numerics.affine import check_finite

if TYPE_CHECKING:
    from collections.abc import Mapping


class HessianRecord:
    """Second moments of an input, gathered batch by batch.

    Args:
        in_features: Features of the input.
        device: Where to keep the sum.
        dtype: Of the sum. Products of a batch are summed in float32; float64 keeps more of the sum
            over very many batches.
        name: What errors call the input, e.g. the layer's name.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        name: str | None = None,
    ) -> None:
        self.in_features = in_features
        self.name = name
        self._sum = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        self._count = 0.0

    @property
    def count(self) -> float:
        """The sum of the weights of all tokens so far: their number where each counts for one."""
        return self._count

    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Take in a batch of tokens.

        Args:
            x: ``[n, in]``, any floating dtype.
            weights: ``[n]``, not negative, bool or number; what each token counts for, by default
                1. Tokens of weight 0 are dropped unread.

        Raises:
            NumericsError: A counted token holds NaN or an infinity, or a weight is not a finite
                number from 0 on.
            DataError: The shapes do not fit.
        """
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise DataError(
                f"expected tokens [n, {self.in_features}], got {list(x.shape)}", where=self.name
            )
        if weights is not None:
            weights = self._checked(weights, len(x)).to(x.device)
            counted = weights != 0
            x, weights = x[counted], weights[counted]
        try:
            check_finite(x, "the input")
        except NumericsError as error:
            raise NumericsError(error.what, where=self.name, remedy=error.remedy) from error
        x = x.to(self._sum.device, torch.float32)
        self._count += float(len(x)) if weights is None else float(weights.sum(dtype=torch.float64))
        weighed = x if weights is None else x * weights.to(x.device, torch.float32).unsqueeze(1)
        if self._sum.dtype == torch.float32:
            self._sum.addmm_(x.T, weighed)
        else:
            self._sum += x.T @ weighed

    def merge(self, other: HessianRecord) -> None:
        """Add the tokens of another record, as if this one had seen them too.

        Args:
            other: A record of the same input; it stays as it is.

        Raises:
            DataError: It has another number of features.
        """
        if other.in_features != self.in_features:
            raise DataError(
                f"records of {self.in_features} and {other.in_features} features cannot be merged",
                where=self.name,
            )
        self._sum += other._sum.to(self._sum.device)
        self._count += other._count

    def mean(self) -> Tensor:
        """The mean of ``x x^T`` over the counted tokens.

        Returns:
            float32 ``[in, in]``, exactly symmetric.

        Raises:
            NumericsError: No token was counted, or the sum has left the dtype's range.
        """
        if self._count <= 0:
            raise NumericsError(
                "no calibration token has reached this layer",
                where=self.name,
                remedy="add calibration samples of the modality that passes it, or use solver: rtn",
            )
        mean = self._sum / self._count
        # The two halves are summed in different orders; their average is the same for both.
        mean = ((mean + mean.T) / 2).to(torch.float32)
        try:
            check_finite(mean, "the Hessian")
        except NumericsError as error:
            raise NumericsError(
                error.what, where=self.name, remedy="the layer's input is too large for float32"
            ) from error
        return mean

    def state_dict(self) -> dict[str, Tensor]:
        """What :meth:`from_state_dict` needs: ``sum`` ``[in, in]`` and ``count`` ``[]``."""
        return {
            "sum": self._sum.clone(),
            "count": torch.tensor(self._count, dtype=torch.float64),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], name: str | None = None) -> HessianRecord:
        """Restore a record.

        Args:
            state: What :meth:`state_dict` returned.
            name: What errors call the input.

        Returns:
            A record that goes on exactly where the saved one stopped, on the device of ``sum``.

        Raises:
            DataError: A tensor is missing or has the wrong shape.
        """
        if set(state) != {"sum", "count"} or state["sum"].ndim != 2:
            raise DataError(
                f"a Hessian record consists of 'sum' [in, in] and 'count', not {sorted(state)}",
                where=name,
            )
        total = state["sum"]
        record = cls(total.shape[0], total.device, total.dtype, name)
        if total.shape != record._sum.shape:
            raise DataError(f"'sum' must be square, not {list(total.shape)}", where=name)
        record._sum.copy_(total)
        record._count = float(state["count"])
        return record

    def _checked(self, weights: Tensor, tokens: int) -> Tensor:
        if tuple(weights.shape) != (tokens,):
            raise DataError(
                f"{tokens} tokens need as many weights, not {list(weights.shape)}", where=self.name
            )
        weights = weights.to(torch.float32)
        if not bool(((weights >= 0) & torch.isfinite(weights)).all()):
            raise NumericsError(
                "a token's weight must be a finite number from 0 on", where=self.name
            )
        return weights
