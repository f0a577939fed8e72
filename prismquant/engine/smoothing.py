"""Moving scale along the edges of a step, in the modules that are loaded.

A transform says by how much; here the producer is divided and its consumers are multiplied, so
that the function stays as it is. A norm is stored in the checkpoint's dtype and not quantized: its
new values are rounded to that dtype first, and the consumers take what was really divided. Where a
norm multiplies by ``1 + w``, that is what is divided: ``w' = (1 + w) / s - 1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from prismquant.algorithms.smooth_edge import Consumer, EdgeProblem
from prismquant.models.arch import EdgeKind
from prismquant.models.bound import BoundEdge
from prismquant.plan.plan import PlanRow
from prismquant.statistics.channel_sizes import ChannelSizes

# Trials of a range search inside a search for scales: the ranking of scales needs no more.
_RANGE_STEPS = 20


def channel_of_column(edge: BoundEdge, in_features: int) -> Tensor:
    """Channel of the producer that feeds each column of the consumers, int64 ``[in]``."""
    columns = torch.arange(in_features)
    if edge.kind is not EdgeKind.VALUE:
        return columns % edge.size
    # Grouped heads: several query heads read one value head.
    width = edge.size // edge.kv_heads
    head, within = columns // width, columns % width
    return head // (edge.heads // edge.kv_heads) * width + within


def edge_problem(
    model: nn.Module,
    edge: BoundEdge,
    rows: Mapping[str, PlanRow],
    record: ChannelSizes,
    vision_weight: float,
) -> EdgeProblem:
    """The problem of one smooth edge, for a transform.

    Args:
        model: Its consumers must be loaded.
        edge: The edge.
        rows: Rows of the plan by the layer's name.
        record: What calibration saw of the consumers' input.
        vision_weight: What a vision token counts for.
    """
    consumers = []
    for name in edge.consumers:
        row, weight = rows[name], model.get_submodule(name).get_parameter("weight")
        rule = row.config.weight_range
        if rule.kind == "mse":
            rule = replace(rule, steps=min(rule.steps, _RANGE_STEPS))
        consumers.append(
            Consumer(name, weight.detach().to(torch.float32), row.config.weights, rule)
        )
    first = next(rows[name] for name in edge.consumers if rows[name].quantized)
    return EdgeProblem(
        name=edge.source,
        size=edge.size,
        columns=channel_of_column(edge, record.in_features).to(consumers[0].weight.device),
        consumers=tuple(consumers),
        activations=first.config.activations,
        activation_range=first.config.activation_range,
        scale_dtype=first.site.dtype,
        record=record,
        vision_weight=vision_weight,
    )


def move_scale(
    model: nn.Module, edge: BoundEdge, scale: Tensor, stored_dtype: torch.dtype
) -> list[str]:
    """Divide the producer by a scale and multiply its consumers by it, in place.

    Args:
        model: Both ends must be loaded.
        edge: The edge.
        scale: float32 ``[size]``, positive.
        stored_dtype: Of a norm in the checkpoint.

    Returns:
        Names of the tensors that changed.
    """
    upper = model.get_submodule(edge.source)
    rows = slice(edge.first_row, edge.first_row + edge.size)
    weight = upper.get_parameter("weight")
    scale = scale.to(weight.device, torch.float32)
    stored = None
    if edge.from_one:
        stored, scale = _divided_from_one(weight.float(), scale, stored_dtype)
    elif edge.norm is not None:
        stored = (weight[rows].float() / scale).to(stored_dtype).float()
        # Where the norm is zero nothing passes, and any scale is as good.
        moved = (weight[rows].float() / stored).isfinite() & (stored != 0)
        scale = torch.where(moved, weight[rows].float() / stored, scale)
    changed = []
    for leaf in ("weight", "bias"):
        parameter = getattr(upper, leaf, None)
        if parameter is None:
            continue
        parts = parameter.detach().clone()
        divisor = scale.reshape(-1, *[1] * (parts.ndim - 1))
        if leaf == "weight" and stored is not None:
            parts[rows] = stored.to(parts.dtype)
        else:
            parts[rows] = (parts[rows].float() / divisor).to(parts.dtype)
        setattr(upper, leaf, nn.Parameter(parts, requires_grad=False))
        changed.append(f"{edge.source}.{leaf}")
    for name in edge.readers:
        consumer = model.get_submodule(name)
        old = consumer.get_parameter("weight")
        columns = channel_of_column(edge, old.shape[1]).to(old.device)
        values = (old.float() * scale[columns]).to(old.dtype)
        consumer.weight = nn.Parameter(values, requires_grad=False)
        changed.append(f"{name}.weight")
    return changed


def _divided_from_one(
    weight: Tensor, scale: Tensor, stored_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The weight of a norm that multiplies by one plus it, divided; and by what it really was.

    Weights near -1 are coarse: none is stored as -1 itself, which would let nothing pass.

    Args:
        weight: float32 ``[size]``.
        scale: The scale that is wanted, float32 ``[size]``.
        stored_dtype: Of the norm in the checkpoint.
    """
    gain = 1 + weight
    stored = (gain / scale - 1).to(stored_dtype)
    closed = torch.full_like(stored, -1)
    beside = torch.where(gain < 0, closed.nextafter(closed - 1), closed.nextafter(closed + 1))
    stored = torch.where((stored == closed) & (gain != 0), beside, stored).float()
    return stored, torch.where(gain != 0, gain / (1 + stored), scale)
