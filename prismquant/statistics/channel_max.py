"""Largest magnitude of each channel of an input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from prismquant.distributed import Ranks


class ChannelMax:
    """Largest magnitude of each channel of an input, batch by batch.

    Args:
        in_features: Features of the input.
        device: Where to keep them.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._largest = torch.zeros(in_features, device=device)

    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Take in a batch of tokens.

        Args:
            x: ``[n, in]``, any floating dtype.
            weights: ``[n]``, what each token counts for; 0 leaves it out.
        """
        counted = x if weights is None else x[weights > 0]
        if len(counted):
            seen = counted.abs().amax(0).to(self._largest)
            self._largest = torch.maximum(self._largest, seen)

    def share(self, ranks: Ranks) -> None:
        """Take in what the other processes have seen; each of them calls this."""
        parts = [part["largest"] for part in ranks.gather({"largest": self._largest})]
        self._largest = torch.stack(parts).amax(0).to(self._largest.device)

    def result(self) -> Tensor:
        """The largest magnitudes, float32 ``[in]``; zeros where nothing was seen."""
        return self._largest
