"""The plan, or what will be done, row by row: a recipe laid over a model.

Everything that can be known without weights is decided here, before any long work: the number
format of every layer, how its codes are chosen, in which layout it is stored, and how many bytes
it takes. A plan is a value: it is written to plan.json, read back, and compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from prismquant.algorithms.rotation import RotatedTower
from prismquant.errors import StorageError
from prismquant.formats.online_rotation import OnlineRotation
from prismquant.formats.packed import is_declarable
from prismquant.models.bound import BoundEdge, BoundSite
from prismquant.plan.bit_layout import DENSE
from prismquant.plan.codec import from_json, to_json
from prismquant.plan.kv_plan import KVPlan
from prismquant.plan.plan_version import PLAN_VERSION
from prismquant.recipe.layer_config import LayerConfig, Options
from prismquant.recipe.schema import Calibration

# Sums over the rows, which are written for readers.
_SUMS = ("totals", "total_bytes", "float_bytes")


@dataclass(frozen=True)
class OutlierRoom:
    """Room for columns of a layer's input that stay in floating point.

    Attributes:
        columns: So many at most.
        transform: The method that finds them.
        options: Its options.
    """

    columns: int
    transform: str
    options: Options


@dataclass(frozen=True)
class PlanRow:
    """One layer and what happens to it.

    Attributes:
        site: The layer.
        config: What is done to it.
        online: What happens to its input before anything else; None: nothing.
        outliers: Room for input columns that stay in floating point; None: all are quantized.
        layout: ``pack-quantized``, ``int-quantized``, or ``dense`` (floating point on disk).
        stored_bytes: Bytes that the weight, its scales and zero points take on disk.
        float_bytes: Bytes that the weight takes in the source.
        note: Why it is left alone, or what differs from the recipe's words.
    """

    site: BoundSite
    config: LayerConfig
    online: OnlineRotation | None
    outliers: OutlierRoom | None
    layout: str
    stored_bytes: int
    float_bytes: int
    note: str

    @property
    def quantized(self) -> bool:
        """Whether the layer is changed at all."""
        return self.config.weights is not None

    @property
    def observed(self) -> bool:
        """Whether its input or output is looked at, whatever chooses its codes."""
        return self.config.static_input or self.config.static_output or self.outliers is not None

    @property
    def needs_data(self) -> bool:
        """Whether calibration samples must pass this layer."""
        if not self.quantized:
            return False
        return self.observed or self.config.needs_float_chain or self.config.needs_hessian

    @property
    def needs_tokens(self) -> bool:
        """Whether it cannot be done at all if no calibration token reaches it."""
        config = self.config
        falls_back = config.on_failure == "rtn" and not self.observed and config.tuner is None
        return self.needs_data and not falls_back

    @property
    def stored_dense(self) -> bool:
        """Whether the weight is stored dequantized."""
        return self.layout == DENSE

    @property
    def private_activations(self) -> bool:
        """Whether inputs or outputs are quantized in a way that no checkpoint format declares."""
        activations = [spec for spec in self.config.sides if spec is not None]
        return any(self.stored_dense or not is_declarable(spec) for spec in activations)


@dataclass(frozen=True)
class PlanEdge:
    """Scale that is moved between a norm or producer and the layers that read it.

    Attributes:
        edge: The smooth edge.
        transform: The method that chooses the scale.
        options: Its options.
    """

    edge: BoundEdge
    transform: str
    options: Options


@dataclass(frozen=True)
class Plan:
    """One row per layer, in the order of the work.

    Attributes:
        recipe: Name of the recipe.
        architecture: Name of the architecture.
        rows: The layers.
        left_alone: Parameters that no site claims, each with the reason.
        other_bytes: Bytes of all tensors that are no layer's weight: embeddings, norms, biases.
        calibration: How statistics are gathered.
        towers: Towers that are rotated, each with how.
        edges: Along which edges scale is moved, in the order of the work.
        kv_cache: What happens to the language model's keys and values; None: nothing.
        remarks: What a user should know: formats that fell back, who cannot load it, and why.
    """

    recipe: str
    architecture: str
    rows: tuple[PlanRow, ...]
    left_alone: tuple[tuple[str, str], ...]
    other_bytes: int
    calibration: Calibration
    towers: tuple[RotatedTower, ...] = ()
    edges: tuple[PlanEdge, ...] = ()
    kv_cache: KVPlan | None = None
    remarks: tuple[str, ...] = ()

    @cached_property
    def quantized(self) -> tuple[PlanRow, ...]:
        """The rows that change something."""
        return tuple(row for row in self.rows if row.quantized)

    @cached_property
    def needs_data(self) -> bool:
        """Whether calibration samples are needed."""
        beside = bool(self.edges) or self.kv_cache is not None
        return beside or any(row.needs_data for row in self.quantized)

    @cached_property
    def needs_float_chain(self) -> bool:
        """Whether the float model's states are needed beside those of the quantized one."""
        return any(row.config.needs_float_chain for row in self.quantized)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors on disk afterwards, without file headers."""
        scales = 0 if self.kv_cache is None else self.kv_cache.stored_bytes
        return self.other_bytes + scales + sum(row.stored_bytes for row in self.rows)

    @property
    def float_bytes(self) -> int:
        """Bytes of all tensors in the source."""
        return self.other_bytes + sum(row.float_bytes for row in self.rows)

    def totals(self) -> dict[str, dict[str, int]]:
        """Per modality: layers, quantized layers, bytes before and after."""
        totals: dict[str, dict[str, int]] = {}
        for row in self.rows:
            entry = totals.setdefault(
                str(row.site.modality),
                {"layers": 0, "quantized": 0, "float_bytes": 0, "stored_bytes": 0},
            )
            entry["layers"] += 1
            entry["quantized"] += row.quantized
            entry["float_bytes"] += row.float_bytes
            entry["stored_bytes"] += row.stored_bytes
        return totals

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with the version of their form and the sums over all rows."""
        sums = (self.totals(), self.total_bytes, self.float_bytes)
        return {
            "version": PLAN_VERSION,
            **to_json(self),
            **dict(zip(_SUMS, sums, strict=True)),
        }

    @classmethod
    def from_dict(cls, content: Any) -> Plan:
        """Read back what :meth:`to_dict` gave.

        Raises:
            StorageError: The content was written by another version or is damaged; says where.
        """
        version = content.get("version") if isinstance(content, Mapping) else None
        if version != PLAN_VERSION:
            raise StorageError(f"plan of version {version!r} cannot be read")
        own = {name: value for name, value in content.items() if name not in ("version", *_SUMS)}
        plan = from_json(cls, own, "plan")
        summed = plan.to_dict()
        for name in _SUMS:
            if content.get(name) != summed[name]:
                raise StorageError(f"the plan is damaged: {name} is not the sum of its rows")
        return plan

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the result except weights and data.

        Names, notes and remarks do not enter, which decide nothing.
        """
        rows = tuple(replace(row, note="") for row in self.rows)
        decisive = replace(self, recipe="", rows=rows, remarks=())
        return hashlib.sha256(json.dumps(to_json(decisive), sort_keys=True).encode()).hexdigest()


def problem_groups(rows: Sequence[PlanRow]) -> list[list[PlanRow]]:
    """Rows of one stage that read the same input and are quantized alike, to be solved together.

    What happens to their outputs, and to the whole block afterwards, has no part in it.
    """
    groups: dict[object, list[PlanRow]] = {}
    for row in rows:
        solved = replace(row.config, outputs=None, tuner=None, tuner_options=Options())
        key = (row.site.input_key, row.site.dtype, solved, row.outliers)
        groups.setdefault(key, []).append(row)
    return list(groups.values())
