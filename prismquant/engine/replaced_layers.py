"""Quantized layers that stand in a model for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from prismquant.formats.quantized_layer import QuantizedLayer, scale_and_zero_point
from prismquant.plan.plan import PlanRow
from prismquant.runtime.linear import ActivationQuantizer, QuantLinear


@contextlib.contextmanager
def layers_replaced(
    model: nn.Module, layers: Iterable[tuple[PlanRow, QuantizedLayer]], dtype: torch.dtype
) -> Iterator[None]:
    """Within the block, layers of a model are quantized, weights and inputs.

    Args:
        model: The model; the layers are loaded, and hold what they will hold again afterwards.
        layers: What stands in their places.
        dtype: Of the arithmetic; what is stored dense is first rounded to its own.
    """
    with contextlib.ExitStack() as stack:
        for row, layer in layers:
            stack.enter_context(_replaced(model, row, layer, dtype))
        yield


@contextlib.contextmanager
def _replaced(
    model: nn.Module, row: PlanRow, layer: QuantizedLayer, dtype: torch.dtype
) -> Iterator[None]:
    owner_name, _, leaf = row.site.name.rpartition(".")
    owner = model.get_submodule(owner_name)
    before = owner.get_submodule(leaf)
    weight = before.get_parameter("weight")
    values = layer.values(row.site.dtype if row.stored_dense else dtype)
    values = values.to(weight.device, weight.dtype).reshape(weight.shape)
    quantized = nn.Parameter(values, requires_grad=False)
    if not isinstance(before, nn.Linear):
        before.register_parameter("weight", quantized)
        try:
            yield
        finally:
            before.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        return
    linear = QuantLinear.from_linear(before)
    linear.weight = quantized
    if row.config.activations is not None:
        scales = scale_and_zero_point(layer.input)
        quantizer = ActivationQuantizer(row.config.activations, *scales)
        linear.input_quantizer = quantizer.to(weight.device)
    setattr(owner, leaf, linear)
    try:
        yield
    finally:
        setattr(owner, leaf, before)
