"""One step of a model as the record keeps it: its layers, its smooth edges, its shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prismquant.arguments import EXACT
from prismquant.diagnostics.edge_diagnostics import EdgeDiagnostics
from prismquant.diagnostics.kv_diagnostics import KVDiagnostics
from prismquant.diagnostics.solver_diagnostics import (
    CorrectionDiagnostics,
    Failure,
    SolverDiagnostics,
    StaticInputRange,
)
from prismquant.diagnostics.tuning_diagnostics import TuningDiagnostics
from prismquant.statistics.tokens import Tokens


@dataclass(frozen=True)
class LayerRecord:
    """Record of one layer.

    Attributes:
        name: Module path.
        loss: The method's objective: mean squared output error summed over outputs, or the squared
            weight error where no statistics were needed.
        baseline_loss: The same for rounding to nearest with the same scales.
        diagnostics: How its codes were chosen, of all layers that were solved with it.
        tokens: How many tokens each of its statistics has seen, by its name: ``input_range``,
            ``output_range`` and ``hessian``.
        input_range: Range of its input; None where its scale is not static.
        vision_weight: Weight of a vision token in its statistics.
        correction: How far its weight was corrected; None: not.
        split_columns: Input columns that are kept in floating point.
        tuning: How its block was tuned; None: not.
        failure: Why it was rounded to nearest in place of being solved; None: it was solved.
        routed: Tokens that the router sent to the expert that it is part of; None: it is part of
            none, or nobody looked.
    """

    __pydantic_config__ = EXACT

    name: str
    loss: float
    baseline_loss: float
    diagnostics: SolverDiagnostics
    tokens: Mapping[str, Tokens] = field(default_factory=dict)
    input_range: StaticInputRange | None = None
    vision_weight: float = 1.0
    correction: CorrectionDiagnostics | None = None
    split_columns: tuple[int, ...] = ()
    tuning: TuningDiagnostics | None = None
    failure: Failure | None = None
    routed: Tokens | None = None

    @property
    def solver(self) -> str:
        """The method that chose the codes."""
        return self.diagnostics.method


@dataclass(frozen=True)
class EdgeRecord:
    """Record of one smooth edge.

    Attributes:
        source: Module path of its norm or producer.
        readers: Module paths of the layers that read it.
        transform: The method that chose the scale.
        diagnostics: What it chose and gained, or why it left the edge alone.
        tokens: How many tokens its readers' input was looked at of.
    """

    __pydantic_config__ = EXACT

    source: str
    readers: tuple[str, ...]
    transform: str
    diagnostics: EdgeDiagnostics
    tokens: Tokens = field(default_factory=Tokens)


@dataclass(frozen=True)
class StepRecord:
    """Record of one step.

    Attributes:
        name: Module path of the step.
        shard: File that holds its tensors.
        seconds: Wall time.
        layers: Its quantized layers.
        edges: Edges along which scale was moved, or was not worth moving.
        kv_cache: Ranges of the keys and values of its attention; None: their cache is not
            quantized.
        threads: Threads that torch computed with; 0 where they change nothing.
        nonfinite: Tensors of the shard that stay in floating point and hold NaN or infinities, with
            how many of them.
        size: Bytes of the shard, once it is claimed.
        sha256: Its checksum.
    """

    __pydantic_config__ = EXACT

    name: str
    shard: str
    seconds: float
    layers: tuple[LayerRecord, ...]
    edges: tuple[EdgeRecord, ...] = ()
    kv_cache: KVDiagnostics | None = None
    threads: int = 0
    nonfinite: Mapping[str, str] = field(default_factory=dict)
    size: int = 0
    sha256: str = ""
