"""Wishes of a walk's visitor."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from prismquant.engine.streamed_model import ServedAs


@dataclass(frozen=True)
class Visit:
    """Wishes of a walk's visitor.

    Attributes:
        layers: Names of the layers that it looks at or replaces. Data flow no further than the last
            unit that has one.
        attentions: Indices of units whose keys and values it looks at.
        stagewise: Layers are taken stage by stage, as the unit runs them; else all at once.
        float_chain: Whether the float model runs beside the quantized one.
        backward: Whether the units are gone through again for their gradients, from the last to
            the first that has a layer that the visitor looks at.
        served: How layers run.
    """

    layers: Collection[str] = ()
    attentions: Collection[int] = ()
    stagewise: bool = True
    float_chain: bool = False
    backward: bool = False
    served: ServedAs = field(default_factory=ServedAs)
