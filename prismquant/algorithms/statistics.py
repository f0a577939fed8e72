"""What calibration leaves behind of a layer's input: second moments, channel sizes, a sample.

A :class:`HessianRecord` is a running sum of ``w x x^T`` and of ``w``; the mean is one division at
the very end. So a token counts the same in whichever batch it comes, two records merge by addition,
and tokens of weight 0 (padding) leave no trace, whatever they hold. A :class:`ChannelRecord` keeps
what methods that rescale channels look at: extremes and means of each channel, apart for text and
vision, and some of the tokens themselves.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import DataError, NumericsError
from prismquant.kernels import products
from prismquant.kernels.moments import two_sum
from prismquant.numerics.affine import check_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


# Features whose products with as many others are summed at once: few enough to stay in the cache.
_BLOCK = 512
# Rows of a block on the diagonal that are multiplied at once, by what is left of its other end.
_STRIP = 128


class HessianRecord:
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
        x, counts = _counted_tokens(x, weights, self.in_features, self.name, self._count)
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
        for (_, mine), (_, theirs) in zip(self._lines(), other._lines(), strict=True):
            for (_, high, low), (_, more, rest) in zip(mine, theirs, strict=True):
                two_sum(high, low, more.to(high.device, copy=True))
                low += rest.to(low.device)
        self._count += other._count

    def sum_over(self, add_up: Callable[[Tensor], None]) -> None:
        """Add the tokens that other processes have seen.

        Args:
            add_up: Replaces a tensor by its sum over all processes, each of which calls this.
        """
        count = torch.tensor([self._count], dtype=torch.float64)
        add_up(count)
        self._count = float(count)
        for _, line in self._lines():
            whole = torch.cat([high.double() + low.double() for _, high, low in line], dim=1)
            add_up(whole)
            for columns, high, low in line:
                total = whole[:, columns]
                high.copy_(total)
                low.copy_(total - high.double())

    def mean(self, *, consume: bool = False) -> Tensor:
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
        """What :meth:`from_state_dict` needs: ``sum``, ``rest`` and ``count``."""
        return {
            "sum": self._sum.clone(),
            "rest": self._rest.clone(),
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


# Consecutive multiples of the golden ratio, modulo 1, spread as evenly over the circle as any
# sequence can: the tokens whose multiples fall below a threshold are spread evenly over the order
# of arrival, whatever the threshold, and beat with no length of a sequence. As 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
# What a channel record consists of, beside the number of tokens.
_PARTS = ("low", "high", "sums", "counts", "inputs", "weights", "vision", "keys")


class ChannelRecord:
    """Sizes of an input's channels by modality, and a sample of its tokens.

    The sample depends only on the counted tokens and their order, not on how they were cut into
    batches. Tokens of weight 0 (padding) never enter.

    Args:
        in_features: Features of the input.
        name: What errors call the input.
        sample: Tokens to keep at most.
        device: Where to keep everything.
    """

    def __init__(
        self,
        in_features: int,
        name: str | None = None,
        sample: int = 1024,
        device: torch.device | str = "cpu",
    ) -> None:
        if sample < 1:
            raise DataError(f"a sample of {sample} tokens is empty", where=name)
        self.in_features = in_features
        self.name = name
        self.sample = sample
        # Zero belongs to every range, so it can stand for "nothing seen".
        self._low = torch.zeros(2, in_features, device=device)
        self._high = torch.zeros(2, in_features, device=device)
        self._sums = torch.zeros(2, in_features, dtype=torch.float64, device=device)
        self._counts = torch.zeros(2, dtype=torch.float64, device=device)
        self._arrived = 0
        self._inputs = torch.zeros(0, in_features, device=device)
        self._weights = torch.zeros(0, device=device)
        self._vision = torch.zeros(0, dtype=torch.bool, device=device)
        self._keys = torch.zeros(0, dtype=torch.int64, device=device)

    @property
    def counts(self) -> Tensor:
        """Sums of token weights, float64 ``[2]``: text, vision."""
        return self._counts

    @property
    def low(self) -> Tensor:
        """The smallest value of each channel, at most 0; float32 ``[2, in]``: text, vision."""
        return self._low

    @property
    def high(self) -> Tensor:
        """The largest value of each channel, at least 0; float32 ``[2, in]``: text, vision."""
        return self._high

    @property
    def absmax(self) -> Tensor:
        """The largest magnitude of each channel, 0 without tokens; float32 ``[2, in]``."""
        return torch.maximum(-self._low, self._high)

    @property
    def absmean(self) -> Tensor:
        """The mean magnitude of each channel, 0 without tokens; float32 ``[2, in]``."""
        # Without tokens the sum is 0, and so is the quotient by whatever stands in for 0.
        count = torch.where(self._counts > 0, self._counts, 1.0)
        return (self._sums / count.unsqueeze(1)).to(torch.float32)

    @property
    def inputs(self) -> Tensor:
        """The sample, float32 ``[n, in]``, in order of arrival."""
        return self._inputs

    @property
    def token_weights(self) -> Tensor:
        """What each token of the sample counts for, float32 ``[n]``."""
        return self._weights

    @property
    def vision(self) -> Tensor:
        """Which tokens of the sample are of an image or video, bool ``[n]``."""
        return self._vision

    def update(
        self, x: Tensor, weights: Tensor | None = None, vision: Tensor | None = None
    ) -> None:
        """Take in a batch of tokens.

        Args:
            x: ``[n, in]``, any floating dtype.
            weights: ``[n]``, not negative, bool or number; what each token counts for, by default
                1. Tokens of weight 0 are dropped unread.
            vision: bool ``[n]``, true for tokens of images and videos; by default none is.

        Raises:
            NumericsError: A counted token holds NaN or an infinity, or a weight is not a finite
                number from 0 on.
            DataError: The shapes do not fit.
        """
        seen = float(self._counts.sum())
        x, counts = _counted_tokens(x, weights, self.in_features, self.name, seen)
        if vision is not None:
            if tuple(vision.shape) != tuple(counts.shape):
                raise DataError(
                    f"{len(counts)} tokens need as many vision marks, not {list(vision.shape)}",
                    where=self.name,
                )
            vision = vision.to(x.device, torch.bool)[counts != 0]
        else:
            vision = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        device = self._counts.device
        x, vision = x.to(device, torch.float32), vision.to(device)
        kept = counts[counts != 0].to(device)
        self._measure(x, kept, vision)
        index = torch.arange(self._arrived, self._arrived + len(x), device=device)
        self._arrived += len(x)
        self._take(x, kept, vision, index * _GOLDEN)

    def merge(self, other: ChannelRecord) -> None:
        """Add the tokens of another record, as if they came after those of this one.

        Sizes are exactly those of one record of all tokens. The sample takes from both in
        proportion to how many tokens each has seen.

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
        device = self._counts.device
        self._low = torch.minimum(self._low, other._low.to(device))
        self._high = torch.maximum(self._high, other._high.to(device))
        self._sums += other._sums.to(device)
        self._counts += other._counts.to(device)
        self._arrived += other._arrived
        parts = (other._inputs, other._weights, other._vision, other._keys)
        self._take(*(part.to(device) for part in parts))

    def state_dict(self) -> dict[str, Tensor]:
        """The whole record as tensors, to be given to :meth:`from_state_dict`."""
        arrived = torch.tensor(self._arrived, dtype=torch.int64)
        return {"arrived": arrived} | {name: getattr(self, f"_{name}") for name in _PARTS}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], like: ChannelRecord) -> ChannelRecord:
        """Make a record again.

        Args:
            state: What :meth:`state_dict` returned.
            like: A record of the same input, whose name, device and sample size it has.
        """
        device = like._counts.device
        record = cls(like.in_features, like.name, like.sample, device)
        record._arrived = int(state["arrived"])
        for name in _PARTS:
            setattr(record, f"_{name}", state[name].to(device))
        return record

    def _measure(self, x: Tensor, weights: Tensor, vision: Tensor) -> None:
        for modality, chosen in enumerate((~vision, vision)):
            if not bool(chosen.any()):
                continue
            rows = x if bool(chosen.all()) else x[chosen]
            self._low[modality] = torch.minimum(self._low[modality], rows.amin(0))
            self._high[modality] = torch.maximum(self._high[modality], rows.amax(0))
            self._sums[modality] += weights[chosen] @ rows.abs()
            self._counts[modality] += weights[chosen].sum(dtype=torch.float64)

    def _take(self, x: Tensor, weights: Tensor, vision: Tensor, keys: Tensor) -> None:
        """Keep those of the sample and the new tokens that have the smallest keys."""
        if len(self._keys) == self.sample:
            promising = keys < self._keys.max()
            if not bool(promising.any()):
                return
            x, weights = x[promising], weights[promising]
            vision, keys = vision[promising], keys[promising]
        every = torch.cat([self._keys, keys])
        kept = torch.argsort(every, stable=True)[: self.sample].sort().values
        self._keys = every[kept]
        self._inputs = torch.cat([self._inputs, x])[kept]
        self._weights = torch.cat([self._weights, weights])[kept]
        self._vision = torch.cat([self._vision, vision])[kept]


def _counted_tokens(
    x: Tensor, weights: Tensor | None, features: int, name: str | None, seen: float
) -> tuple[Tensor, Tensor]:
    """The tokens that count, checked; and the weights of all tokens, float32 ``[n]``.

    ``seen`` is how many came before, for an error.
    """
    if x.ndim != 2 or x.shape[1] != features:
        raise DataError(f"expected tokens [n, {features}], got {list(x.shape)}", where=name)
    if weights is None:
        counts = torch.ones(len(x), device=x.device)
    else:
        counts = _checked_weights(weights, len(x), name).to(x.device)
        x = x[counts != 0]
    try:
        check_finite(x, "the input")
    except NumericsError as error:
        what = f"{error.what}; {seen:g} tokens had come before"
        raise NumericsError(what, where=name, remedy=error.remedy) from error
    return x, counts


def _checked_weights(weights: Tensor, tokens: int, name: str | None) -> Tensor:
    if tuple(weights.shape) != (tokens,):
        raise DataError(
            f"{tokens} tokens need as many weights, not {list(weights.shape)}", where=name
        )
    weights = weights.to(torch.float32)
    if not bool(((weights >= 0) & torch.isfinite(weights)).all()):
        raise NumericsError("a token's weight must be a finite number from 0 on", where=name)
    return weights
