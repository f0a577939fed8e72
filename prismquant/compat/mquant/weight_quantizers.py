"""Quantizers of weights, as MQuant's functions return them: numbers by which codes are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prismquant.compat.mquant.families import Family
from prismquant.errors import FormatError
from prismquant.formats.quantized_layer import QuantizedLayer, QuantizedTensor
from prismquant.numerics.kinds import Granularity
from prismquant.plan.plan import Plan


@dataclass(frozen=True, eq=False)
class WeightQuantizer:
    """The grid of one layer's weight.

    A weight is ``scale * (code - zero)``, with codes from ``-maxq - 1`` to ``maxq`` where it is
    symmetric, and from 0 to ``maxq`` where it is not.

    Attributes:
        bits: Width of a code.
        sym: Whether zero is code 0.
        perchannel: Whether each row has scales of its own: it has, always.
        groupsize: Columns that share a scale; -1: all of a row. GPTQ there keeps the scale of the
            last group alone.
        scale: float32 ``[out, G]``, on the CPU; of a convolution ``[out, 1, ..]``, so that it
            broadcasts over the weight.
        zero: float32, of the same shape: zero points counted from 0, or zeros.
        maxq: int64 ``[]``.
        group_index: int64 ``[in]``, the group of each column; None where neighbours share one.
    """

    bits: int
    sym: bool
    perchannel: bool
    groupsize: int
    scale: Tensor
    zero: Tensor
    maxq: Tensor
    group_index: Tensor | None = None

    @classmethod
    def of(cls, layer: QuantizedLayer, axes: int) -> WeightQuantizer:
        """The quantizer of a layer that was just solved.

        Args:
            layer: The layer.
            axes: Number of axes of its module's weight.

        Raises:
            FormatError: Its codes are not at hand.
        """
        weight = layer.weight
        if not isinstance(weight, QuantizedTensor):
            raise FormatError("the layer's codes are not at hand", where=layer.name)
        spec = weight.spec
        scale = weight.scale.detach().cpu().float()
        zero = torch.zeros_like(scale)
        if weight.zero_point is not None:
            zero = weight.zero_point.cpu().float() + (1 << (spec.bits - 1))
        grouped = spec.granularity == Granularity.GROUP
        if axes > 2 and not grouped:
            scale, zero = (one.reshape(-1, *[1] * (axes - 1)) for one in (scale, zero))
        most = (1 << spec.bits) - 1 if weight.zero_point is not None else (1 << spec.bits - 1) - 1
        return cls(
            bits=spec.bits,
            sym=spec.symmetric,
            perchannel=True,
            groupsize=spec.group_size or -1,
            scale=scale,
            zero=zero,
            maxq=torch.tensor(most),
            group_index=None if weight.group_index is None else weight.group_index.cpu(),
        )


def by_key(
    found: Mapping[str, WeightQuantizer], plan: Plan, family: Family
) -> dict[str, WeightQuantizer]:
    """Quantizers by the keys that MQuant gives them, in the order of the model's layers.

    Args:
        found: By the layer's module path.
        plan: What was done.
        family: Of the model.
    """
    return {
        family.key(row.site.name, split=row.outliers is not None): found[row.site.name]
        for row in plan.quantized
    }
