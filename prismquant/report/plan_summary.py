"""A plan as tables show it, read from what plan.json holds; needs neither torch nor the model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prismquant.errors import PrismQuantError, StorageError
from prismquant.formats.spec import NumberSpec
from prismquant.plan.plan_version import PLAN_VERSION

FLOAT = "float"


@dataclass(frozen=True)
class PlannedLayer:
    """One row of a plan, in words.

    Attributes:
        name: Module path.
        modality: ``vision``, ``projector`` or ``llm``.
        role: Role of the layer, e.g. ``mlp.up``.
        shape: Shape of its weight.
        weights: Number format of the weight; ``float`` where it is left alone.
        activations: Number format of the input; ``float``: none.
        method: Everything that decides its codes; empty where it is left alone.
        columns: The transform that may keep single columns in floating point; empty: none.
        stored_bytes: Bytes that it takes on disk.
        note: Why it is left alone, or what differs from the recipe's words.
    """

    name: str
    modality: str
    role: str
    shape: tuple[int, ...]
    weights: str
    activations: str
    method: str
    columns: str
    stored_bytes: int
    note: str

    @property
    def quantized(self) -> bool:
        """Whether the layer is changed."""
        return self.weights != FLOAT


@dataclass(frozen=True)
class PlannedEdge:
    """One smooth edge of a plan.

    Attributes:
        source: Norm or producer whose scale moves.
        transform: The method that chooses the scale.
        options: Its options.
    """

    source: str
    transform: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class PlanSummary:
    """A plan as tables show it.

    Attributes:
        recipe: Name of the recipe.
        architecture: Name of the architecture.
        layers: The layers, in the order of the work.
        left_alone: Layers that are never quantized, each with the reason.
        towers: Towers that are rotated, each with the options of its rotation.
        edges: Along which edges scale is moved.
        totals: Layers and bytes by modality.
        other_bytes: Bytes of all tensors that are no layer's weight.
        total_bytes: Bytes of all tensors on disk afterwards.
        float_bytes: Bytes of all tensors in the source.
    """

    recipe: str
    architecture: str
    layers: tuple[PlannedLayer, ...]
    left_alone: tuple[tuple[str, str], ...]
    towers: tuple[tuple[str, Mapping[str, Any]], ...]
    edges: tuple[PlannedEdge, ...]
    totals: Mapping[str, Mapping[str, int]]
    other_bytes: int
    total_bytes: int
    float_bytes: int

    @classmethod
    def from_dict(cls, content: Any) -> PlanSummary:
        """Read what ``Plan.to_dict`` gave, or plan.json holds.

        Raises:
            StorageError: The content was written by another version or is damaged.
        """
        version = content.get("version") if isinstance(content, Mapping) else None
        if version != PLAN_VERSION:
            raise StorageError(f"plan of version {version!r} cannot be read")
        try:
            return cls(
                recipe=str(content["recipe"]),
                architecture=str(content["architecture"]),
                layers=tuple(_layer(row) for row in content["rows"]),
                left_alone=tuple((str(name), str(why)) for name, why in content["left_alone"]),
                towers=tuple(
                    (str(tower["modality"]), dict(tower["rotation"])) for tower in content["towers"]
                ),
                edges=tuple(_edge(edge) for edge in content["edges"]),
                totals={str(name): dict(part) for name, part in content["totals"].items()},
                other_bytes=int(content["other_bytes"]),
                total_bytes=int(content["total_bytes"]),
                float_bytes=int(content["float_bytes"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, PrismQuantError) as error:
            raise StorageError(f"the plan is damaged: {type(error).__name__}: {error}") from error


def _layer(row: Mapping[str, Any]) -> PlannedLayer:
    site, config = row["site"], row["config"]
    return PlannedLayer(
        name=str(site["name"]),
        modality=str(site["modality"]),
        role=str(site["role"]),
        shape=tuple(int(size) for size in site["weight_shape"]),
        weights=_format(config["weights"]),
        activations=_format(config["activations"]),
        method=_method(config),
        columns=str(row["outliers"]["transform"]) if row["outliers"] else "",
        stored_bytes=int(row["stored_bytes"]),
        note=str(row["note"]),
    )


def _edge(edge: Mapping[str, Any]) -> PlannedEdge:
    source = edge["edge"]["norm"] or edge["edge"]["producer"]
    return PlannedEdge(str(source), str(edge["transform"]), dict(edge["options"]))


def _format(fields: Mapping[str, Any] | None) -> str:
    return FLOAT if fields is None else _described(tuple(fields.items()))


@functools.lru_cache(maxsize=256)
def _described(fields: tuple[tuple[str, Any], ...]) -> str:
    return NumberSpec.from_dict(dict(fields)).describe()


def _method(config: Mapping[str, Any]) -> str:
    if config["weights"] is None:
        return ""
    parts = [config["solver"], "correction" if config["correction"] else None, config["tuner"]]
    method = " + ".join(str(part) for part in parts if part)
    # Of a layer that cannot fail the plan says nothing else.
    answered = config["on_failure"] != "stop"
    return f"{method}, or {config['on_failure']}" if answered else method
