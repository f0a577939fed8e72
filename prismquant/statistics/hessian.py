"""Hessian of a layer's squared output error: the second moments of its input.

A :class:`Hessian` is a running sum of ``w x x^T`` and of ``w``; the mean is one division at
the very end. So a token counts the same in whichever batch it comes, two records merge by addition,
and tokens of weight 0 (padding) leave no trace, whatever they hold.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import DataError, NumericsError
from prismquant.kernels import products
from prismquant.kernels.moments import two_sum
from prismquant.numerics.finite import check_finite
from prismquant.statistics.counted import counted_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prismquant.distributed import Ranks


# Features whose products with as many others are summed at once: few enough to stay in the cache.
_BLOCK = 512
# Rows of a block on the diagonal that are multiplied at once, by what is left of its other end.
_STRIP = 128


class Hessian:
    """Second moments of an input, gathered batch by batch.

    Only one triangle is summed, block by block: half the work. The memory of the other one keeps
    what rounding took from each sum (:func:`prismquant.kernels.moments.two_sum`), block by block,
    so that a sum is good to twice the digits of float32, and its mean does not depend on the order
    of the batches, nor on how they are dealt to several records that are merged later.

    Args:
        in_features: Features of the input.
        device: Where to keep the sum.
        name: What errors call the input, e.g. the layer's name.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device | str = "cpu",
        name: str | None = None,
    ) -> None:
        self.in_features = in_features
        self.name = name
        self._sum = torch.zeros(in_features, in_features, device=device)
        # Blocks on the diagonal, and narrower ones of a last line, have no counterpart of their
        # shape to keep their rest.
        height = min(_BLOCK, in_features)
        height += in_features % height
        self._rest = torch.zeros(height, in_features, device=device)
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
        x, counts = counted_tokens(x, weights, self.in_features, self.name, self._count)
        x = x.to(self._sum.device)
        if weights is None:
            self._count += float(len(x))
        else:
            weights = counts[counts != 0]
            self._count += float(weights.sum(dtype=torch.float64))
            weights = weights.to(x.device, torch.float32).unsqueeze(1)
        x, weights = _factors(x, weights)
        if products.adds(x):
            products.add_products(x, self._running_sums())
            return
        for rows, line in self._lines():
            panel = x[:, rows] if weights is None else x[:, rows] * weights
            for columns, high, low in line:
                block = x[:, columns]
                # On other devices, launches cost more than what a cut saves.
                cut = rows == columns and x.device.type == "cpu"
                for part, width in _strips(len(high), cut=cut):
                    product = products.token_product(panel[:, part], block[:, width])
                    two_sum(high[part, width], low[part, width], product)

    def merge(self, other: Hessian) -> None:
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
        for (_, mine), (_, theirs) in zip(self._lines(), other._lines(), strict=True):
            for (_, high, low), (_, more, rest) in zip(mine, theirs, strict=True):
                two_sum(high, low, more.to(high.device, copy=True))
                low += rest.to(low.device)
        self._count += other._count

    def share(self, ranks: Ranks) -> None:
        """Add the tokens that the other processes have seen; each of them calls this."""
        count = torch.tensor([self._count], dtype=torch.float64)
        ranks.sum_(count)
        self._count = float(count)
        for _, line in self._lines():
            whole = torch.cat([high.double() + low.double() for _, high, low in line], dim=1)
            ranks.sum_(whole)
            for columns, high, low in line:
                total = whole[:, columns]
                high.copy_(total)
                low.copy_(total - high.double())

    def result(self, *, consume: bool = False) -> Tensor:
        """The mean of ``x x^T`` over the counted tokens.

        Args:
            consume: Put the mean in the place of the sum, so that no other matrix of its size is
                needed; the record must not be used any more.

        Returns:
            float32 ``[in, in]``, exactly symmetric.

        Raises:
            NumericsError: No token was counted, or the sum has left the range of float32.
        """
        if self._count <= 0:
            raise NumericsError(
                "no calibration token reached this layer",
                where=self.name,
                remedy="add calibration samples of the modality that passes it, or use solver: rtn",
            )
        mean = self._sum if consume else torch.empty_like(self._sum)
        for rows, line in self._lines():
            for columns, high, low in line:
                values = ((high.double() + low.double()) / self._count).to(torch.float32)
                if rows == columns:
                    values = values.tril() + values.tril(-1).T
                mean[rows, columns] = values
                mean[columns, rows] = values.T
        try:
            check_finite(mean, f"the Hessian over {self._count:g} tokens")
        except NumericsError as error:
            raise NumericsError(
                error.what, where=self.name, remedy="the layer's input is too large for float32"
            ) from error
        return mean

    def state_dict(self) -> dict[str, Tensor]:
        """The whole statistic, for :meth:`from_state_dict`: ``sum``, ``rest`` and ``count``."""
        return {
            "sum": self._sum.clone(),
            "rest": self._rest.clone(),
            "count": torch.tensor(self._count, dtype=torch.float64),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], name: str | None = None) -> Hessian:
        """Restore a record.

        Args:
            state: What :meth:`state_dict` returned.
            name: What errors call the input.

        Returns:
            A record that goes on exactly where the saved one stopped, on the device of ``sum``.

        Raises:
            DataError: A tensor is missing or has the wrong shape.
        """
        if set(state) != {"sum", "rest", "count"} or state["sum"].ndim != 2:
            raise DataError(
                "a Hessian record consists of 'sum' [in, in], 'rest' and 'count', "
                f"not {sorted(state)}",
                where=name,
            )
        total = state["sum"]
        record = cls(total.shape[0], total.device, name)
        if total.shape != record._sum.shape or state["rest"].shape != record._rest.shape:
            raise DataError(f"'sum' must be square, not {list(total.shape)}", where=name)
        record._sum.copy_(total)
        record._rest.copy_(state["rest"])
        record._count = float(state["count"])
        return record

    def _running_sums(self) -> Iterator[products.RunningSum]:
        for rows, line in self._lines():
            for columns, high, low in line:
                yield products.RunningSum(rows.start, columns.start, high, low)

    def _lines(self) -> Iterator[tuple[slice, list[tuple[slice, Tensor, Tensor]]]]:
        """The blocks of the lower triangle, line by line.

        Yields:
            Rows; and of each block of them its columns, the sum, and the rest that belongs to it.
        """
        size = min(_BLOCK, self.in_features)
        ends = [*range(0, self.in_features, _BLOCK), self.in_features]
        blocks = [slice(start, stop) for start, stop in itertools.pairwise(ends)]
        for number, rows in enumerate(blocks):
            height = rows.stop - rows.start
            whole = height == size
            line = [
                (c, self._sum[rows, c], self._sum[c, rows] if whole else self._rest[size:, c])
                for c in blocks[:number]
            ]
            yield rows, [*line, (rows, self._sum[rows, rows], self._rest[:height, rows])]


def _strips(size: int, *, cut: bool) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of parts of a block; of one that is cut, those that reach the diagonal."""
    # A strip of few rows would be multiplied by other code, whose last bits may differ.
    step = _STRIP if cut and size % _STRIP == 0 else size
    for start in range(0, size, step):
        stop = start + step
        yield slice(start, stop), slice(0, stop) if cut else slice(None)


def _factors(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens in the dtype that they are multiplied in, and weights unless these change nothing.

    Narrow numbers stay as they are where products of them are exact. Times a weight, they would be
    rounded; but once padding is gone, weights often are all 1.

    Args:
        x: ``[n, in]``, any floating dtype.
        weights: float32 ``[n, 1]`` on the same device, or ``None``.

    Returns:
        ``[n, in]`` in float32 or as it is, and the weights.
    """
    narrow = x.dtype != torch.float32 and products.supports(x.device, x.dtype)
    if narrow and (weights is None or bool((weights == 1).all())):
        return x, None
    return x.to(torch.float32), weights
