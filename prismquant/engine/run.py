"""The loop over a model's units: quantize or restore, hand on, write, tell.

One unit is in memory at a time. Its tensors go to the sink as soon as it is quantized, so that a
run can end at any moment and be taken up again: a finished unit is read back, put in place, and
carried forward. Where nothing must be seen of any input, no unit waits for another, and a pool of
threads takes them (:mod:`prismquant.engine.data_free`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from prismquant.diagnostics.step_record import StepRecord
from prismquant.engine.data_free import run_without_data
from prismquant.engine.memory_forecast import weight_dtype
from prismquant.engine.quantize import blaming, quantize_unit, replace_layer
from prismquant.engine.setup import RunSetup
from prismquant.engine.streamed_model import ServedAs
from prismquant.engine.unit_plan import QuantizedUnit, Quantizing, UnitPlan, unit_plans
from prismquant.engine.visit import Visit
from prismquant.engine.walk import ModelWalk, Unit
from prismquant.memory import give_back_freed, keep_heap_compact
from prismquant.models.attention import quantize_cache
from prismquant.models.bound import BoundModel
from prismquant.plan.plan import Plan
from prismquant.plan.source import source_reader
from prismquant.runtime.mixed import Precision

ACTIVATIONS = 16 << 20
"""Bytes below which blocks stay at hand: activations come and go with every call."""


@torch.no_grad()
def run(setup: RunSetup) -> Iterator[StepRecord]:
    """Quantize a model unit by unit.

    Yields:
        The record of each unit when its shard is durable; those in ``setup.done`` are carried
        forward but not yielded again. Closing the iterator stops all work.

    Raises:
        NumericsError: A weight, an activation or a Hessian is not finite or cannot be factorized.
        StorageError: A shard cannot be read or written.
    """
    planned = unit_plans(setup.plan, setup.bound)
    setup.reporter.begin(len(setup.bound.steps))
    if not setup.plan.needs_data:
        yield from run_without_data(setup, _walk(setup), planned)
        return
    keep_heap_compact(ACTIVATIONS)
    how = Quantizing(setup.plan, setup.vision_weights, setup.ranks, setup.reporter.stage)
    with contextlib.closing(_walk(setup).units()) as units:
        for unit in units:
            yield from _visit(setup, unit, planned[unit.name], how)


def visit_of(plan: Plan, bound: BoundModel, precision: Precision) -> Visit:
    """Wishes of whoever quantizes a model by a plan as it walks."""
    served = ServedAs(
        quantized_inputs=plan.calibration.quantized_inputs,
        rotations={row.site.name: row.online for row in plan.rows if row.online},
        linear_dtypes={step.name: weight_dtype(plan, step, precision) for step in bound.steps},
    )
    return Visit(
        layers=[row.site.name for row in plan.quantized],
        attentions=[] if plan.kv_cache is None else [one.step for one in plan.kv_cache.layers],
        stagewise=plan.calibration.layer_sequential,
        float_chain=plan.needs_float_chain,
        served=served,
    )


def hand_on(
    unit: Unit, planned: UnitPlan, how: Quantizing, found: QuantizedUnit, work: Callable[[], None]
) -> None:
    """Do the work on a unit, and hand its output on as the plan says.

    Args:
        unit: The unit, loaded.
        planned: What is done to it.
        how: What holds for all units.
        found: What the work finds.
        work: Quantizes it or restores it.
    """
    carries = unit.carries and unit.calibrated
    if carries and planned.edges:
        # A resumed run does not move scale again, and must carry on the same numbers.
        unit.fix_float_outputs()
    if carries and not how.plan.calibration.block_sequential:
        how.stage(unit.name, "forward")
        unit.fix_outputs()
    with blaming(unit.name, found):
        work()
        if unit.carries:
            how.stage(unit.name, "forward")
            unit.advance()


def _walk(setup: RunSetup) -> ModelWalk:
    return ModelWalk(
        setup.bound,
        source_reader(setup.plan, setup.bound),
        setup.batches if setup.plan.needs_data else (),
        setup.placement,
        visit=visit_of(setup.plan, setup.bound, setup.placement.precision),
        store=setup.store,
        ranks=setup.ranks,
    )


def _visit(setup: RunSetup, unit: Unit, planned: UnitPlan, how: Quantizing) -> Iterator[StepRecord]:
    """Quantize one unit or restore it, hand its output on, and write it."""
    started, done, found = time.monotonic(), setup.done.get(unit.name), QuantizedUnit()

    def work() -> None:
        if done is None:
            quantize_unit(unit, planned, how, found)
        else:
            _restore(setup, unit, planned, done)

    with unit.loaded():
        hand_on(unit, planned, how, found, work)
        changed = found.changed(unit)
    if done is None:
        setup.reporter.stage(unit.name, "write")
        first = setup.ranks.rank == 0
        shard = setup.sink.write_step(unit.step, found.layers, changed) if first else ""
        done = found.record(unit.name, shard, started, threads=torch.get_num_threads())
        yield done
    give_back_freed()
    setup.reporter.finish(done)


def _restore(setup: RunSetup, unit: Unit, planned: UnitPlan, done: StepRecord) -> None:
    """Put a finished unit's numbers in place, to carry its output forward."""
    if not unit.flows:
        return
    if planned.edges:
        for name, tensor in setup.sink.read_plain(done.shard, planned.rows).items():
            unit.set_tensor(name, tensor)
    if planned.rows:
        rows = planned.by_name
        for layer in setup.sink.read_step(done.shard, planned.rows):
            replace_layer(unit, rows[layer.name], layer)
    plan, attention = setup.plan.kv_cache, planned.attention
    if plan is not None and attention is not None:
        scales = setup.sink.read_kv(done.shard, attention).to(setup.placement.device)
        quantize_cache(unit.main.model, attention.attention, plan.spec, scales)
