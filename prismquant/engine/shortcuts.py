"""Short cuts of a replay, each of which is tried on the model at hand before it is taken.

Between units a replay keeps one hidden state a batch, and drops pixels and embeddings as soon as
they were read. Which outputs are read later than by the next unit, and whether more than the shape
of pixels and embeddings matters, is found by trial passes (:mod:`prismquant.engine.trial_pass`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from prismquant.engine.calls import TowerPass
from prismquant.engine.captured_call import captured_call, llm_blocks, llm_root
from prismquant.engine.stand_ins import as_output
from prismquant.engine.trial_pass import (
    StandIns,
    UnitOutput,
    UnitReading,
    same_readings,
    taps_of,
    trial_pass,
)
from prismquant.engine.vision_passes import hollow, lighter
from prismquant.errors import ModelError
from prismquant.models.arch import Modality
from prismquant.models.bound import BoundModel, BoundStep


class Shortcuts:
    """Findings on what a replay of a model may leave out.

    Args:
        bound: The model.
        zero: One number, on the device and in the dtype in which it runs.

    Attributes:
        taps: Units before the language model whose output is read by others than the next unit,
            each with the last one that reads it.
        lengths: Number of values of units that put out a tuple.
    """

    def __init__(self, bound: BoundModel, zero: Tensor) -> None:
        self.taps: dict[str, str] = {}
        self.lengths: dict[str, int] = {}
        self._bound, self._zero = bound, zero
        self._alike: set[str] = set()

    def vision_steps(self, model: nn.Module, inputs: dict[str, Any]) -> list[BoundStep]:
        """Steps before the language model in the order in which the model runs them.

        Args:
            model: The entry step must be real.
            inputs: Its keyword arguments, with pixels.

        Raises:
            ModelError: One is not run, or several times in a pass.
        """
        steps = [s for s in self._bound.steps if s.modality is not Modality.LLM]
        real = {s.name: model.get_submodule(s.name).forward for s in steps if s.kind == "entry"}
        readings = self._readings(model, inputs, real)
        by_name = {step.name: step for step in steps}
        called = [by_name[reading.name] for reading in readings if reading.name in by_name]
        for step in called:
            if called.count(step) > 1:
                raise ModelError(
                    f"{step.name} is run {called.count(step)} times in one pass, not once",
                    where=self._bound.arch.name,
                    remedy="leave its layers alone in the architecture file",
                )
        self.taps = taps_of(readings, [step.name for step in steps if step.kind != "projector"])
        self._alike = {reading.name for reading in readings if reading.alike}
        return called

    def note_output(self, step: BoundStep, output: Any) -> None:
        """Remember whether a finished step of a chain puts out a tuple."""
        if isinstance(output, tuple):
            self.lengths[step.name] = len(output)

    def glance(
        self, model: nn.Module, entry: BoundStep, state: TowerPass, whole: dict[str, Any]
    ) -> Callable[[], dict[str, Tensor]] | None:
        """Pixels, or what of them later calls depend on, by their key; see :class:`TowerPass`.

        Args:
            model: The model.
            entry: The entry step.
            state: The pass; what the entry step's output is like must be known.
            whole: The model's inputs with pixels.
        """
        keys = {group[0] for group in self._bound.arch.input_groups}
        pixels = {key: value for key, value in whole.items() if key in keys}
        end, known = llm_root(self._bound.arch), {entry.name: lambda *_, **__: state.entry_zeros}
        expected, inputs = self._readings(model, whole, known), state.inputs()
        for light in lighter(pixels):
            try:
                seen = self._readings(model, inputs | (light() if light else {}), known)
            except ModelError:
                continue  # the model's own code cannot do with so little
            if same_readings(expected, seen, end, (entry.name,)):
                return light
        return state.pixels

    def without_embeddings(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """The language model's inputs, of embeddings only the shape if later blocks need no more.

        Args:
            model: The model.
            inputs: Keyword arguments of the language model, whose first block is finished.
        """
        blocks, arch = llm_blocks(self._bound), self._bound.arch
        light = inputs | {"inputs_embeds": hollow(inputs["inputs_embeds"])}
        root, output = model.get_submodule(llm_root(arch)), self.lengths.get(blocks[0])
        outputs = dict.fromkeys(blocks, partial(as_output, output))

        def readings(given: dict[str, Any]) -> list[UnitReading]:
            def run(stand_ins: StandIns) -> None:
                captured_call(model, arch, given, stand_ins, root)

            return trial_pass(model, blocks[:-1], blocks[-1], run, outputs, self._zero)

        same = same_readings(readings(inputs), readings(light), blocks[-1], blocks[:1])
        return light if same else inputs

    def _readings(
        self, model: nn.Module, inputs: dict[str, Any], outputs: Mapping[str, UnitOutput]
    ) -> list[UnitReading]:
        """Readings of the units before the language model, and of itself, in a pass of zeros."""
        units = [s.name for s in self._bound.steps if s.modality is not Modality.LLM]
        known = dict.fromkeys(self._alike, partial(as_output, None)) | dict(outputs)
        arch = self._bound.arch

        def run(stand_ins: StandIns) -> None:
            captured_call(model, arch, inputs, stand_ins)

        return trial_pass(model, units, llm_root(arch), run, known, self._zero)
