"""What became of one step of a model, its layers and its smooth edges, as the record keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prismquant.arguments import EXACT
from prismquant.statistics.tokens import Tokens


@dataclass(frozen=True)
class LayerRecord:
    """What became of one layer.

    Attributes:
        name: Module path.
        solver: The method that chose the codes.
        loss: The method's objective: mean squared output error summed over outputs, or the squared
            weight error where no statistics were needed.
        baseline_loss: The same for rounding to nearest with the same scales.
        notes: Damping, fallbacks, input range and other facts worth keeping.
        tokens: How many tokens each of its statistics has seen, by its name: ``input_range``,
            ``output_range`` and ``hessian``.
    """

    __pydantic_config__ = EXACT

    name: str
    solver: str
    loss: float
    baseline_loss: float
    notes: Mapping[str, float | int | str]
    tokens: Mapping[str, Tokens] = field(default_factory=dict)


@dataclass(frozen=True)
class EdgeRecord:
    """What became of one edge.

    Attributes:
        source: Module path of its upper end.
        readers: Module paths of the layers that read it.
        equalizer: The method that chose the scale.
        notes: What it chose and gained, or why it left the edge alone.
        tokens: How many tokens its readers' input was looked at of.
    """

    __pydantic_config__ = EXACT

    source: str
    readers: tuple[str, ...]
    equalizer: str
    notes: Mapping[str, float | int | str]
    tokens: Tokens = field(default_factory=Tokens)


@dataclass(frozen=True)
class StepRecord:
    """What became of one step.

    Attributes:
        name: Module path of the step.
        shard: File that holds its tensors.
        seconds: Wall time.
        layers: Its quantized layers.
        edges: Edges along which scale was moved, or was not worth moving.
        kv_cache: Ranges of the keys and values of its attention, where their cache is quantized.
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
    kv_cache: Mapping[str, float | int | str] = field(default_factory=dict)
    threads: int = 0
    nonfinite: Mapping[str, str] = field(default_factory=dict)
    size: int = 0
    sha256: str = ""
