"""Quantized layers that stand in a model for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from prismquant.formats.quantized_layer import QuantizedLayer, scale_and_zero_point
from prismquant.plan.plan import PlanRow
from prismquant.runtime.linear import ActivationQuantizer, QuantLinear


@dataclass(frozen=True, eq=False)
class ReplacedLayer:
    """A layer of a model, and what may stand in its place: dequantized weights, rounded inputs.

    Attributes:
        owner: The module that holds the layer.
        leaf: Its name there.
        before: The layer.
        weight: Its dequantized weight, in the shape and dtype of its own.
        linear: Stands in the place of a linear layer; None: the layer only gets another weight.
    """

    owner: nn.Module
    leaf: str
    before: nn.Module
    weight: nn.Parameter
    linear: QuantLinear | None

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block, it stands in the model."""
        if self.linear is None:
            own = self.before.get_parameter("weight")
            self.before.register_parameter("weight", self.weight)
            try:
                yield
            finally:
                self.before.register_parameter("weight", own)
            return
        setattr(self.owner, self.leaf, self.linear)
        try:
            yield
        finally:
            setattr(self.owner, self.leaf, self.before)


def replaced_layers(
    model: nn.Module, layers: Iterable[tuple[PlanRow, QuantizedLayer]], dtype: torch.dtype
) -> list[ReplacedLayer]:
    """Quantized layers, ready to stand in a model.

    Args:
        model: The model; the layers are loaded, and hold what they hold when these are in place.
        layers: What is to stand in their places.
        dtype: Of the arithmetic; what is stored dense is first rounded to its own.
    """
    return [_replaced(model, row, layer, dtype) for row, layer in layers]


@contextlib.contextmanager
def layers_in_place(layers: Iterable[ReplacedLayer]) -> Iterator[None]:
    """Within the block, all of these stand in their model."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.in_place())
        yield


def _replaced(
    model: nn.Module, row: PlanRow, layer: QuantizedLayer, dtype: torch.dtype
) -> ReplacedLayer:
    owner_name, _, leaf = row.site.name.rpartition(".")
    owner = model.get_submodule(owner_name)
    before = owner.get_submodule(leaf)
    own = before.get_parameter("weight")
    values = layer.values(row.site.dtype if row.stored_dense else dtype)
    values = values.to(own.device, own.dtype).reshape(own.shape)
    weight = nn.Parameter(values, requires_grad=False)
    if not isinstance(before, nn.Linear):
        return ReplacedLayer(owner, leaf, before, weight, None)
    linear = QuantLinear.from_linear(before)
    linear.weight = weight
    if row.config.activations is not None:
        scales = scale_and_zero_point(layer.input)
        quantizer = ActivationQuantizer(row.config.activations, *scales)
        linear.input_quantizer = quantizer.to(own.device)
    return ReplacedLayer(owner, leaf, before, weight, linear)
