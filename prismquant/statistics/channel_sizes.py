"""Sizes of the channels of an input, and a sample of it, for smoothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import DataError
from prismquant.statistics.counted import counted_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prismquant.distributed import Ranks

# Consecutive multiples of the golden ratio, modulo 1, spread as evenly over the circle as any
# sequence can: the tokens whose multiples fall below a threshold are spread evenly over the order
# of arrival, whatever the threshold, and beat with no length of a sequence. As 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
# What a channel record consists of, beside the number of tokens.
_PARTS = ("low", "high", "sums", "counts", "inputs", "weights", "vision", "keys")


class ChannelSizes:
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
        """Weight of each token of the sample, float32 ``[n]``."""
        return self._weights

    @property
    def vision(self) -> Tensor:
        """Whether each token of the sample is of an image or video, bool ``[n]``."""
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
        x, counts = counted_tokens(x, weights, self.in_features, self.name, seen)
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

    def merge(self, other: ChannelSizes) -> None:
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

    def share(self, ranks: Ranks) -> None:
        """Add the tokens that the other processes have seen; each of them calls this."""
        if ranks.size == 1:
            return
        states = ranks.gather(self.state_dict())
        first, *others = (self.from_state_dict(state, self) for state in states)
        for other in others:
            first.merge(other)
        vars(self).update(vars(first))

    def state_dict(self) -> dict[str, Tensor]:
        """The whole record as tensors, to be given to :meth:`from_state_dict`."""
        arrived = torch.tensor(self._arrived, dtype=torch.int64)
        return {"arrived": arrived} | {name: getattr(self, f"_{name}") for name in _PARTS}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], like: ChannelSizes) -> ChannelSizes:
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
