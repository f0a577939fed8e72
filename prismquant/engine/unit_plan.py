"""The plan of one unit of a walk, settings for all units, and the result of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from prismquant.diagnostics.kv_diagnostics import KVDiagnostics
from prismquant.diagnostics.step_record import EdgeRecord, LayerRecord, StepRecord
from prismquant.distributed import Alone, Ranks
from prismquant.engine.walk import Unit
from prismquant.formats.quantized_layer import QuantizedLayer
from prismquant.models.bound import BoundModel
from prismquant.plan.kv_plan import KVLayer
from prismquant.plan.plan import Plan, PlanEdge, PlanRow


def _never() -> None:
    """Nothing stops the work."""


@dataclass(frozen=True)
class UnitPlan:
    """The part of a plan that is about one unit.

    Attributes:
        rows: Layers to quantize.
        edges: Smooth edges along which scale is moved.
        attention: The attention layer whose keys and values are quantized, or None.
    """

    rows: tuple[PlanRow, ...] = ()
    edges: tuple[PlanEdge, ...] = ()
    attention: KVLayer | None = None

    @property
    def by_name(self) -> dict[str, PlanRow]:
        """The rows by their layer's name."""
        return {row.site.name: row for row in self.rows}


def unit_plans(plan: Plan, bound: BoundModel) -> dict[str, UnitPlan]:
    """The plan unit by unit, by the unit's name."""
    kv = plan.kv_cache
    return {
        step.name: UnitPlan(
            tuple(row for row in plan.quantized if row.site.step == step.index),
            tuple(edge for edge in plan.edges if edge.edge.step == step.index),
            None if kv is None else kv.layer(step.index),
        )
        for step in bound.steps
    }


@dataclass(frozen=True)
class Quantizing:
    """Settings that hold for all units of a run.

    Attributes:
        plan: What is done.
        vision_weights: What a vision token counts for at layers whose plan says ``gradient``, by
            the layer's name.
        ranks: The processes that share the calibration data and the solving.
        stage: Is told the unit's name and what is done to it next.
        pulse: Is called between pieces of work; what it raises ends the work.
    """

    plan: Plan
    vision_weights: Mapping[str, float] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=Alone)
    stage: Callable[[str, str], None] = lambda unit, what: None
    pulse: Callable[[], None] = _never

    def vision_weight(self, row: PlanRow) -> float:
        """Weight of a vision token in a layer's statistics."""
        if row.config.vision_weight == "gradient":
            return self.vision_weights.get(row.site.name, 1.0)
        return row.config.vision_weight


@dataclass
class QuantizedUnit:
    """Results of a unit so far; filled as the work goes.

    Attributes:
        layers: Its quantized layers.
        records: What to tell of them.
        edges: What to tell of its smooth edges.
        moved: Names of tensors that scale was moved in.
        kv_scales: Scales of keys and values, by module tensor name.
        kv_diagnostics: What to tell of them.
    """

    layers: list[QuantizedLayer] = field(default_factory=list)
    records: list[LayerRecord] = field(default_factory=list)
    edges: list[EdgeRecord] = field(default_factory=list)
    moved: set[str] = field(default_factory=set)
    kv_scales: dict[str, Tensor] = field(default_factory=dict)
    kv_diagnostics: KVDiagnostics | None = None

    def sort(self, names: Sequence[str]) -> None:
        """Bring the last layers, which have these names, into this order."""
        order, first = {name: n for n, name in enumerate(names)}, len(self.layers) - len(names)
        self.layers[first:] = sorted(self.layers[first:], key=lambda layer: order[layer.name])
        self.records[first:] = sorted(self.records[first:], key=lambda record: order[record.name])

    def record(self, name: str, shard: str, started: float, threads: int = 0) -> StepRecord:
        """The record of the unit, once it is written.

        Args:
            name: The unit's.
            shard: File that holds its tensors.
            started: When the work began, by the monotonic clock.
            threads: Threads that torch computed with; 0 where they change nothing.
        """
        return StepRecord(
            name,
            shard,
            time.monotonic() - started,
            tuple(self.records),
            tuple(self.edges),
            self.kv_diagnostics,
            threads=threads,
        )

    def changed(self, unit: Unit) -> dict[str, Tensor]:
        """Tensors that no solver stores and that differ from the source's, as they are stored."""
        solved = {f"{layer.name}.weight" for layer in self.layers}
        return self.kv_scales | {
            name: unit.tensor(name).to(unit.walk.stored_dtype(name))
            for name in sorted(self.moved - solved)
        }
