"""The one loop: for each step, capture, transform, solve, replace, tune, carry forward, write.

One step (patch embedding, block, projector, head) is in memory at a time. Its parameters are read
from the shards, scale is moved along its edges, its layers are solved stage by stage, its output
under the quantized weights becomes the next step's input, its tensors are handed to the sink, and
its memory is given back.

Where a method aims at the float model's output, a second chain runs beside the first: the same
steps with float weights, fed by float steps before them.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from prismquant.algorithms.methods import build_equalizer
from prismquant.diagnostics.failed_layers import failed_layers
from prismquant.diagnostics.step_record import EdgeRecord, LayerRecord, StepRecord
from prismquant.engine.chain import Chain, source_reader
from prismquant.engine.collectives import Task, all_channels, solve_all
from prismquant.engine.group import Group, GroupSettings, What
from prismquant.engine.job import Run
from prismquant.engine.kv_observation import KVObservation, Notes
from prismquant.engine.memory_forecast import weight_dtype
from prismquant.engine.passes import Output, Passes
from prismquant.engine.smoothing import edge_problem, move_scale
from prismquant.engine.tuning import TunedBlock, tune
from prismquant.errors import NumericsError
from prismquant.formats.quantized_layer import QuantizedLayer, scale_and_zero_point
from prismquant.memory import give_back_freed, keep_heap_compact
from prismquant.models.arch import Modality
from prismquant.models.attention import quantize_cache
from prismquant.models.bound import BoundStep
from prismquant.plan.bit_layout import DENSE
from prismquant.plan.kv_plan import KVLayer
from prismquant.plan.plan import PlanEdge, PlanRow, problem_groups
from prismquant.runtime.quant_linear import quantize_inputs, quantize_outputs
from prismquant.statistics.channels import ChannelRecord
from prismquant.statistics.tokens import Tokens, summed

# Bytes below which blocks stay at hand: activations come and go with every call.
_ACTIVATIONS = 16 << 20


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
    keep_heap_compact(_ACTIVATIONS)
    yield from _Engine(job).run()


@dataclass
class _Work:
    """One step at work, and what has become of it so far.

    Attributes:
        step: The step.
        rows: What to quantize of it.
        passes: Of the chain of quantized steps.
        twins: Of the float chain, where there is one.
        layers: Solved layers.
        records: What to tell of them.
        edges: What to tell of the edges along which scale was moved.
        changed: Names of tensors that scale was moved in.
        kv_scales: Scales of keys and values, by module tensor name.
        kv_notes: What to tell of them.
        wanted: The float model's outputs, once a tuner has asked for them all.
    """

    step: BoundStep
    rows: Sequence[PlanRow]
    passes: Passes
    twins: Passes | None
    layers: list[QuantizedLayer] = field(default_factory=list)
    records: list[LayerRecord] = field(default_factory=list)
    edges: list[EdgeRecord] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)
    kv_scales: dict[str, Tensor] = field(default_factory=dict)
    kv_notes: Notes = field(default_factory=dict)
    wanted: list[Output] | None = None

    def twin_outputs(self) -> Iterator[Output]:
        """The float model's outputs, where there is a float chain."""
        if self.wanted is not None:
            yield from self.wanted
        elif self.twins is not None:
            yield from self.twins.outputs()

    def unsolved(self, stage: Sequence[str]) -> list[str]:
        """Layers that neither are solved nor belong to this stage."""
        known = {layer.name for layer in self.layers} | set(stage)
        return [row.site.name for row in self.rows if row.site.name not in known]


class _Engine:
    """The state of one run: the chain of quantized steps and, where it is needed, the float one."""

    def __init__(self, job: Run) -> None:
        self.job = job
        self.reader = source_reader(job.plan, job.bound)
        batches = list(job.batches)
        self.main = Chain(job, self.reader, batches)
        self.float = Chain(job, self.reader, batches) if job.plan.needs_float_chain else None
        self.rows: dict[str, list[PlanRow]] = {}
        for row in job.plan.quantized:
            self.rows.setdefault(job.bound.steps[row.site.step].name, []).append(row)
        self.all_rows = {row.site.name: row for row in job.plan.rows}
        self.edges: dict[int, list[PlanEdge]] = {}
        for edge in job.plan.edges:
            self.edges.setdefault(edge.edge.step, []).append(edge)

    @property
    def chains(self) -> list[Chain]:
        return [self.main] if self.float is None else [self.main, self.float]

    def run(self) -> Iterator[StepRecord]:
        self.job.reporter.begin(len(self.job.bound.steps))
        if self.main.replay is None:
            for step in self.job.bound.steps:
                yield from self._step(step, flows=False)
        else:
            yield from self._with_data()

    def _with_data(self) -> Iterator[StepRecord]:
        steps = self.job.bound.steps
        vision = [s for s in steps if s.modality is not Modality.LLM]
        llm = [s for s in steps if s.modality is Modality.LLM]
        with contextlib.ExitStack() as around_llm:
            with self._loaded_between(vision=True):
                yield from self._vision_steps(vision, llm)
                if self._any_left(llm):
                    around_llm.enter_context(self._loaded_between(vision=False))
                    for chain in self.chains:
                        if chain.replay is not None:
                            chain.replay.begin_llm(chain.embedding())
            for index, step in enumerate(llm):
                yield from self._step(step, flows=self._any_left(llm[index:]))

    def _vision_steps(
        self, vision: Sequence[BoundStep], llm: Sequence[BoundStep]
    ) -> Iterator[StepRecord]:
        entries = [step.name for step in vision if step.kind == "entry"]
        with self.main.loaded(entries):
            order = self._vision_order()
        # Without images nothing passes the tower, and nothing in it needs data.
        steps = order or vision
        for index, step in enumerate(steps):
            needed = self._any_left([*steps[index:], *llm])
            yield from self._step(step, flows=bool(order) and needed)

    def _vision_order(self) -> list[BoundStep]:
        """The tower's steps as the model runs them; a rank without pictures is told by another."""
        with self.job.precision.in_force():
            own = [] if self.main.replay is None else self.main.replay.vision_steps()
        known = self.job.ranks.gather_json([step.index for step in own])
        return [self.job.bound.steps[index] for index in next(filter(None, known), [])]

    def _any_left(self, steps: Sequence[BoundStep]) -> bool:
        return any(step.name in self.rows or self._kv_layer(step) for step in steps)

    @contextlib.contextmanager
    def _loaded_between(self, *, vision: bool) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for chain in self.chains:
                stack.enter_context(chain.loaded(chain.between_steps(vision=vision)))
            yield

    def _step(self, step: BoundStep, *, flows: bool) -> Iterator[StepRecord]:
        """Solve one step, carry its output forward, and write it.

        Args:
            step: The step.
            flows: Whether calibration data passes it, for its own sake or that of a later step.
        """
        started = time.monotonic()
        rows = self.rows.get(step.name, [])
        done = self.job.done.get(step.name)
        carries = flows and step.kind != "head"
        with contextlib.ExitStack() as stack:
            for chain in self.chains if rows or flows else []:
                stack.enter_context(chain.loaded([step.name]))
            if rows or flows:
                self._narrow(step)
            self._read_ahead(step)
            work = self._begin(step, rows)
            if carries and step.index in self.edges:
                # A resumed run does not move scale again, and must carry on the same numbers.
                work.wanted = list(work.twin_outputs())
            outputs: list[Output] = []
            if carries and not self.job.plan.calibration.block_sequential:
                self.job.reporter.stage(step.name, "forward")
                outputs = list(self.main.passes(step).outputs())
            with _blaming(work):
                if done is not None:
                    self._restore(done, step, rows, flows)
                else:
                    self._solve(work, flows)
                if carries:
                    self.job.reporter.stage(step.name, "forward")
                    for keep, output in itertools.chain(
                        work.twin_outputs(), outputs or work.passes.outputs()
                    ):
                        keep(output)
            changed = self._changed(work) | work.kv_scales
        if done is None:
            self.job.reporter.stage(step.name, "write")
            first = self.job.ranks.rank == 0
            shard = self.job.sink.write_step(step, work.layers, changed) if first else ""
            seconds = time.monotonic() - started
            done = StepRecord(
                step.name,
                shard,
                seconds,
                tuple(work.records),
                tuple(work.edges),
                work.kv_notes,
                threads=torch.get_num_threads(),
            )
            yield done
        give_back_freed()
        self.job.reporter.finish(done)

    def _read_ahead(self, step: BoundStep) -> None:
        """Let the system read the step after this one while this one is computed."""
        bound = self.job.bound
        following = tuple(f"{after.name}." for after in bound.steps[step.index + 1 :][:1])
        names = [name for name in bound.shapes if name.startswith(following)]
        self.reader.read_ahead(bound.names.to_disk(name) for name in names)

    def _narrow(self, step: BoundStep) -> None:
        """Hold weights as linear layers multiply them, where that is exact.

        The products are the same, and take no rounding of the weights each time.
        """
        narrow = self._weight_dtype(step)
        if narrow == self.job.precision.dtype:
            return
        for chain in self.chains:
            for name, module in chain.module(step.name).named_modules(prefix=step.name):
                linear = isinstance(module, nn.Linear)
                if linear and self._stored_dtype(f"{name}.weight") == narrow:
                    module.weight = nn.Parameter(module.weight.to(narrow), requires_grad=False)

    def _weight_dtype(self, step: BoundStep) -> torch.dtype:
        """In which weights of linear layers are held."""
        return weight_dtype(self.job.plan, step, self.job.precision)

    def _begin(self, step: BoundStep, rows: Sequence[PlanRow]) -> _Work:
        # Passes can halt at one input at a time. At the entry step they would hold all pixels.
        inputs = [{row.site.input_key for row in stage} for stage in self._stages(rows)]
        paused = self.job.way.paused and bool(inputs) and all(len(keys) == 1 for keys in inputs)
        paused = paused and step.kind != "entry"
        twins = None if self.float is None else self.float.passes(step, paused=paused)
        return _Work(step, rows, self.main.passes(step, paused=paused), twins)

    def _solve(self, work: _Work, flows: bool) -> None:
        """Transform and solve a loaded step, then tune it as a whole.

        Args:
            work: The step.
            flows: Whether calibration data passes it.
        """
        step, rows = work.step, work.rows
        if flows:
            self._equalize(work)
            self._round_moved(work)
        tuned = [row for row in rows if row.config.tuner is not None]
        floats = {row.site.name: _weight_of(self.main, row) for row in tuned}
        kv = self._kv_layer(step)
        sequential = self.job.plan.calibration.layer_sequential
        for stage in self._stages(rows):
            later = sequential and kv is not None and stage[0].site.stage > kv.stage
            if kv is not None and later and not work.kv_scales:
                self._quantize_kv(kv, work)
            self._solve_stage(stage, work)
        if kv is not None and not work.kv_scales:
            self._quantize_kv(kv, work)
        # What fell back is rounded to nearest, no more; the others are tuned around it.
        failed = failed_layers(work.records)
        if any(row.site.name not in failed for row in tuned):
            self._tune(floats, failed, work)
            if kv is not None:
                # The tuner has changed the projections, if only by a rounding here and there.
                self._quantize_kv(kv, work)

    def _kv_layer(self, step: BoundStep) -> KVLayer | None:
        plan = self.job.plan.kv_cache
        return None if plan is None else plan.layer(step.index)

    def _quantize_kv(self, layer: KVLayer, work: _Work) -> None:
        """Choose the scales of a block's keys and values, and let what follows see them rounded."""
        plan, step = self.job.plan.kv_cache, work.step
        if plan is None:
            return
        self.job.reporter.stage(step.name, "keys and values")
        observation = KVObservation(plan, layer)
        module = self.main.module(step.name)
        with self.main.as_asked(step):
            observation.observe(self.main.model, module, self.main.calls(step))
        observation.share(self.job.ranks)
        scales = observation.scales(layer.key.dtype, self.job.device)
        quantize_cache(self.main.model, layer.attention, plan.spec, scales)
        work.kv_scales, work.kv_notes = scales.named(layer.tensors), observation.notes()
        work.passes.restart()

    def _equalize(self, work: _Work) -> None:
        """Move scale along the step's edges, method by method, with one pass over the data each.

        Edges further down come first, so that the rows of their upper ends are settled when those
        ends are themselves readers. Within a method no edge changes the input of another's readers.
        """
        planned = self.edges.get(work.step.index, [])
        for method in dict.fromkeys(edge.equalizer for edge in planned):
            edges = [edge for edge in planned if edge.equalizer == method]
            self.job.reporter.stage(work.step.name, method)
            records, seen = self._channels(work.step, edges)
            for edge in reversed(edges):
                first = edge.edge.consumers[0]
                self._equalize_edge(edge, records[first], seen.get(first, Tokens()), work)

    def _channels(
        self, step: BoundStep, edges: Sequence[PlanEdge]
    ) -> tuple[dict[str, ChannelRecord], dict[str, Tokens]]:
        """What calibration sees of the input of each edge's readers, by the first reader's name;
        and of how many tokens.
        """
        names = list(dict.fromkeys(edge.edge.consumers[0] for edge in edges))
        records = {
            name: ChannelRecord(
                self.all_rows[name].site.in_features, f"input of {name}", device=self.job.device
            )
            for name in names
        }
        seen: dict[str, Tokens] = {}
        for call, inputs in self.main.passes(step).inputs(names):
            for name, x in inputs.items():
                rows = x.reshape(-1, records[name].in_features)
                records[name].update(rows, call.row_weights, call.vision)
                seen[name] = seen.get(name, Tokens()) + call.seen(len(rows))
        return all_channels(records, self.job.ranks), summed(seen, self.job.ranks)

    def _equalize_edge(
        self, planned: PlanEdge, record: ChannelRecord, seen: Tokens, work: _Work
    ) -> None:
        edge = planned.edge
        weight = self._vision_weight(self.all_rows[edge.consumers[0]])
        problem = edge_problem(self.main.model, edge, self.all_rows, record, weight)
        result = build_equalizer(planned.equalizer, planned.options).equalize(problem)
        notes = dict(result.notes)
        work.edges.append(EdgeRecord(edge.source, edge.consumers, planned.equalizer, notes, seen))
        if result.scale is None:
            return
        stored = self._stored_dtype(f"{edge.source}.weight")
        for chain in self.chains:
            work.changed.update(move_scale(chain.model, edge, result.scale, stored))

    def _round_moved(self, work: _Work) -> None:
        """Give tensors that scale was moved in, and that no solver stores, their stored values.

        A run that is resumed reads these, and must go on from the same numbers.
        """
        solved = {f"{row.site.name}.weight" for row in work.rows}
        for name in work.changed - solved:
            parameter = self.main.model.get_parameter(name)
            parameter.copy_(parameter.to(self._stored_dtype(name)))

    def _stored_dtype(self, name: str) -> torch.dtype:
        """Of a tensor that stays in floating point: norms may be wider than all else."""
        return self.reader.info(self.job.bound.names.to_disk(name)).dtype

    def _vision_weight(self, row: PlanRow) -> float:
        if row.config.vision_weight == "gradient":
            return self.job.vision_weights.get(row.site.name, 1.0)
        return row.config.vision_weight

    def _stages(self, rows: Sequence[PlanRow]) -> list[list[PlanRow]]:
        """Rows in the order in which a block runs them; one stage when it is not sequential."""
        if not rows:
            return []
        if not self.job.plan.calibration.layer_sequential:
            return [list(rows)]
        stages: dict[int, list[PlanRow]] = {}
        for row in rows:
            stages.setdefault(row.site.stage, []).append(row)
        return [stages[number] for number in sorted(stages)]

    def _solve_stage(self, rows: Sequence[PlanRow], work: _Work) -> None:
        groups = [self._group(members) for members in problem_groups(rows)]
        told: dict[What, str] = {"columns": "columns", "ranges": "ranges", "moments": "Hessians"}
        for what, title in told.items():
            hungry = [group for group in groups if group.wants(what)]
            if hungry:
                self.job.reporter.stage(work.step.name, title)
                self._observe(work, rows, hungry, what)
            for group in hungry:
                group.share(what, self.job.ranks)
                if what == "columns":
                    group.split_columns()
        roles = ", ".join(dict.fromkeys(row.site.role for row in rows))
        self.job.reporter.stage(work.step.name, f"{rows[0].config.solver} {roles}")
        # One at a time where nobody else could solve another meanwhile: each has its own Hessian.
        batches = [[group] for group in groups] if self.job.ranks.size == 1 else [groups]
        for members in batches:
            # What passes have left on the heap would come on top of what a solver takes.
            give_back_freed()
            tasks = [Task(group.solver, group.problem()) for group in members]
            results = solve_all(tasks, self.job.ranks)
            for group, result in zip(members, results, strict=True):
                for layer, record in group.solved(result):
                    self._replace(layer)
                    work.layers.append(layer)
                    work.records.append(record)

    def _group(self, rows: Sequence[PlanRow]) -> Group:
        settings = GroupSettings(
            device=self.job.device,
            stored_dtype=rows[0].site.dtype,
            quantized_inputs=self.job.plan.calibration.quantized_inputs,
            vision_weight=self._vision_weight(rows[0]),
            products=self.job.precision.products or self.job.precision.dtype,
        )
        return Group(rows, [self.main.module(row.site.name) for row in rows], settings)

    def _observe(
        self, work: _Work, rows: Sequence[PlanRow], groups: Sequence[Group], what: What
    ) -> None:
        """Feed each of a stage's groups the input of its layers, call by call."""
        stage = [row.site.name for row in rows]
        drifting = [g.name for g in groups if what == "moments" and g.rows[0].config.correction]
        # Nothing changes in the float model.
        twins = work.twins.inputs(drifting, stage) if work.twins and drifting else None
        names = [group.name for group in groups]
        for call, inputs in work.passes.inputs(names, stage, work.unsolved(stage)):
            wanted = {} if twins is None else next(twins)[1]
            for group in groups:
                if group.name in inputs:
                    x = inputs[group.name]
                    group.observe(x, call, what, wanted.get(group.name))
                    if what == "ranges":
                        with self.job.precision.in_force():
                            group.observe_outputs(x, call)

    def _tune(self, floats: Mapping[str, Tensor], failed: Collection[str], work: _Work) -> None:
        """Improve the codes of the whole step on its output, but for layers that fell back."""
        step = work.step
        self.job.reporter.stage(step.name, "tune")
        teacher = None if self.float is None else self.float.module(step.name)
        work.passes.restart()
        work.wanted = list(work.twin_outputs())
        block = TunedBlock(
            step.name,
            self.main.module(step.name),
            teacher,
            list(self.main.calls(step)),
            [output for _, output in work.wanted],
            self.all_rows,
            self._vision_weight(next(row for row in work.rows if row.config.tuner)),
        )
        solved = [layer for layer in work.layers if layer.name not in failed]
        for layers, notes in tune(block, solved, floats):
            for layer in layers:
                index = [old.name for old in work.layers].index(layer.name)
                work.layers[index] = layer
                work.records[index] = replace(
                    work.records[index], notes=dict(work.records[index].notes) | notes
                )
                self._replace(layer)

    def _replace(self, layer: QuantizedLayer) -> None:
        """Put the dequantized weight, and the activations' quantizers, in the layer's place."""
        row, model = self.all_rows[layer.name], self.main.model
        site = row.site
        stored = site.dtype if row.layout == DENSE else self.job.precision.dtype
        held = self._weight_dtype(self.job.bound.steps[site.step])
        values = layer.values(stored).to(held).reshape(site.weight_shape)
        module = model.get_submodule(site.name)
        module.weight = nn.Parameter(values.to(self.job.device), requires_grad=False)
        if row.config.activations is not None:
            scale, zero_point = scale_and_zero_point(layer.input)
            columns = layer.outlier_columns.index if layer.outlier_columns else None
            quantize_inputs(model, site.name, row.config.activations, scale, zero_point, columns)
        if row.config.outputs is not None:
            quantize_outputs(
                model, site.name, row.config.outputs, *scale_and_zero_point(layer.output)
            )

    def _restore(
        self, done: StepRecord, step: BoundStep, rows: Sequence[PlanRow], flows: bool
    ) -> None:
        """Put a finished step's numbers in place, to carry its output forward."""
        if step.index in self.edges:
            for name, tensor in self.job.sink.read_plain(done.shard, rows).items():
                owner, _, leaf = name.rpartition(".")
                module = self.main.module(owner)
                if not module.get_parameter(leaf).is_meta:
                    values = tensor.to(self.job.device, self.job.precision.dtype)
                    setattr(module, leaf, nn.Parameter(values, requires_grad=False))
        for layer in self.job.sink.read_step(done.shard, rows) if rows else []:
            self._replace(layer)
        plan, attention = self.job.plan.kv_cache, self._kv_layer(step)
        if flows and plan is not None and attention is not None:
            scales = self.job.sink.read_kv(done.shard, attention).to(self.job.device)
            quantize_cache(self.main.model, attention.attention, plan.spec, scales)

    def _changed(self, work: _Work) -> dict[str, Tensor]:
        """Tensors in which scale was moved and which no solver stores, as they are to be stored."""
        solved = {f"{layer.name}.weight" for layer in work.layers}
        return {
            name: self.main.model.get_parameter(name).detach().to(self._stored_dtype(name))
            for name in sorted(work.changed - solved)
        }


def _weight_of(chain: Chain, row: PlanRow) -> Tensor:
    """The float weight of a layer as a matrix."""
    weight = chain.module(row.site.name).get_parameter("weight").detach()
    return weight.to(torch.float32).reshape(row.site.out_features, row.site.in_features)


@contextlib.contextmanager
def _blaming(work: _Work) -> Iterator[None]:
    """Tell an error of numbers with the step, and with layers of it that had failed before.

    What is wrong with a step's output may have begun in the input of one of its layers.
    """
    try:
        yield
    except NumericsError as error:
        failed = failed_layers(work.records)
        if error.where and not failed:
            raise
        first = next((f"first {name}: {why}" for name, why in failed.items()), "")
        told = f"; {len(failed)} layers of the step had failed before, {first}" if failed else ""
        raise NumericsError(
            f"{error.what}{told}", where=error.where or work.step.name, remedy=error.remedy
        ) from error
