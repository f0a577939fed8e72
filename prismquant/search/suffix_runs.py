"""Runs of a model from one of its steps on, with layers of that step quantized.

Where the model fits into memory, all of it is there, and each run is the rest of the model's own
forward. Else steps are loaded one at a time, and the states of all runs that begin at a step move
on together, so that each later step is loaded once for all of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prismquant.distributed import Ranks
from prismquant.engine.replaced_layers import ReplacedLayer, layers_in_place, replaced_layers
from prismquant.engine.replay import Replay
from prismquant.engine.streamed_model import StreamedModel
from prismquant.engine.walk import Unit
from prismquant.formats.quantized_layer import QuantizedLayer
from prismquant.memory import free_device_bytes, resident_bytes
from prismquant.models.arch import Modality
from prismquant.models.bound import BoundStep
from prismquant.plan.plan import PlanRow
from prismquant.search.analysis import Analysis

Layers = Sequence[tuple[PlanRow, QuantizedLayer]]

# Part of the memory which the model may take, where it stays; the rest is for what flows.
_PART = 0.7
# Bytes of a step's dequantized weights that are kept rather than made again for every batch.
_KEPT_BYTES = 256 << 20


class SuffixRuns:
    """Runs from steps on to what the head is given.

    Args:
        analysis: The analysis.
        main: The model, of which a walk loads one step at a time.
    """

    def __init__(self, analysis: Analysis, main: StreamedModel) -> None:
        self._main, self._bound = main, analysis.bound
        self._placement = analysis.placement
        self._batches = len(analysis.batches)
        self.resident = _fits(analysis)
        self._tables = main.lookups()
        self._order = self._steps_in_order(analysis.ranks)

    @contextlib.contextmanager
    def model_at_hand(self) -> Iterator[None]:
        """Within the block, all of the model is loaded, if it fits."""
        if not self.resident:
            yield
            return
        between = [n for vision in (True, False) for n in self._main.between_units(vision=vision)]
        with self._main.loaded([*between, *(step.name for step in self._bound.steps)]):
            yield

    @torch.no_grad()
    def hidden(
        self, unit: Unit, variants: Sequence[Layers], *, everywhere: bool = False
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Inputs of the head, batch by batch, with layers of a step quantized.

        Args:
            unit: The step, loaded, all before it finished.
            variants: Layers to replace, for each run.
            everywhere: Run batches, too, that the step does not see.

        Yields:
            Number of the batch, and ``[B, T, hidden]`` of each run.
        """
        seen: Sequence[int] = range(self._batches)
        if unit.step.modality is not Modality.LLM and not everywhere:
            seen = self._main.replay.seen_by_vision()
        if self.resident:
            ready = [self._replaced(layers) for layers in variants] if self._few(variants) else []
            for batch in seen:
                runs = ready or map(self._replaced, variants)
                yield batch, [self._resident_run(batch, layers) for layers in runs]
            return
        forks = [self._main.replay.fork(seen) for _ in variants]
        for fork, layers in zip(forks, variants, strict=True):
            with self.quantized(layers):
                self.advance(fork, unit.step)
        begun = unit.step.modality is Modality.LLM
        with self._main.loaded([] if begun else self._main.between_units(vision=False)):
            self._finish(forks, unit.step)
            for place, batch in enumerate(seen):
                yield batch, [fork.last_hidden(place, self._tables) for fork in forks]

    def last_hidden(self, fork: Replay, batch: int) -> Tensor:
        """Input of the head in a fork that has finished all blocks."""
        return fork.last_hidden(batch, self._tables)

    def quantized(self, layers: Layers) -> contextlib.AbstractContextManager[None]:
        """Within the block, these layers are quantized."""
        return layers_in_place(self._replaced(layers))

    @torch.no_grad()
    def advance(self, fork: Replay, step: BoundStep) -> None:
        """Let a step, which is loaded, be finished in a fork."""
        module = self._main.module(step.name)
        with self._main.as_served(step):
            for call in fork.calls(step):
                call.keep(module(*call.args, **call.kwargs))

    def _replaced(self, layers: Layers) -> list[ReplacedLayer]:
        return replaced_layers(self._main.model, layers, self._placement.precision.dtype)

    def _few(self, variants: Sequence[Layers]) -> bool:
        """Whether the weights of all variants may be held at once."""
        sites = [row.site for layers in variants for row, _ in layers]
        numbers = sum(site.out_features * site.in_features for site in sites)
        return numbers * self._placement.precision.dtype.itemsize <= _KEPT_BYTES

    def _resident_run(self, batch: int, layers: Sequence[ReplacedLayer]) -> Tensor:
        with layers_in_place(layers), self._placement.precision.in_force():
            return self._main.replay.last_hidden(batch, self._tables)

    def _finish(self, forks: Sequence[Replay], step: BoundStep) -> None:
        """Run all steps after this one."""
        place = self._order.index(step)
        begun = step.modality is Modality.LLM
        for later in self._order[place + 1 :]:
            if later.modality is Modality.LLM and not begun:
                for fork in forks:
                    fork.begin_llm(self._tables)
                begun = True
            if later.kind == "head":
                break
            with self._main.loaded([later.name]):
                for fork in forks:
                    self.advance(fork, later)

    def _steps_in_order(self, ranks: Ranks) -> list[BoundStep]:
        """All steps that data pass, in the order in which the model runs them."""
        entries = [step.name for step in self._bound.steps if step.kind == "entry"]
        names = [*self._main.between_units(vision=True), *entries]
        with self._main.loaded(names), self._placement.precision.in_force():
            own = self._main.replay.vision_steps()
        known = ranks.gather_json([step.index for step in own])
        vision = [self._bound.steps[index] for index in next(filter(None, known), [])]
        return [*vision, *(s for s in self._bound.steps if s.modality is Modality.LLM)]


def _fits(analysis: Analysis) -> bool:
    """Whether all of the model may stay in memory."""
    numbers = sum(math.prod(shape) for shape in analysis.bound.shapes.values())
    size = numbers * analysis.placement.precision.dtype.itemsize
    device = analysis.placement.device
    free = None if analysis.placement.on_host else free_device_bytes(device)
    if free is None:
        free = None if analysis.room is None else analysis.room - resident_bytes()
    return free is None or size <= _PART * free
