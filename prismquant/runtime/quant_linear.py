"""A quantized layer at run time: dequantized weights and, where asked, a quantized input.

The weight that a :class:`QuantLinear` multiplies with is exactly what the checkpoint stores,
dequantized. The input is quantized and dequantized on the way in, with a static scale from
calibration or a dynamic scale per token. Simulating this in floating point gives the accuracy of
integer kernels, which differ only in the order of summation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from prismquant.formats.spec import NumberSpec
from prismquant.numerics.affine import dynamic_scale_zero_point, simulate


class InputQuantizer(nn.Module):
    """Quantizes and dequantizes a layer's input.

    Args:
        spec: Static (tensor) or dynamic (token).
        scale: [1] for static, None for dynamic.
        zero_point: int8 [1] for static asymmetric, else None.
    """

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(
        self, spec: NumberSpec, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.enabled = True
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Simulate the number format on ``x`` [..., in]; dtype and shape are kept."""
        if not self.enabled or x.numel() == 0:
            return x
        grid, granularity = self.spec.grid, self.spec.granularity
        scale, zero_point = self.scale, self.zero_point
        if scale is None:
            scale, zero_point = dynamic_scale_zero_point(x, grid, self.spec.symmetric, granularity)
        return simulate(x, scale, zero_point, grid, granularity)


class QuantLinear(nn.Linear):
    """A linear layer whose weight came off a quantization grid and whose input may go through one.

    Being an ``nn.Linear``, it can stand wherever a model expects one.
    """

    input_quantizer: InputQuantizer | None

    @classmethod
    def from_linear(cls, linear: nn.Linear, input_quantizer: InputQuantizer | None) -> QuantLinear:
        """Take over a layer's parameters (not copied) and put a quantizer before it."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight = linear.weight
        layer.bias = linear.bias
        layer.input_quantizer = input_quantizer
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., in] to [..., out]."""
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        return functional.linear(input, self.weight, self.bias)


def quantize_inputs(
    model: nn.Module, name: str, spec: NumberSpec, scale: Tensor | None, zero_point: Tensor | None
) -> None:
    """Put an input quantizer before the linear layer called ``name`` in ``model``, in place."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    linear = getattr(parent, child)
    quantizer = InputQuantizer(spec, scale, zero_point).to(linear.weight.device)
    setattr(parent, child, QuantLinear.from_linear(linear, quantizer))


@contextlib.contextmanager
def inputs_in_float(model: nn.Module) -> Iterator[None]:
    """Within the block, inputs are not quantized."""
    quantizers = [m for m in model.modules() if isinstance(m, InputQuantizer) and m.enabled]
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enabled = True
