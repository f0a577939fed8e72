"""A model of which one unit at a time has weights, and the states that wait between units."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from prismquant.data.batches import Batch
from prismquant.distributed import Ranks
from prismquant.engine.activation_store import ActivationStore
from prismquant.engine.calls import StepCall
from prismquant.engine.graph_replay import GraphReplay
from prismquant.engine.passes import Passes, PausedPasses, ReplayedPasses, StepRun
from prismquant.engine.placement import Placement
from prismquant.engine.replay import Replay
from prismquant.engine.token_tables import Lookups, TableRows, token_tables
from prismquant.engine.walk_start import WalkStart
from prismquant.formats.online_rotation import OnlineRotation
from prismquant.models.arch import Modality
from prismquant.models.attention import unhook_attention
from prismquant.models.bound import BoundModel, BoundStep
from prismquant.models.load import empty_model, materialize, release
from prismquant.models.told_device import tell_device
from prismquant.runtime.input_rotation import rotate_inputs
from prismquant.runtime.kv_cache import cache_in_float
from prismquant.runtime.linear import QuantLinear, activations_in_float
from prismquant.shards import ShardReader


@dataclass(frozen=True)
class ServedAs:
    """Settings of layers while a model is walked through.

    Attributes:
        quantized_inputs: Inputs, outputs, keys and values of finished layers go through their
            quantizers, as they will be served; else they stay in floating point.
        rotations: Rotations of single layers' inputs, by the layer's name.
        linear_dtypes: Dtypes in which a unit's linear layers hold weights that this dtype holds
            exactly, by the unit's name; elsewhere weights have the dtype of the placement.
    """

    quantized_inputs: bool = True
    rotations: Mapping[str, OnlineRotation] = field(default_factory=dict)
    linear_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)


class StreamedModel:
    """A model's skeleton, of which single units are loaded, and the states between its units.

    Args:
        bound: The model.
        reader: Gives its weights.
        batches: Calibration batches.
        placement: Where units run.
        store: Where hidden states wait.
        served: How layers run.
        backward: Whether its units are gone through again, from the last to the first.
        followers: Batches that pass all units as well, and that nobody looks at on the way.
    """

    def __init__(
        self,
        bound: BoundModel,
        reader: ShardReader,
        batches: Sequence[Batch],
        placement: Placement,
        store: ActivationStore,
        served: ServedAs,
        *,
        backward: bool = False,
        followers: Sequence[Batch] = (),
    ) -> None:
        self.bound = bound
        self.model = empty_model(bound.config, bound.arch)
        tell_device(self.model, placement.device)
        self._reader, self._placement, self._served = reader, placement, served
        self._store = store
        self._around = _modules_around(bound)
        self._narrow = {step.name: narrow_modules(bound, step) for step in bound.steps}
        device, dtype = placement.device, placement.precision.dtype
        self.replay = (GraphReplay if backward else Replay)(
            self.model, bound, batches, device=device, dtype=dtype, states=store
        )
        self.followers = Replay(
            self.model, bound, followers, device=device, dtype=dtype, states=store
        )

    def go_on_from(self, start: WalkStart) -> None:
        """Take over the states of another walk over the same batches."""
        self.replay, self.followers = start.replay.fork(), start.followers.fork()
        self.replay.model = self.followers.model = self.model

    def twin(self) -> StreamedModel:
        """Another chain that goes on by itself from here, without followers."""
        rest = (self._placement, self._store, self._served)
        other = StreamedModel(self.bound, self._reader, (), *rest)
        other.replay = self.replay.fork()
        other.replay.model = other.model
        return other

    def module(self, name: str) -> nn.Module:
        """The module of this path."""
        return self.model.get_submodule(name)

    def calls(self, step: BoundStep) -> Iterator[StepCall]:
        """Calls of a unit by the model; all units before it must be finished."""
        return self.replay.calls(step)

    def passes(self, step: BoundStep, *, paused: bool = False) -> Passes:
        """Forward passes of a unit over all calls."""
        run = StepRun(self.model, step.name, lambda: self.calls(step), lambda: self.as_served(step))
        return PausedPasses(run) if paused else ReplayedPasses(run)

    @contextlib.contextmanager
    def as_served(self, step: BoundStep) -> Iterator[None]:
        """Within the block, a unit runs in its precision, and finished layers as asked."""
        module = self.module(step.name)
        with contextlib.ExitStack() as stack:
            narrow = [self.module(name) for name in self._narrow[step.name]]
            stack.enter_context(self._placement.precision.in_force(narrow))
            if not self._served.quantized_inputs:
                stack.enter_context(activations_in_float(module))
                stack.enter_context(cache_in_float(module))
            yield

    @contextlib.contextmanager
    def loaded(self, names: Sequence[str]) -> Iterator[None]:
        """Within the block, these modules have their weights, and rotate what they must.

        A module that units lie in has its own alone: what lies in it may be the whole model.
        """
        for name in names:
            self._load(name)
        try:
            yield
        finally:
            for name in names:
                around = name in self._around
                release(self.model, name, own=around)
                if not around:
                    unhook_attention(self.module(name))
                    _make_plain(self.model, name)

    def _load(self, name: str) -> None:
        device, dtype = self._placement.device, self._placement.precision.dtype
        own = name in self._around
        materialize(self.model, name, self._reader, self.bound.names, device, dtype, own=own)
        for layer, online in self._served.rotations.items():
            if layer == name or layer.startswith(f"{name}."):
                rotate_inputs(self.model, layer, online.block, online.signs)
        held = self._served.linear_dtypes.get(name, dtype)
        if held != dtype:
            self._hold(name, held)

    def _hold(self, name: str, dtype: torch.dtype) -> None:
        """Hold weights as linear layers multiply them, where that is exact.

        The products are the same, and need no rounding of the weights each time.
        """
        for path, module in self.module(name).named_modules(prefix=name):
            disk_name = self.bound.names.to_disk(f"{path}.weight")
            if isinstance(module, nn.Linear) and self._reader.info(disk_name).dtype == dtype:
                module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)

    @property
    def graph(self) -> GraphReplay:
        """The replay as one that goes back; it must have been asked for."""
        if not isinstance(self.replay, GraphReplay):
            raise RuntimeError("the model is walked through forth, not back")
        return self.replay

    def begin_llm(self, *, calibrated: bool = True) -> None:
        """Compute what the language model is given; see :meth:`Replay.begin_llm`.

        Args:
            calibrated: For calibration batches, too; else for followers alone.
        """
        tables = self.lookups()
        for replay in (self.replay, self.followers) if calibrated else (self.followers,):
            replay.begin_llm(tables)

    def vision_steps(self) -> list[BoundStep]:
        """Steps before the language model, in its order; see :meth:`Replay.vision_steps`."""
        own, followed = self.replay.vision_steps(), self.followers.vision_steps()
        return own or followed

    def vision_order(self, ranks: Ranks) -> list[BoundStep]:
        """Steps before the language model in the order in which it runs them; none without images.

        A rank without pictures is told the order by another.
        """
        entries = [s.name for s in self.bound.steps if s.kind == "entry"]
        with self.loaded(entries), self._placement.precision.in_force():
            own = self.vision_steps()
        known = ranks.gather_json([step.index for step in own])
        return [self.bound.steps[index] for index in next(filter(None, known), [])]

    def read_ahead(self, step: BoundStep) -> None:
        """Let the system read the unit after this one while this one is computed."""
        following = tuple(f"{after.name}." for after in self.bound.steps[step.index + 1 :][:1])
        names = [name for name in self.bound.shapes if name.startswith(following)]
        self._reader.read_ahead(self.bound.names.to_disk(name) for name in names)

    def follow(self, step: BoundStep) -> None:
        """Let followers pass a unit, as it is by now."""
        run = StepRun(
            self.model,
            step.name,
            lambda: self.followers.calls(step),
            lambda: self.as_served(step),
        )
        for keep, output in ReplayedPasses(run).outputs():
            keep(output)

    def lookups(self) -> Lookups:
        """Tables of tokens, which have the rows of those in the batches."""
        ids = torch.cat([self.replay.token_ids(), self.followers.token_ids()]).unique()
        return {
            name: TableRows(table, ids, self._rows_of(name), self._placement)
            for name, table in token_tables(self.model, self.bound.arch).items()
        }

    def _rows_of(self, table: str) -> Callable[[Tensor], Tensor]:
        return partial(self._reader.read_rows, self.bound.names.to_disk(f"{table}.weight"))

    def between_units(self, *, vision: bool) -> list[str]:
        """Modules that hold parameters outside all units, such as norms between towers."""
        steps = [step.name for step in self.bound.steps]
        towers = [t for t in self.bound.arch.towers if t.modality is not Modality.LLM]
        roots = [tower.root for tower in towers if tower.root]
        tables = {self.bound.arch.embeddings, *self.bound.arch.tables}
        names: list[str] = []
        for name, _ in self.model.named_parameters():
            owner = name.rpartition(".")[0]
            inside = any(owner == s or owner.startswith(f"{s}.") for s in steps)
            inside |= owner in tables
            of_vision = any(f"{owner}.".startswith(f"{root}.") for root in roots)
            if not inside and of_vision == vision and owner not in names:
                names.append(owner)
        return names


def _modules_around(bound: BoundModel) -> frozenset[str]:
    """Paths of modules that units lie in, the model's own among them, which is empty."""
    paths = [step.name.split(".") for step in bound.steps]
    return frozenset(".".join(path[:end]) for path in paths for end in range(len(path)))


def narrow_modules(bound: BoundModel, step: BoundStep) -> list[str]:
    """Modules in which all that flows can be held as linear layers multiply it: a block's MLPs.

    Args:
        bound: The model.
        step: The unit.

    Returns:
        Paths of those in which nothing has parameters but an MLP's layers.
    """
    layers = {site.name for site in step.sites if site.elementwise}
    found = []
    for name in dict.fromkeys(layer.rpartition(".")[0] for layer in sorted(layers)):
        inside = {path.rpartition(".")[0] for path in bound.shapes if path.startswith(f"{name}.")}
        if name != step.name and inside <= layers:
            found.append(name)
    return found


def _make_plain(model: nn.Module, name: str) -> None:
    """Turn a released unit's quantized layers back into plain ones: their work is done."""
    for path, module in list(model.get_submodule(name).named_modules(prefix=name)):
        if isinstance(module, QuantLinear):
            parent, _, child = path.rpartition(".")
            with torch.device("meta"):
                plain = nn.Linear(
                    module.in_features,
                    module.out_features,
                    module.bias is not None,
                    dtype=module.weight.dtype,
                )
            setattr(model.get_submodule(parent), child, plain.requires_grad_(False))
