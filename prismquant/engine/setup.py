"""Everything that a run is given: what to do, with what, where, and who is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from prismquant.data.batches import Batch
from prismquant.diagnostics.step_record import StepRecord
from prismquant.distributed import Alone, Ranks
from prismquant.engine.activation_store import ActivationStore, InMemory
from prismquant.engine.placement import Placement
from prismquant.formats.quantized_layer import KVScales, QuantizedLayer
from prismquant.models.bound import BoundModel, BoundStep
from prismquant.plan.kv_plan import KVLayer
from prismquant.plan.plan import Plan, PlanRow


class Sink(Protocol):
    """Destination of finished units."""

    def write_step(
        self, step: BoundStep, layers: Sequence[QuantizedLayer], changed: Mapping[str, Tensor]
    ) -> str:
        """Make the step durable; returns the shard's name.

        Args:
            step: The step.
            layers: Its quantized layers.
            changed: Other tensors that differ from the source's, by module tensor name.
        """

    def read_step(self, shard: str, rows: Sequence[PlanRow]) -> list[QuantizedLayer]:
        """The layers of a step that an earlier run finished."""

    def read_plain(self, shard: str, rows: Sequence[PlanRow]) -> dict[str, Tensor]:
        """All other tensors of such a step, by module tensor name."""

    def read_kv(self, shard: str, layer: KVLayer) -> KVScales:
        """The scales of an attention layer's keys and values, of such a step."""


class Reporter(Protocol):
    """Is told how far the run is."""

    def remark(self, line: str) -> None:
        """Something that a user should know before the work begins, or wherever it turns up."""

    def begin(self, steps: int) -> None:
        """The run has so many steps."""

    def stage(self, step: str, what: str) -> None:
        """A stage of a step begins."""

    def finish(self, record: StepRecord) -> None:
        """A step is done."""


class Silent:
    """A reporter that says nothing."""

    def remark(self, line: str) -> None:
        """Say nothing."""

    def begin(self, steps: int) -> None:
        """Say nothing."""

    def stage(self, step: str, what: str) -> None:
        """Say nothing."""

    def finish(self, record: StepRecord) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class RunSetup:
    """Everything that a run needs.

    Attributes:
        plan: What to do.
        bound: The model's description.
        batches: Calibration batches; empty when the plan needs none. They are taken once, so that
            whoever gives an iterator need not hold their pixels for the length of the run.
        sink: Where finished units go.
        reporter: Is told how far the run is.
        placement: Where units run, and where hidden states wait.
        store: Keeps hidden states between units.
        done: Units that an earlier run finished, by name.
        vision_weights: What a vision token counts for at layers whose plan says ``gradient``, by
            the layer's name.
        ranks: The processes that share the calibration data and the solving; only the first one
            writes.
    """

    plan: Plan
    bound: BoundModel
    batches: Iterable[Batch]
    sink: Sink
    reporter: Reporter = field(default_factory=Silent)
    placement: Placement = field(default_factory=Placement)
    store: ActivationStore = field(default_factory=InMemory)
    done: Mapping[str, StepRecord] = field(default_factory=dict)
    vision_weights: Mapping[str, float] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=Alone)
