"""A walk through a model, unit by unit: order, loading, replay, stages, and carrying forward.

A unit is what is in memory at a time: the patch embedding, a block, a projector, the head. A walk
knows in which order the model runs its units, loads one, shows what its layers are given, takes new
weights for them, and hands the unit's output on to the next. What is done to a unit is its
visitor's business:

    for unit in walk.units():
        with unit.loaded():
            ...
            unit.advance()

Where a method aims at the float model, a second chain runs beside the first, from the first unit on
that may change: the same units with float weights, fed by float units before them. A walk without
batches loads nothing: its units only give their weights.

*Followers* are batches that pass all units to the head, as the visitor leaves them, and of which it
sees nothing on the way: what the model makes of samples that no statistic saw.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from prismquant.data.batches import Batch
from prismquant.distributed import Alone, Ranks
from prismquant.engine.activation_store import ActivationStore, InMemory
from prismquant.engine.calls import StepCall
from prismquant.engine.graph_replay import GraphCall, GraphReplay
from prismquant.engine.passes import Inputs, Output, Passes
from prismquant.engine.placement import Placement
from prismquant.engine.streamed_model import StreamedModel
from prismquant.engine.unit_experts import UnitExperts
from prismquant.engine.unit_stages import has_one_input, stages_of
from prismquant.engine.visit import Visit
from prismquant.engine.walk_start import WalkStart, steps_from
from prismquant.models.arch import Modality
from prismquant.models.bound import BoundModel, BoundSite, BoundStep
from prismquant.runtime.linear import ActivationQuantizer, quant_linear
from prismquant.shards import ShardReader


class ModelWalk:
    """Goes through a model's units in the order in which the model runs them.

    Args:
        bound: The model.
        reader: Gives its weights.
        batches: Calibration batches; they are taken once.
        placement: Where units run, and where states wait.
        visit: What the visitor wants.
        store: Keeps hidden states between units.
        ranks: Processes that walk together, each with batches of its own.
        followers: Batches that pass all units and of which no layer's inputs are shown.
        start: Where to begin, with the states of a walk over the same batches; None: in front.
    """

    def __init__(
        self,
        bound: BoundModel,
        reader: ShardReader,
        batches: Iterable[Batch] = (),
        placement: Placement | None = None,
        *,
        visit: Visit | None = None,
        store: ActivationStore | None = None,
        ranks: Ranks | None = None,
        followers: Sequence[Batch] = (),
        start: WalkStart | None = None,
    ) -> None:
        self.bound, self.reader, self._start = bound, reader, start
        self.placement, self.visit = placement or Placement(), visit or Visit()
        self._ranks = ranks or Alone()
        self._layers = frozenset(self.visit.layers)
        self.main: StreamedModel | None = None
        self.float: StreamedModel | None = None
        self.store, self._followed = store or InMemory(), bool(followers)
        self.order: Sequence[BoundStep] = () if start is None else start.order
        self._load_between: Callable[[StreamedModel], None] = lambda _: None
        if (taken := list(batches)) or followers:
            rest = (taken, self.placement, self.store, self.visit.served)
            self.main = StreamedModel(
                bound, reader, *rest, backward=self.visit.backward, followers=followers
            )
            if start is not None:
                self.main.go_on_from(start)

    @property
    def models(self) -> list[StreamedModel]:
        """The chain of quantized units, then the float one."""
        return [model for model in (self.main, self.float) if model is not None]

    def units(self) -> Generator[Unit, None, None]:
        """Every unit in turn; one must be done with before the next is asked for."""
        if self.main is None:
            yield from (Unit(self, step, calibrated=False) for step in self.bound.steps)
            return
        vision = [s for s in self.bound.steps if s.modality is not Modality.LLM]
        llm = [s for s in self.bound.steps if s.modality is Modality.LLM]
        start = self._start
        within = start is not None and start.step in llm
        with contextlib.ExitStack() as around_llm:
            with contextlib.nullcontext() if within else self._loaded_between(vision=True):
                if start is None:
                    self.order = self.main.vision_order(self._ranks)
                # Without images nothing passes the tower, and nothing in it needs data.
                steps = [] if within else steps_from(start, self.order or vision)
                for index, step in enumerate(steps):
                    calibrated = bool(self.order) and self._any_wanted([*steps[index:], *llm])
                    followed = bool(self.order) and self._followed
                    yield self._unit(step, calibrated=calibrated, followed=followed)
                if (calibrated := self._any_wanted(llm)) or self._followed:
                    around_llm.enter_context(self._loaded_between(vision=False))
                    for model in [] if within else self.models:
                        model.begin_llm(calibrated=calibrated)
            rest = steps_from(start, llm)
            for index, step in enumerate(rest):
                calibrated = self._any_wanted(rest[index:])
                yield self._unit(step, calibrated=calibrated, followed=self._followed)
            if self.visit.backward:
                yield from self._back(self.main.graph, self.order, llm)

    def wanted(self, step: BoundStep) -> tuple[BoundSite, ...]:
        """The layers of a unit that the visitor looks at or replaces."""
        return tuple(site for site in step.sites if site.name in self._layers)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the checkpoint: norms may be wider than all else."""
        return self.reader.info(self.bound.names.to_disk(name)).dtype

    def _back(
        self, replay: GraphReplay, order: Sequence[BoundStep], llm: Sequence[BoundStep]
    ) -> Iterator[Unit]:
        """Units from the last to the first that is wanted."""
        to_vision = self._has_wanted(order)
        replay.turn_round(to_vision=to_vision)
        for index in reversed(range(len(llm))):
            if to_vision or self._has_wanted(llm[: index + 1]):
                yield self._rewound(replay, llm[index])
        if not to_vision:
            return
        with self._loaded_between(vision=True):
            replay.leave_llm()
            for index in reversed(range(len(order))):
                if self._has_wanted(order[: index + 1]):
                    yield self._rewound(replay, order[index])

    def _rewound(self, replay: GraphReplay, step: BoundStep) -> Unit:
        replay.rewind(step)
        return Unit(self, step, calibrated=True, backward=True)

    def _any_wanted(self, steps: Sequence[BoundStep]) -> bool:
        """Whether data must reach one of these units; the way back begins at the last of all."""
        return self.visit.backward or self._has_wanted(steps)

    def _has_wanted(self, steps: Sequence[BoundStep]) -> bool:
        return any(self.wanted(step) or step.index in self.visit.attentions for step in steps)

    def _unit(self, step: BoundStep, *, calibrated: bool, followed: bool) -> Unit:
        """A unit; from the first on that may change, the float model goes on by itself."""
        begins = self.visit.float_chain and self.float is None and self._has_wanted([step])
        if calibrated and begins and self.main is not None:
            self.float = self.main.twin()
            self._load_between(self.float)
        return Unit(self, step, calibrated=calibrated, followed=followed)

    @contextlib.contextmanager
    def _loaded_between(self, *, vision: bool) -> Iterator[None]:
        with contextlib.ExitStack() as stack:

            def load(model: StreamedModel) -> None:
                stack.enter_context(model.loaded(model.between_units(vision=vision)))

            self._load_between = load
            for model in self.models:
                load(model)
            yield


class Unit:
    """One unit of a walk.

    Args:
        walk: The walk.
        step: The unit.
        calibrated: Whether calibration data pass it, for its own sake or that of a later unit.
        followed: Whether followers pass it.
        backward: Whether it is gone through for its gradients, once all units are finished.
    """

    def __init__(
        self,
        walk: ModelWalk,
        step: BoundStep,
        *,
        calibrated: bool,
        followed: bool = False,
        backward: bool = False,
    ) -> None:
        self.walk, self.step, self.calibrated, self.followed = walk, step, calibrated, followed
        self.backward = backward
        self.layers = walk.wanted(step)
        self._replaced: set[str] = set()
        self._fixed: list[Output] = []
        self._float_fixed: list[Output] | None = None

    @property
    def name(self) -> str:
        """The unit's module path."""
        return self.step.name

    def start(self) -> WalkStart:
        """This place in the walk, before the unit is looked at; data must flow."""
        states = self.main.replay.fork(), self.main.followers.fork()
        return WalkStart(self.step, self.walk.order, *states)

    @property
    def flows(self) -> bool:
        """Whether any data pass it."""
        return self.calibrated or self.followed

    @property
    def carries(self) -> bool:
        """Whether its output goes on to a later unit."""
        return self.flows and self.step.kind != "head"

    @cached_property
    def stages(self) -> tuple[tuple[BoundSite, ...], ...]:
        """Its layers in the order in which it runs them; see :func:`stages_of`."""
        return stages_of(self.layers, stagewise=self.walk.visit.stagewise)

    @property
    def main(self) -> StreamedModel:
        """The chain of quantized units; data must flow."""
        if self.walk.main is None:
            raise RuntimeError(f"{self.name} has no data: its modules are not loaded")
        return self.walk.main

    @property
    def module(self) -> nn.Module:
        """Its module, with the weights as they are by now."""
        return self.main.module(self.name)

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """Within the block, its modules have their weights, where data flow."""
        with contextlib.ExitStack() as stack:
            for model in self.walk.models:
                if self.calibrated or (self.followed and model is self.walk.main):
                    stack.enter_context(model.loaded([self.name]))
            if self.walk.main is not None:
                self.walk.main.read_ahead(self.step)
            yield

    def weight(self, layer: BoundSite) -> Tensor:
        """A layer's weight as a matrix ``[out, in]``, as it is by now.

        Where no data flow it is read from the checkpoint, in the dtype that it has there unless the
        precision is narrower.
        """
        if self.flows:
            weight = self.main.module(layer.name).get_parameter("weight").detach()
        else:
            weight = self.walk.reader.read(self.walk.bound.names.to_disk(f"{layer.name}.weight"))
            if self.walk.placement.precision.dtype != torch.float32:
                weight = weight.to(self.walk.placement.precision.dtype)
            weight = weight.to(self.walk.placement.device)
        return weight.reshape(layer.out_features, layer.in_features)

    def tensor(self, name: str) -> Tensor:
        """A parameter of the unit as it is by now, in the chain of quantized units."""
        return self.main.model.get_parameter(name).detach()

    def calls(self) -> Iterator[StepCall]:
        """Calls of the unit by the quantized model."""
        return self.main.calls(self.step)

    def graph_calls(self) -> Iterator[GraphCall]:
        """Calls that hang on the outputs of units before; see :meth:`GraphReplay.graph_calls`."""
        return self.main.graph.graph_calls(self.step)

    def as_served(self) -> contextlib.AbstractContextManager[None]:
        """Within the block, it runs in its precision, and finished layers as asked."""
        return self.main.as_served(self.step)

    def first_inputs(self, layers: Sequence[str]) -> Inputs:
        """Inputs of layers, call by call, in passes that nothing else uses."""
        return self.main.passes(self.step).inputs(layers)

    def inputs(self, layers: Sequence[str], stage: Sequence[str]) -> Inputs:
        """Inputs of layers of a stage, call by call, as the stages before it leave them.

        Args:
            layers: Their names.
            stage: Names of all layers that are taken together with them.
        """
        later = [s.name for s in self.layers if s.name not in {*self._replaced, *stage}]
        return self._passes.inputs(layers, stage, later)

    def float_inputs(self, layers: Sequence[str], stage: Sequence[str]) -> Inputs:
        """The same of the float model, in which nothing changes; there must be a float chain."""
        if self._float_passes is None:
            raise RuntimeError(f"{self.name} is walked through without a float chain")
        return self._float_passes.inputs(layers, stage)

    def float_outputs(self) -> Iterator[Output]:
        """The float model's outputs, where there is a float chain."""
        if self._float_fixed is not None:
            return iter(self._float_fixed)
        return iter(()) if self._float_passes is None else self._float_passes.outputs()

    def fix_float_outputs(self) -> list[Output]:
        """The float model's outputs, kept from now on whatever becomes of its weights."""
        self._float_fixed = list(self.float_outputs())
        return self._float_fixed

    def fix_outputs(self) -> None:
        """Let the unit hand on what it puts out now, whatever becomes of its weights."""
        self._fixed = list(self.main.passes(self.step).outputs())

    def restart(self) -> None:
        """Forget passes that have gone through what has just changed."""
        self.experts.restart()
        self._passes.restart()

    def replace(
        self,
        layer: BoundSite,
        weight: Tensor,
        input: ActivationQuantizer | None = None,
        output: ActivationQuantizer | None = None,
    ) -> None:
        """Put a quantized weight, and the quantizers around it, in a layer's place; data must flow.

        Args:
            layer: The layer.
            weight: Its dequantized values, ``[out, in]``.
            input, output: What its input and its output go through.
        """
        self._replaced.add(layer.name)
        device, dtype = self.walk.placement.device, self.walk.placement.precision.dtype
        held = self.walk.visit.served.linear_dtypes.get(self.name, dtype)
        values = weight.to(held).reshape(layer.weight_shape).to(device)
        self.main.module(layer.name).weight = nn.Parameter(values, requires_grad=False)
        if input is not None or output is not None:
            linear = quant_linear(self.main.model, layer.name)
            linear.input_quantizer = input if input is None else input.to(device)
            linear.output_quantizer = output if output is None else output.to(device)

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Give another tensor of the unit new values, where its module is loaded."""
        owner, _, leaf = name.rpartition(".")
        module = self.main.module(owner)
        if not module.get_parameter(leaf).is_meta:
            placement = self.walk.placement
            values = value.to(placement.device, placement.precision.dtype)
            setattr(module, leaf, nn.Parameter(values, requires_grad=False))

    def advance(self) -> None:
        """Hand the unit's outputs on to the units after it, in both chains."""
        if self.carries and self.calibrated:
            if not self._fixed:
                self.experts.run()
            outputs = self._fixed or self._passes.outputs()
            for keep, output in itertools.chain(self.float_outputs(), outputs):
                keep(output)
        if self.carries and self.followed:
            self.main.follow(self.step)

    @cached_property
    def experts(self) -> UnitExperts:
        """Its experts, where it has any; data must flow."""
        # Nothing of it leads back here: a circle would hold all that waits until it is found.
        return UnitExperts(self.step, self._passes, self.main)

    @cached_property
    def _passes(self) -> Passes:
        return self.main.passes(self.step, paused=self._paused)

    @cached_property
    def _float_passes(self) -> Passes | None:
        if self.walk.float is None:
            return None
        return self.walk.float.passes(self.step, paused=self._paused)

    @property
    def _paused(self) -> bool:
        """Whether passes halt at stages: at one input each, never at pixels."""
        single = all(has_one_input(stage) for stage in self.stages)
        halting = bool(self.stages) and single and self.step.kind != "entry"
        return self.walk.placement.paused and halting
