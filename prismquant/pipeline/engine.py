"""The one loop: for each step, capture, solve, replace, carry forward, write.

One step (patch embedding, block, projector, head) is in memory at a time. Its parameters are read
from the shards, its layers are solved stage by stage, its output under the quantized weights
becomes the next step's input, its tensors are handed to the sink, and its memory is given back.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prismquant.algorithms.base import LayerProblem, LayerResult, Solver
from prismquant.algorithms.statistics import HessianRecord
from prismquant.algorithms.table import build_solver
from prismquant.errors import NumericsError
from prismquant.memory import keep_heap_compact
from prismquant.models.arch import Modality
from prismquant.models.bind import BoundModel, BoundStep
from prismquant.models.config import empty_model
from prismquant.models.load import materialize, release
from prismquant.numerics.affine import scale_zero_point
from prismquant.numerics.ranges import RangeRecord
from prismquant.pipeline.batches import Batch
from prismquant.pipeline.capture import Enough, Replay, StepCall
from prismquant.pipeline.checkpoint import LayerRecord, StepRecord
from prismquant.pipeline.plan import DENSE, Plan, PlanRow, problem_groups
from prismquant.runtime.quant_linear import (
    InputQuantizer,
    QuantLinear,
    inputs_in_float,
    quantize_inputs,
)
from prismquant.storage import ShardReader


class StoredWeight(Protocol):
    """A weight as the checkpoint holds it."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values that it stands for, [out, in]."""


_Output = tuple[Callable[[Any], None], Any]


@dataclass(frozen=True)
class SolvedLayer:
    """A layer's numbers.

    Attributes:
        row: Its row of the plan.
        weight: Codes and scales, or the dequantized values of a layer that is stored dense.
        input_scale: [1] static input scale, or None.
        input_zero_point: int8 [1], or None.
    """

    row: PlanRow
    weight: StoredWeight
    input_scale: Tensor | None
    input_zero_point: Tensor | None


class Sink(Protocol):
    """Where finished steps go."""

    def write_step(self, step: BoundStep, layers: Sequence[SolvedLayer]) -> str:
        """Make the step durable; returns the shard's name."""

    def read_step(self, shard: str, rows: Sequence[PlanRow]) -> list[SolvedLayer]:
        """The layers of a step that an earlier run finished."""


class Reporter(Protocol):
    """Is told how far the run is."""

    def begin(self, steps: int) -> None:
        """The run has so many steps."""

    def stage(self, step: str, what: str) -> None:
        """A stage of a step begins."""

    def finish(self, record: StepRecord) -> None:
        """A step is done."""


class Silent:
    """A reporter that says nothing."""

    def begin(self, steps: int) -> None:
        """Say nothing."""

    def stage(self, step: str, what: str) -> None:
        """Say nothing."""

    def finish(self, record: StepRecord) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class Run:
    """Everything that a run needs.

    Attributes:
        plan: What to do.
        bound: The model's description.
        batches: Calibration batches; empty when the plan needs none.
        sink: Where finished steps go.
        reporter: Is told how far the run is.
        device: Where the arithmetic happens.
        dtype: In which steps are run; statistics are float32 in any case.
        done: Steps that an earlier run finished, by name.
    """

    plan: Plan
    bound: BoundModel
    batches: Sequence[Batch]
    sink: Sink
    reporter: Reporter = field(default_factory=Silent)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    done: Mapping[str, StepRecord] = field(default_factory=dict)


@torch.no_grad()
def run(job: Run) -> Iterator[StepRecord]:
    """Quantize a model step by step.

    Yields:
        The record of each step when its shard is durable; steps already in ``job.done`` are
        carried forward but not yielded again.

    Raises:
        NumericsError: A weight, an activation or a Hessian is not finite or cannot be factorized.
        StorageError: A shard cannot be read or written.
    """
    keep_heap_compact()
    yield from _Engine(job).run()


class _Engine:
    """The state of one run: the model's skeleton, the shards, and the replay."""

    def __init__(self, job: Run) -> None:
        self.job = job
        self.reader = ShardReader(job.bound.folder)
        self.model = empty_model(job.bound.config, job.bound.arch)
        self.rows: dict[str, list[PlanRow]] = {}
        for row in job.plan.quantized:
            self.rows.setdefault(job.bound.steps[row.site.step].name, []).append(row)

    def run(self) -> Iterator[StepRecord]:
        self.job.reporter.begin(len(self.job.bound.steps))
        if self.job.plan.needs_data:
            yield from self._with_data()
        else:
            for step in self.job.bound.steps:
                yield from self._step(step, None)

    def _with_data(self) -> Iterator[StepRecord]:
        bound, job = self.job.bound, self.job
        replay = Replay(self.model, bound, job.batches, device=job.device, dtype=job.dtype)
        vision = [s for s in bound.steps if s.modality is not Modality.LLM]
        llm = [s for s in bound.steps if s.modality is Modality.LLM]
        with contextlib.ExitStack() as around_llm:
            with self._loaded(self._between_steps(vision=True)):
                yield from self._vision_steps(replay, vision, llm)
                if self._any_left(llm):
                    around_llm.enter_context(self._loaded(self._between_steps(vision=False)))
                    replay.begin_llm()
            for index, step in enumerate(llm):
                yield from self._step(step, replay if self._any_left(llm[index:]) else None)

    def _vision_steps(
        self, replay: Replay, vision: Sequence[BoundStep], llm: Sequence[BoundStep]
    ) -> Iterator[StepRecord]:
        with self._loaded([step.name for step in vision if step.kind == "entry"]):
            order = replay.vision_steps()
        # Without images nothing passes the tower, and nothing in it needs data.
        steps = order or vision
        for index, step in enumerate(steps):
            needed = self._any_left([*steps[index:], *llm])
            yield from self._step(step, replay if order and needed else None)

    def _any_left(self, steps: Sequence[BoundStep]) -> bool:
        return any(step.name in self.rows for step in steps)

    def _step(self, step: BoundStep, replay: Replay | None) -> Iterator[StepRecord]:
        """Solve one step, carry its output forward, and write it."""
        started = time.monotonic()
        rows = self.rows.get(step.name, [])
        done = self.job.done.get(step.name)
        float_first = not self.job.plan.calibration.propagate_weights
        outputs: list[_Output] = []
        layers: list[SolvedLayer] = []
        records: list[LayerRecord] = []
        with self._loaded([step.name] if rows or replay is not None else []):
            if float_first:
                outputs = self._forward(step, replay)
            if done is not None:
                layers = self.job.sink.read_step(done.shard, rows) if rows else []
                for layer in layers:
                    self._replace(layer)
            else:
                for stage in self._stages(rows):
                    solved, told = self._solve_stage(step, stage, replay)
                    layers += solved
                    records += told
            if not float_first:
                outputs = self._forward(step, replay)
            for keep, output in outputs:
                keep(output)
        if done is None:
            self.job.reporter.stage(step.name, "write")
            shard = self.job.sink.write_step(step, layers)
            done = StepRecord(step.name, shard, time.monotonic() - started, tuple(records))
            yield done
        self.job.reporter.finish(done)

    def _stages(self, rows: Sequence[PlanRow]) -> list[list[PlanRow]]:
        """Rows in the order in which a block runs them; one stage when it is not sequential."""
        if not rows:
            return []
        if not self.job.plan.calibration.sequential:
            return [list(rows)]
        stages: dict[int, list[PlanRow]] = {}
        for row in rows:
            stages.setdefault(row.site.stage, []).append(row)
        return [stages[number] for number in sorted(stages)]

    def _solve_stage(
        self, step: BoundStep, rows: Sequence[PlanRow], replay: Replay | None
    ) -> tuple[list[SolvedLayer], list[LayerRecord]]:
        groups = [_Group(g, self._site_module(g[0]), self.job) for g in problem_groups(rows)]
        static = [g for g in groups if g.rows[0].static_input]
        if static:
            self.job.reporter.stage(step.name, "ranges")
            self._observe(step, replay, static, "ranges")
        hungry = [g for g in groups if g.solver.needs_hessian]
        if hungry:
            self.job.reporter.stage(step.name, "Hessians")
            self._observe(step, replay, hungry, "hessian")
        solved: list[SolvedLayer] = []
        records: list[LayerRecord] = []
        for group in groups:
            self.job.reporter.stage(step.name, f"{group.solver.name} {group.rows[0].site.role}")
            result = group.solve([self._site_module(row) for row in group.rows])
            outcomes = zip(
                group.rows, result.weights, result.losses, result.baseline_losses, strict=True
            )
            for row, weight, loss, baseline in outcomes:
                scale, zero_point = group.input_scale, group.input_zero_point
                solved.append(SolvedLayer(row, weight, scale, zero_point))
                self._replace(solved[-1])
                notes = dict(result.notes) | group.input_notes()
                records.append(LayerRecord(row.site.name, row.solver, loss, baseline, notes))
        return solved, records

    def _observe(
        self, step: BoundStep, replay: Replay | None, groups: Sequence[_Group], what: str
    ) -> None:
        """Run the step over all calls, feeding each group the input of its layers."""
        if replay is None:
            raise NumericsError(
                "a layer needs calibration data but none passes it", where=step.name
            )
        module = self.model.get_submodule(step.name)
        with self._inputs_as_asked(module):
            for call in replay.calls(step):
                _feed(module, call, groups, what)

    def _forward(self, step: BoundStep, replay: Replay | None) -> list[_Output]:
        """The step's outputs, to be kept once the step is solved: keeping one ends its calls."""
        if replay is None or step.kind == "head":
            return []
        self.job.reporter.stage(step.name, "forward")
        module = self.model.get_submodule(step.name)
        with self._inputs_as_asked(module):
            return [(call.keep, module(*call.args, **call.kwargs)) for call in replay.calls(step)]

    def _inputs_as_asked(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Inputs of solved layers as they will be served, or in float where the plan says so."""
        as_served = self.job.plan.calibration.propagate_activations
        return contextlib.nullcontext() if as_served else inputs_in_float(module)

    def _replace(self, layer: SolvedLayer) -> None:
        """Put the dequantized weight, and the input's quantizer, in the layer's place."""
        row, site = layer.row, layer.row.site
        module = self._site_module(row)
        stored = self.job.bound.dtype if row.layout == DENSE else self.job.dtype
        values = layer.weight.dequantize(stored).to(self.job.dtype).reshape(site.weight_shape)
        module.weight = nn.Parameter(values.to(self.job.device), requires_grad=False)
        if row.activations is not None:
            quantize_inputs(
                self.model, site.name, row.activations, layer.input_scale, layer.input_zero_point
            )

    def _site_module(self, row: PlanRow) -> nn.Module:
        return self.model.get_submodule(row.site.name)

    def _between_steps(self, *, vision: bool) -> list[str]:
        """Modules that hold parameters outside all steps: embeddings, norms between towers."""
        steps = [step.name for step in self.job.bound.steps]
        roots = [
            t.root for t in self.job.bound.arch.towers if t.modality is not Modality.LLM and t.root
        ]
        names = []
        for name, _ in self.model.named_parameters():
            owner = name.rpartition(".")[0]
            inside = any(owner == s or owner.startswith(f"{s}.") for s in steps)
            of_vision = any(owner.startswith(f"{root}.") for root in roots)
            if not inside and of_vision == vision and owner not in names:
                names.append(owner)
        return names

    @contextlib.contextmanager
    def _loaded(self, names: Sequence[str]) -> Iterator[None]:
        """Within the block, these modules have their weights."""
        job = self.job
        for name in names:
            materialize(self.model, name, self.reader, job.bound.names, job.device, job.dtype)
        try:
            yield
        finally:
            for name in names:
                release(self.model, name)
                _drop_quantizers(self.model, name)


class _Group:
    """Layers that share an input and a scheme, and what is gathered for them."""

    def __init__(self, rows: Sequence[PlanRow], module: nn.Module, job: Run) -> None:
        self.rows = rows
        self.module = module
        self.job = job
        self.solver: Solver = build_solver(rows[0].solver, rows[0].options)
        self.hessian: HessianRecord | None = None
        self.ranges: RangeRecord | None = None
        self.input_scale: Tensor | None = None
        self.input_zero_point: Tensor | None = None
        self._low_high = (0.0, 0.0)

    @property
    def name(self) -> str:
        return self.rows[0].site.name

    def observe(self, x: Tensor, row_weights: Tensor | None, what: str) -> None:
        """Take in one call's input of the layers, any shape that reshapes to [rows, in]."""
        rows = x.detach().reshape(-1, self.rows[0].site.in_features)
        try:
            if what == "ranges":
                counted = rows if row_weights is None else rows[row_weights > 0]
                self.ranges = self.ranges or RangeRecord(self.rows[0].activation_range.momentum)
                self.ranges.update(counted)
            else:
                self.hessian = self.hessian or HessianRecord(rows.shape[1], device=rows.device)
                self.hessian.update(self._quantized(rows), row_weights)
        except NumericsError as error:
            raise NumericsError(
                error.what, where=f"input of {self.name}", remedy=error.remedy
            ) from error

    def _quantized(self, rows: Tensor) -> Tensor:
        """The input as the layer will really see it."""
        spec = self.rows[0].activations
        if spec is None or not self.job.plan.calibration.propagate_activations:
            return rows
        seen: Tensor = InputQuantizer(spec, *self._input_parameters())(rows)
        return seen

    def _input_parameters(self) -> tuple[Tensor | None, Tensor | None]:
        spec = self.rows[0].activations
        if spec is None or spec.dynamic or self.ranges is None:
            return None, None
        if self.input_scale is None:
            rule = self.rows[0].activation_range
            self._low_high = self.ranges.low_high(rule, spec.grid, spec.symmetric)
            low, high = (torch.tensor([v], device=self.job.device) for v in self._low_high)
            self.input_scale, self.input_zero_point = scale_zero_point(
                low, high, spec.grid, spec.symmetric, self.job.bound.dtype
            )
        return self.input_scale, self.input_zero_point

    def solve(self, modules: Sequence[nn.Module]) -> LayerResult:
        """Choose the codes of all the layers at once."""
        self._input_parameters()
        first = self.rows[0]
        weights = tuple(
            self._weight(row, module) for row, module in zip(self.rows, modules, strict=True)
        )
        if self.solver.needs_hessian and self.hessian is None:
            raise NumericsError(
                "no calibration token reached this layer",
                where=self.name,
                remedy="add samples of the modality that passes it",
            )
        problem = LayerProblem(
            names=tuple(row.site.name for row in self.rows),
            weights=weights,
            spec=_required(first),
            range_rule=first.weight_range,
            scale_dtype=self.job.bound.dtype,
            hessian=None if self.hessian is None else self.hessian.mean(),
        )
        return self.solver.solve(problem)

    def input_notes(self) -> dict[str, float | int | str]:
        """The static input range, for the record."""
        if self.input_scale is None:
            return {}
        return {"input_low": self._low_high[0], "input_high": self._low_high[1]}

    def _weight(self, row: PlanRow, module: nn.Module) -> Tensor:
        shape = (row.site.out_features, row.site.in_features)
        matrix = module.get_parameter("weight").detach().to(torch.float32).reshape(shape)
        if not torch.isfinite(matrix).all():
            bad = int((~torch.isfinite(matrix)).sum())
            raise NumericsError(
                f"the weight holds {bad} values that are NaN or infinite",
                where=row.site.name,
                remedy="the source checkpoint is damaged: download or convert it again",
            )
        return matrix


def _feed(module: nn.Module, call: StepCall, groups: Sequence[_Group], what: str) -> None:
    """One forward pass of a step that ends when every group has seen its input."""
    waiting = len(groups)

    def hook_for(group: _Group) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal waiting
            group.observe(args[0], call.row_weights, what)
            waiting -= 1
            if waiting == 0:
                raise Enough

        return hook

    handles = [group.module.register_forward_pre_hook(hook_for(group)) for group in groups]
    try:
        module(*call.args, **call.kwargs)
    except Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _required(row: PlanRow) -> Any:
    if row.weights is None:
        raise NumericsError("a layer without a weight format reached a solver", where=row.site.name)
    return row.weights


def _drop_quantizers(model: nn.Module, name: str) -> None:
    """Turn a released step's quantized layers back into plain ones: their work is done."""
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
