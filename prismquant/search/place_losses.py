"""Losses that look at some places of a sample, and their gradients from the logits down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PlaceLosses:
    """Losses of one sample that look at the same places.

    Attributes:
        places: Int64 positions in the row, [P].
        numbers: Numbers of the losses.
        gradients: Gives their gradients ``[losses, p, vocabulary]`` at logits ``[p, vocabulary]``
            of consecutive places, from the first to the last; and is told which these are.
    """

    places: Tensor
    numbers: range
    gradients: Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive places of some losses, as rows of a chunk of places.

    Attributes:
        losses: The losses.
        part: Which of their places these are.
        rows: Rows of the chunk.
    """

    losses: PlaceLosses
    part: slice
    rows: slice

    @property
    def places(self) -> Tensor:
        """Positions in the sample's row."""
        return self.losses.places[self.part]


def chunks(losses: Sequence[PlaceLosses], most: int) -> Iterator[list[Segment]]:
    """Places of losses, one loss after the other, in chunks.

    Args:
        losses: All losses of a sample.
        most: Places of a chunk.
    """
    chunk: list[Segment] = []
    filled = 0
    for own in losses:
        start = 0
        while start < len(own.places):
            stop = min(len(own.places), start + most - filled)
            rows = slice(filled, filled + stop - start)
            chunk.append(Segment(own, slice(start, stop), rows))
            start, filled = stop, rows.stop
            if filled == most:
                yield chunk
                chunk, filled = [], 0
    if chunk:
        yield chunk


def gradients_from(
    logits: Tensor, chunk: Sequence[Segment], wanted: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients at tensors whose rows are the chunk's places.

    Losses of different places go back together: rows do not touch one another.

    Args:
        logits: ``[rows, vocabulary]``, which hang on them.
        chunk: The losses of the rows.
        wanted: The tensors, ``[rows, ..]``.

    Returns:
        Of each tensor ``[n, rows, ..]``: at a row the gradients of its losses, in their order, and
        zeros where other rows have more.
    """
    values = logits.detach()
    slopes = [one.losses.gradients(values[one.rows], one.part) for one in chunk]
    depth = max(len(own) for own in slopes)
    found: list[list[Tensor]] = [[] for _ in wanted]
    for number in range(depth):
        slope = torch.zeros_like(values)
        for one, own in zip(chunk, slopes, strict=True):
            if number < len(own):
                slope[one.rows] = own[number].to(slope.dtype)
        last = number == depth - 1
        gradients = torch.autograd.grad(logits, wanted, slope, retain_graph=not last)
        for gathered, gradient in zip(found, gradients, strict=True):
            gathered.append(gradient)
    return [torch.stack(gathered) for gathered in found]
