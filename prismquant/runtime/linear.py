"""A quantized layer at run time: what is around its product, and the store its weight lies in.

On the way in, the input is rotated where the weight was, then quantized and dequantized, with a
static scale from calibration or a dynamic scale per token; single columns may stay in floating
point. The :class:`WeightStore` multiplies. The dense one holds exactly the values that the
checkpoint's codes stand for: simulating in floating point gives the accuracy of integer kernels,
which differ only in the order of summation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from prismquant.errors import FormatError
from prismquant.formats.spec import NumberSpec
from prismquant.numerics.affine import dynamic_scale_zero_point, simulate
from prismquant.numerics.scales import ScaleFormat


def straight_through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Round values, and let gradients pass as if nothing were rounded.

    Args:
        x: Any shape; nothing is done where it is empty.
        rounding: Gives values of the same shape and dtype.
    """
    if x.numel() == 0:
        return x
    with torch.no_grad():
        values = rounding(x)
    return x + (values - x).detach() if x.requires_grad else values


class ActivationQuantizer(nn.Module):
    """Quantizes and dequantizes a layer's input or output.

    Args:
        spec: Static (tensor) or dynamic (token, group).
        scale: [1] for static, None for dynamic. Where block scales are E4M3 and dynamic (NVFP4),
            the static global scale [1].
        zero_point: int8 [1] for static asymmetric, else None.
        columns: int64 [k], columns that pass in floating point and take no part in any scale.

    Raises:
        FormatError: The format needs a static scale that is not given, or has none.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    columns: Tensor | None

    def __init__(
        self,
        spec: NumberSpec,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> None:
        super().__init__()
        if (scale is not None) != spec.calibrated:
            have = "no static scale" if scale is None else "a static scale"
            raise FormatError(
                f"an activation in {spec.describe()} cannot have {have}",
                remedy="calibrate it" if scale is None else "use a static format",
            )
        self.spec = spec
        self.enabled = True
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("columns", columns)

    def forward(self, x: Tensor) -> Tensor:
        """Simulate the number format on ``x`` [..., features]; dtype and shape are kept.

        Gradients pass as if nothing were rounded.
        """
        return straight_through(x, self._simulated) if self.enabled else x

    def _simulated(self, x: Tensor) -> Tensor:
        if self.columns is None:
            return self._rounded(x)
        rest = self._rounded(x.index_fill(-1, self.columns, 0.0))
        return rest.index_copy_(-1, self.columns, x[..., self.columns])

    def _rounded(self, x: Tensor) -> Tensor:
        grid, granularity, size = self.spec.grid, self.spec.granularity, self.spec.group_size
        scale, zero_point = self.scale, self.zero_point
        if self.spec.dynamic:
            # As kernels do, which find a scale while they read 16-bit values.
            dtype = torch.promote_types(x.dtype, torch.float32)
            form = ScaleFormat(dtype, self.spec.scale, scale)
            scale, zero_point = dynamic_scale_zero_point(
                x, grid, self.spec.symmetric, granularity, size, form
            )
        if scale is None:  # what the constructor has ruled out
            raise FormatError(f"an activation in {self.spec.describe()} needs a static scale")
        return simulate(x, scale, zero_point, grid, granularity, size)


class WeightStore(Protocol):
    """A place where a layer's weight lies, and the product of inputs with it."""

    def product(self, layer: nn.Linear, input: Tensor) -> Tensor:
        """``input`` [..., in] times the weight of ``layer``, plus its bias: [..., out]."""


class DenseStore:
    """The weight as floating-point values, in the layer's own parameter."""

    def product(self, layer: nn.Linear, input: Tensor) -> Tensor:
        """The product in the dtype of the weight."""
        return functional.linear(input, layer.weight, layer.bias)


class QuantLinear(nn.Linear):
    """A linear layer whose weight came off a quantization grid and whose input may go through one.

    Being an ``nn.Linear``, it can stand wherever a model expects one.

    Attributes:
        store: Where its weight lies.
        input_rotation: What rotates its input, or None.
        input_quantizer, output_quantizer: What rounds its input and its output, or None.
    """

    store: WeightStore
    input_rotation: nn.Module | None
    input_quantizer: ActivationQuantizer | None
    output_quantizer: ActivationQuantizer | None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> QuantLinear:
        """Take over a layer's parameters (not copied), and what already is around it."""
        if isinstance(linear, cls):
            return linear
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight = linear.weight
        layer.bias = linear.bias
        layer.store = DenseStore()
        layer.input_rotation = None
        layer.input_quantizer = None
        layer.output_quantizer = None
        return layer.train(linear.training)

    def rotated(self, input: Tensor) -> Tensor:
        """The input as the quantizer, and the weight, see it."""
        if self.input_rotation is None:
            return input
        turned: Tensor = self.input_rotation(input)
        return turned

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., in] to [..., out]."""
        input = self.rotated(input)
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        output = self.store.product(self, input)
        return output if self.output_quantizer is None else self.output_quantizer(output)


def quant_linear(model: nn.Module, name: str) -> QuantLinear:
    """The layer called ``name`` as a :class:`QuantLinear`, put in its place in ``model``."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    layer = QuantLinear.from_linear(getattr(parent, child))
    setattr(parent, child, layer)
    return layer


def quantize_inputs(
    model: nn.Module,
    name: str,
    spec: NumberSpec,
    scale: Tensor | None,
    zero_point: Tensor | None,
    columns: Tensor | None = None,
) -> None:
    """Put an input quantizer before the linear layer called ``name`` in ``model``, in place."""
    layer = quant_linear(model, name)
    quantizer = ActivationQuantizer(spec, scale, zero_point, columns)
    layer.input_quantizer = quantizer.to(layer.weight.device)


def quantize_outputs(
    model: nn.Module, name: str, spec: NumberSpec, scale: Tensor | None, zero_point: Tensor | None
) -> None:
    """Put an output quantizer behind the linear layer called ``name`` in ``model``, in place."""
    layer = quant_linear(model, name)
    layer.output_quantizer = ActivationQuantizer(spec, scale, zero_point).to(layer.weight.device)


@contextlib.contextmanager
def switched_off(model: nn.Module, kind: type[nn.Module]) -> Iterator[None]:
    """Within the block, quantizers of a kind pass on what they are given.

    Args:
        model: Holds them.
        kind: Their class, which has an attribute ``enabled``.
    """
    quantizers: list[Any] = [m for m in model.modules() if isinstance(m, kind)]
    enabled = [quantizer for quantizer in quantizers if quantizer.enabled]
    for quantizer in enabled:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in enabled:
            quantizer.enabled = True


def activations_in_float(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within the block, inputs and outputs are not quantized."""
    return switched_off(model, ActivationQuantizer)
