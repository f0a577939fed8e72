"""A walk forth and back that sums, for every option, what its error does to some losses.

On the way back each step is loaded once. Its options are solved, its calls run again, and the
gradients of all losses go back through them. At every layer an option's error of the output meets
these gradients: what is summed of the two is the method's business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from prismquant.engine.calls import Gradients
from prismquant.engine.graph_replay import GraphCall
from prismquant.engine.walk import Unit
from prismquant.errors import NumericsError
from prismquant.numerics.finite import all_finite
from prismquant.search.analysis import Analysis
from prismquant.search.option_errors import StepErrors, solve_step
from prismquant.search.place_losses import PlaceLosses, Segment, chunks, gradients_from
from prismquant.search.sample_sums import SampleSums
from prismquant.search.watched_step import WatchedCall, watched

# Logits of so many bytes are looked at together.
_LOGIT_BYTES = 64 << 20
# Gradients of so many bytes are held at a time, but those of one loss in any case.
_GRADIENT_BYTES = 256 << 20


class Objective(Protocol):
    """Losses whose gradients are taken, and what is summed of these and of errors."""

    @property
    def losses(self) -> int:
        """Number of losses."""

    def of_sample(self, number: int) -> Sequence[PlaceLosses]:
        """Losses of a sample; all others are zero there."""

    def change(self, error: Tensor, gradients: Tensor) -> Tensor:
        """Sum over rows and features for each loss, [losses].

        Args:
            error: Of a layer's output, ``[rows, out]``.
            gradients: Of the losses at that output, ``[losses, rows, out]``.
        """


def backward_sums(analysis: Analysis, objective: Objective) -> Iterator[SampleSums]:
    """Sums over every sample of each loss, unit of choice by unit of choice.

    Yields:
        The sums of a unit when all its layers were gone through: from the head to the entry.

    Raises:
        NumericsError: A weight, an activation or a gradient is not finite.
    """
    wanted = analysis.wanted
    if not wanted:
        return
    cached, walk = analysis.cached_steps, analysis.walk(backward=True)
    caches = {
        one.unit.name: SampleSums(one, analysis, objective.losses) for one in wanted if one.caches
    }
    with contextlib.closing(walk.units()) as units:
        for unit in units:
            with unit.loaded():
                if not unit.backward:
                    analysis.stage(unit.name, "forward")
                    with torch.no_grad():
                        unit.advance()
                    continue
                own = {
                    one.unit.name: SampleSums(one, analysis, objective.losses)
                    for one in wanted
                    if one.rows and one.sites[0].step == unit.step.index
                }
                errors = solve_step(unit, analysis)
                analysis.stage(unit.name, "backward")
                work = _StepWork(unit, objective, errors, own | caches)
                with unit.as_served(), torch.enable_grad():
                    for call in unit.graph_calls():
                        work.go_back(call)
            yield from own.values()
            cached.discard(unit.step.index)
            if not cached:
                yield from caches.values()
                caches = {}


class _StepWork:
    """The way back through one step."""

    def __init__(
        self,
        unit: Unit,
        objective: Objective,
        errors: StepErrors,
        sums: Mapping[str, SampleSums],
    ) -> None:
        self.unit, self.objective, self.errors, self.sums = unit, objective, errors, sums

    def go_back(self, call: GraphCall) -> None:
        """Run a call, take gradients back through it, and sum up what errors do."""
        if self.unit.step.kind == "head":
            self._head(call)
            return
        if not call.arriving:
            return
        with watched(self.unit, self.errors) as watch:
            _begin_graph(call)
            output = self.unit.module(*call.call.args, **call.call.kwargs)
        value = output if isinstance(output, Tensor) else output[0]
        parts = self._parts_of_losses(call.arriving, watch)
        for index, part in enumerate(parts, 1):
            again = index < len(parts)
            found = call.backward(value, part, watch.tensors, again=again)
            self._take(call.call.batch, watch, found)

    @staticmethod
    def _parts_of_losses(arriving: Gradients, watch: WatchedCall) -> list[Gradients]:
        """Gradients of some losses each, and None for the others: so many as memory shall hold."""
        size = sum(x.numel() * x.element_size() for x in watch.tensors)
        most = max(1, _GRADIENT_BYTES // max(1, size))
        numbers = [number for number, one in enumerate(arriving) if one is not None]
        return [
            [one if n in numbers[start:][:most] else None for n, one in enumerate(arriving)]
            for start in range(0, len(numbers), most)
        ]

    def _head(self, call: GraphCall) -> None:
        """Begin at the logits, some places at a time."""
        hidden = call.call.args[0]
        losses = self.objective.of_sample(call.call.batch)
        gradients: Gradients = [None] * self.objective.losses
        for number in (number for own in losses for number in own.numbers):
            gradients[number] = torch.zeros_like(hidden)
        words = self.unit.walk.bound.site(self.unit.name).out_features
        for chunk in chunks(losses, max(1, _LOGIT_BYTES // (4 * words))):
            places = torch.cat([one.places for one in chunk]).to(hidden.device)
            x = hidden.detach()[0, places].requires_grad_(True)
            with watched(self.unit, self.errors) as watch:
                logits = self.unit.module(x)
            self._require_finite(logits, call)
            at_x, *found = gradients_from(logits, chunk, [x, *watch.tensors])
            for one in chunk:
                for number, own in zip(one.losses.numbers, at_x[:, one.rows], strict=False):
                    whole = gradients[number]
                    if whole is not None:
                        whole[0, places[one.rows]] += own
            self._take_rows(call.call.batch, watch, found, chunk)
        call.backward(hidden, gradients)

    @torch.no_grad()
    def _take_rows(
        self, sample: int, watch: WatchedCall, found: Sequence[Tensor], chunk: Sequence[Segment]
    ) -> None:
        """Sum up what errors at the head do to the losses of each row."""
        for gradients in found:
            self._require_gradients(gradients, self.unit.name)
        for number, (unit, option), error in watch.changes():
            for one in chunk:
                slopes = found[number][: len(one.losses.numbers), one.rows]
                change = self.objective.change(error[one.rows], slopes)
                self.sums[unit].add(option, sample, list(one.losses.numbers), change)

    @torch.no_grad()
    def _take(self, sample: int, watch: WatchedCall, found: Sequence[Gradients]) -> None:
        """Sum up what errors do to the losses of a sample."""
        given = [_stacked(own, x) for own, x in zip(found, watch.tensors, strict=True)]
        for (numbers, gradients), (name, *_) in zip(given, watch.layers, strict=False):
            self._require_gradients(gradients, name if numbers else "")
        for number, (unit, option), error in watch.changes():
            numbers, gradients = given[number]
            if numbers:
                slopes = gradients.reshape(len(numbers), *error.shape)
                self.sums[unit].add(option, sample, numbers, self.objective.change(error, slopes))

    def _require_finite(self, logits: Tensor, call: GraphCall) -> None:
        if not all_finite(logits.detach()):
            raise NumericsError(
                "the model's logits are not finite",
                where=f"samples {', '.join(call.call.ids)}",
                remedy="look for NaN in the checkpoint, or run in float32",
            )

    def _require_gradients(self, gradients: Tensor, name: str) -> None:
        if not all_finite(gradients):
            raise NumericsError(
                "a gradient is NaN or infinite",
                where=f"output of {name}",
                remedy="run in float32 or bfloat16",
            )


def _begin_graph(call: GraphCall) -> None:
    """Let the graph begin at what the call is given, where no unit before it takes gradients."""
    given: list[Any] = [*call.call.args, *call.call.kwargs.values()]
    floats = [x for x in given if isinstance(x, Tensor) and x.is_floating_point()]
    if floats and not any(x.requires_grad for x in floats):
        floats[0].requires_grad_(True)


def _stacked(gradients: Gradients, like: Tensor) -> tuple[list[int], Tensor]:
    """Numbers of the losses that have a gradient, and these, ``[losses, *shape]``."""
    numbers = [number for number, gradient in enumerate(gradients) if gradient is not None]
    given = [gradient for gradient in gradients if gradient is not None]
    return numbers, torch.stack(given) if given else like.new_zeros(0, *like.shape)
