"""Quantizing one unit of a walk: smoothing, statistics, solvers, key-value cache, tuning.

A unit is quantized stage by stage (qkv; out; gate and up; down). Each stage sees its inputs as the
stages before it leave them, and its layers are replaced as soon as they are solved. A layer that
needs nothing from data is rounded straight from its weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from prismquant.algorithms.methods import build_fitted
from prismquant.diagnostics.failed_layers import failed_layers
from prismquant.diagnostics.step_record import EdgeRecord, LayerRecord
from prismquant.engine.collectives import Task, solve_all
from prismquant.engine.group import GroupSettings, LayerGroup, What
from prismquant.engine.kv_observation import KVObservation
from prismquant.engine.layer_inputs import inputs_of_layers
from prismquant.engine.quantize_experts import ExpertsWork, Found, Show
from prismquant.engine.smoothing import edge_problem, move_scale
from prismquant.engine.tuning import TunedBlock, tune
from prismquant.engine.unit_plan import QuantizedUnit, Quantizing, UnitPlan
from prismquant.engine.walk import Unit
from prismquant.engine.weight_rounding import is_rounded, round_layers
from prismquant.errors import NumericsError
from prismquant.formats.quantized_layer import QuantizedLayer, scale_and_zero_point
from prismquant.memory import give_back_freed
from prismquant.models.attention import quantize_cache
from prismquant.plan.kv_plan import KVLayer
from prismquant.plan.plan import PlanEdge, PlanRow, problem_groups
from prismquant.runtime.linear import ActivationQuantizer
from prismquant.statistics.channel_sizes import ChannelSizes
from prismquant.statistics.tokens import Tokens, summed


def quantize_unit(unit: Unit, planned: UnitPlan, how: Quantizing, found: QuantizedUnit) -> None:
    """Transform and quantize a unit's layers, stage by stage, then tune it as a whole.

    Args:
        unit: The unit; its modules are loaded where data flow.
        planned: What to do.
        how: What holds for all units.
        found: Takes what becomes of it, layer by layer, so that an error can tell how far it was.

    Raises:
        NumericsError: A weight, an input or a Hessian is not finite or cannot be factorized.
    """
    _UnitWork(unit, planned, how, found).run()


def replace_layer(unit: Unit, row: PlanRow, layer: QuantizedLayer) -> None:
    """Put a quantized layer, with the quantizers around it, in its place in a unit.

    Args:
        unit: The unit.
        row: What the plan says of the layer.
        layer: Its numbers.
    """
    if not unit.flows:
        return
    stored = row.site.dtype if row.stored_dense else unit.walk.placement.precision.dtype
    kept = layer.outlier_columns
    around: list[ActivationQuantizer | None] = [None, None]
    if row.config.activations is not None:
        scales = scale_and_zero_point(layer.input)
        columns = None if kept is None else kept.index
        around[0] = ActivationQuantizer(row.config.activations, *scales, columns)
    if row.config.outputs is not None:
        around[1] = ActivationQuantizer(row.config.outputs, *scale_and_zero_point(layer.output))
    unit.replace(row.site, layer.values(stored), *around)


class _UnitWork:
    """The work on one unit."""

    def __init__(
        self, unit: Unit, planned: UnitPlan, how: Quantizing, found: QuantizedUnit
    ) -> None:
        self.unit, self.planned, self.how, self.found = unit, planned, how, found
        self.rows = planned.by_name

    def run(self) -> None:
        if self.unit.flows:
            self._smooth()
            self._round_moved()
        tuned = [row for row in self.planned.rows if row.config.tuner is not None]
        floats = {row.site.name: self.unit.weight(row.site).float() for row in tuned}
        attention, sequential = self.planned.attention, self.how.plan.calibration.layer_sequential
        for stage in self.unit.stages:
            after = attention is not None and stage[0].stage > attention.stage
            if attention is not None and sequential and after and not self.found.kv_scales:
                self._quantize_kv(attention)
            self._quantize_stage([self.rows[site.name] for site in stage])
        if attention is not None and not self.found.kv_scales:
            self._quantize_kv(attention)
        # What fell back is rounded to nearest, no more; the others are tuned around it.
        failed = failed_layers(self.found.records)
        if any(row.site.name not in failed for row in tuned):
            self._tune(floats, failed)
            if attention is not None:
                # The tuner has changed the projections, if only by a rounding here and there.
                self._quantize_kv(attention)

    def _smooth(self) -> None:
        """Move scale along the unit's smooth edges, method by method, with one pass each.

        Edges further down come first, so that the rows of their producers are settled when those
        are consumers themselves. Within a method no edge changes the input of another's consumers.
        """
        for method in dict.fromkeys(edge.transform for edge in self.planned.edges):
            edges = [edge for edge in self.planned.edges if edge.transform == method]
            self.how.stage(self.unit.name, method)
            records, seen = self._channels(edges)
            for edge in reversed(edges):
                first = edge.edge.consumers[0]
                self._smooth_edge(edge, records[first], seen.get(first, Tokens()))

    def _channels(
        self, edges: Sequence[PlanEdge]
    ) -> tuple[dict[str, ChannelSizes], dict[str, Tokens]]:
        """Statistics of each edge's consumers, and their tokens, by the first consumer."""
        names = list(dict.fromkeys(edge.edge.consumers[0] for edge in edges))
        device, bound = self.unit.walk.placement.device, self.unit.walk.bound
        records = {
            name: ChannelSizes(bound.site(name).in_features, f"input of {name}", device=device)
            for name in names
        }
        seen: dict[str, Tokens] = {}
        # What a norm puts out is read by all experts together.
        of_all = {edge.edge.consumers[0] for edge in edges if edge.edge.norm is not None}
        for call, inputs in inputs_of_layers(self.unit, names, of_all):
            for name, x in inputs.items():
                rows = x.reshape(-1, records[name].in_features)
                records[name].update(rows, call.row_weights, call.vision)
                seen[name] = seen.get(name, Tokens()) + call.seen(len(rows))
        for record in records.values():
            record.share(self.how.ranks)
        return records, summed(seen, self.how.ranks)

    def _smooth_edge(self, planned: PlanEdge, record: ChannelSizes, seen: Tokens) -> None:
        edge, model = planned.edge, self.unit.main.model
        # Consumers that are not quantized have a row of the plan, too.
        rows = {row.site.name: row for row in self.how.plan.rows if row.site.step == edge.step}
        first = next(rows[name] for name in edge.consumers if rows[name].quantized)
        weight = self.how.vision_weight(first)
        problem = edge_problem(model, edge, rows, record, weight)
        result = build_fitted(planned.transform, planned.options).fit(problem)
        self.found.edges.append(
            EdgeRecord(edge.source, edge.consumers, planned.transform, result.diagnostics, seen)
        )
        if result.scale is not None:
            stored = self.unit.walk.stored_dtype(f"{edge.source}.weight")
            for chain in self.unit.walk.models:
                self.found.moved.update(move_scale(chain.model, edge, result.scale, stored))

    def _round_moved(self) -> None:
        """Give tensors that scale was moved in, and that no solver stores, their stored values.

        A run that is resumed reads these, and must go on from the same numbers.
        """
        for name in self.found.moved - {f"{layer}.weight" for layer in self.rows}:
            parameter = self.unit.tensor(name)
            parameter.copy_(parameter.to(self.unit.walk.stored_dtype(name)))

    def _quantize_kv(self, layer: KVLayer) -> None:
        """Choose the scales of a block's keys and values, and let what follows see them rounded."""
        plan, unit = self.how.plan.kv_cache, self.unit
        if plan is None:
            return
        self.how.stage(unit.name, "keys and values")
        observation = KVObservation(plan, layer)
        with unit.as_served():
            observation.observe(unit.main.model, unit.module, unit.calls())
        observation.share(self.how.ranks)
        scales = observation.scales(layer.key.dtype, unit.walk.placement.device)
        quantize_cache(unit.main.model, layer.attention, plan.spec, scales)
        self.found.kv_scales = scales.named(layer.tensors)
        self.found.kv_diagnostics = observation.diagnostics()
        unit.restart()

    def _quantize_stage(self, rows: Sequence[PlanRow]) -> None:
        if rows[0].site.expert is not None and any(row.needs_data for row in rows):
            done = {layer.name for layer in self.found.layers}
            others = [site.name for site in self.unit.layers if site.expert is None]
            later = [name for name in others if name not in done]
            work = (self._group, self._solve_shown, self._keep)
            ExpertsWork(self.unit, rows, self.how, later, *work).run()
            self.found.sort([row.site.name for row in rows])
            return
        groups = problem_groups(rows)
        straight = [members for members in groups if is_rounded(members[0])]
        self._solve([self._group(members) for members in groups if members not in straight], rows)
        for members in straight:
            self.how.stage(self.unit.name, _title(members))
            for layer, record in round_layers(self.unit, members, self.how):
                self._keep(layer, record)
        self.found.sort([row.site.name for members in groups for row in members])

    def _solve(self, groups: Sequence[LayerGroup], rows: Sequence[PlanRow]) -> None:
        """Gather what each group wants of a stage's inputs, then solve them."""
        stage = [row.site.name for row in rows]

        def keep(found: Found) -> None:
            for layer, record in found:
                self._keep(layer, record)

        if groups:
            self._solve_shown(groups, partial(self._observe, stage), keep)

    def _solve_shown(
        self, groups: Sequence[LayerGroup], show: Show, keep: Callable[[Found], None]
    ) -> None:
        """Let each group be shown what it wants, then solve them."""
        titles: dict[What, str] = {"columns": "columns", "ranges": "ranges", "moments": "Hessians"}
        for what, title in titles.items():
            hungry = [group for group in groups if group.wants(what)]
            if hungry:
                self.how.stage(self.unit.name, title)
                show(hungry, what)
            for group in hungry:
                group.share(what, self.how.ranks)
                if what == "columns":
                    group.fit_columns()
        self.how.stage(self.unit.name, _title([row for group in groups for row in group.rows]))
        # One at a time where nobody else could solve another meanwhile: each has its own Hessian.
        batches = [[group] for group in groups] if self.how.ranks.size == 1 else [groups]
        for members in batches:
            # What passes have left on the heap would come on top of what a solver takes.
            give_back_freed()
            tasks = [Task(group.solver, group.problem()) for group in members]
            for group, result in zip(members, solve_all(tasks, self.how.ranks), strict=True):
                keep(group.solved(result))

    def _group(self, rows: Sequence[PlanRow]) -> LayerGroup:
        precision = self.unit.walk.placement.precision
        settings = GroupSettings(
            device=self.unit.walk.placement.device,
            stored_dtype=rows[0].site.dtype,
            quantized_inputs=self.how.plan.calibration.quantized_inputs,
            vision_weight=self.how.vision_weight(rows[0]),
            products=precision.products or precision.dtype,
        )
        flows = self.unit.flows
        modules = [self.unit.main.module(row.site.name) for row in rows] if flows else []
        return LayerGroup(rows, modules, settings, self.unit.weight)

    def _observe(self, stage: Sequence[str], groups: Sequence[LayerGroup], what: What) -> None:
        """Feed each of a stage's groups the input of its layers, call by call."""
        if not self.unit.flows:
            return
        drifting = [g.name for g in groups if what == "moments" and g.rows[0].config.correction]
        # Nothing changes in the float model.
        twins = self.unit.float_inputs(drifting, stage) if drifting else None
        for call, inputs in self.unit.inputs([group.name for group in groups], stage):
            wanted = {} if twins is None else next(twins)[1]
            for group in groups:
                if group.name in inputs:
                    x = inputs[group.name]
                    group.observe(x, call, what, wanted.get(group.name))
                    if what == "ranges":
                        with self.unit.walk.placement.precision.in_force():
                            group.observe_outputs(x, call)

    def _tune(self, floats: Mapping[str, Tensor], failed: Collection[str]) -> None:
        """Improve the codes of the whole unit on its output, but for layers that fell back."""
        unit = self.unit
        self.how.stage(unit.name, "tune")
        unit.restart()
        twin = unit.walk.float
        block = TunedBlock(
            unit.name,
            unit.module,
            None if twin is None else twin.module(unit.name),
            list(unit.calls()),
            [output for _, output in unit.fix_float_outputs()],
            self.rows,
            self.how.vision_weight(next(row for row in self.planned.rows if row.config.tuner)),
        )
        solved = [layer for layer in self.found.layers if layer.name not in failed]
        for layers, tuning in tune(block, solved, floats):
            for layer in layers:
                index = [old.name for old in self.found.layers].index(layer.name)
                record = self.found.records[index]
                self.found.layers[index] = layer
                self.found.records[index] = replace(record, tuning=tuning)
                replace_layer(unit, self.rows[layer.name], layer)

    def _keep(self, layer: QuantizedLayer, record: LayerRecord) -> None:
        self.found.layers.append(layer)
        self.found.records.append(record)
        replace_layer(self.unit, self.rows[layer.name], layer)


def _title(rows: Sequence[PlanRow]) -> str:
    """E.g. ``gptq attn.qkv.q, attn.qkv.k``."""
    roles = ", ".join(dict.fromkeys(row.site.role for row in rows))
    return f"{rows[0].config.solver} {roles}"


@contextlib.contextmanager
def blaming(unit: str, found: QuantizedUnit) -> Iterator[None]:
    """Within the block, an error of numbers names the unit, and its layers that had failed before.

    What is wrong with a unit's output may have begun in the input of one of its layers.
    """
    try:
        yield
    except NumericsError as error:
        failed = failed_layers(found.records)
        if error.where and not failed:
            raise
        first = next((f"first {name}: {why}" for name, why in failed.items()), "")
        more = f"; {len(failed)} layers of the step had failed before, {first}" if failed else ""
        raise NumericsError(
            f"{error.what}{more}", where=error.where or unit, remedy=error.remedy
        ) from error
