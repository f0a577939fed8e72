"""Calls of a block's experts: what the router has sent to each, over all batches.

An expert sees some tokens of every call. Gathered over all calls they are one input, with which its
layers are calibrated and run at once: each matrix is read once, whatever the number of batches.
Each row knows its token, and so whether it is padding, and of which modality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from prismquant.engine.calls import StepCall, joined
from prismquant.models.experts import Expert, ExpertLayers, Routing, routed_places


@dataclass(frozen=True)
class ExpertCall:
    """A call of a block's experts, for one call of the block.

    Attributes:
        call: Of the block.
        routing: What the experts are given.
    """

    call: StepCall
    routing: Routing

    def of_rows(self, rows: Tensor) -> StepCall:
        """The call as it is seen by an expert that is given some of the rows."""
        return self.call.of_rows(self.routing.tokens_of(rows))

    def whole(self) -> StepCall:
        """The call as it is seen by one that is given all rows."""
        tokens = self.routing.tokens
        return self.call if tokens is None else self.call.of_rows(tokens)


@dataclass(frozen=True)
class ExpertInput:
    """All that one expert is given.

    Attributes:
        call: Its rows, of all calls.
        hidden: ``[rows, H]``.
    """

    call: StepCall
    hidden: Tensor


class RoutedCalls:
    """Calls of a block's experts, and the sum of their outputs as it grows.

    Args:
        calls: Of all batches.
        experts: The block's :class:`~prismquant.models.experts.ExpertLayers`.
    """

    def __init__(self, calls: Sequence[ExpertCall], experts: nn.Module) -> None:
        self.calls, self.experts = list(calls), cast("ExpertLayers", experts)
        count = len(self.experts)
        self._places = [routed_places(one.routing.index, count) for one in calls]
        self.outputs = [torch.zeros_like(one.routing.hidden) for one in calls]

    def input(self, number: int) -> ExpertInput:
        """The tokens that the router has sent to an expert."""
        rows = [places[number][0] for places in self._places]
        hidden = [one.routing.hidden[own] for one, own in zip(self.calls, rows, strict=True)]
        parts = [one.of_rows(own) for one, own in zip(self.calls, rows, strict=True)]
        return ExpertInput(joined(parts), torch.cat(hidden))

    def all_tokens(self) -> ExpertInput:
        """All tokens, whatever their expert; dealt ones as their own expert is given them."""
        hidden = torch.cat([one.routing.hidden for one in self.calls])
        return ExpertInput(joined([one.whole() for one in self.calls]), hidden)

    def add(self, number: int, output: Tensor) -> None:
        """Add what an expert has made of its tokens, by the router's weights.

        Args:
            number: Of the expert; experts must come in their order.
            output: ``[rows, H]``, of the rows of :meth:`input`.
        """
        start = 0
        for one, places, total in zip(self.calls, self._places, self.outputs, strict=True):
            rows, choices = places[number]
            part = output[start : start + len(rows)] * one.routing.weights[rows, choices, None]
            total.index_add_(0, rows, part.to(total.dtype))
            start += len(rows)

    def run(self) -> list[Tensor]:
        """The outputs of all experts together, one tensor a call, with its rows."""
        for number, module in enumerate(self.experts):
            expert, hidden = cast("Expert", module), self.input(number).hidden
            if len(hidden):
                self.add(number, expert.down_proj(middle(expert, hidden)))
        return self.outputs


def middle(expert: Expert, hidden: Tensor) -> Tensor:
    """Input of the last layer of an expert, ``[rows, I]``."""
    return expert.act_fn(expert.gate_proj(hidden)) * cast("Tensor", expert.up_proj(hidden))
