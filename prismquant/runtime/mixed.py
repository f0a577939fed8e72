"""Mixed precision: linear layers multiply in bfloat16, all else stays in float32.

Processors with instructions for bfloat16 multiply it two to sixteen times as fast as float32, and
linear layers are where a forward pass spends its time. Their inputs and weights are rounded to 8
digits for the product, which is what a server does that runs the model in bfloat16; sums are formed
in float32, and norms, rotary embeddings, softmax and the residual stream, where rounding errors
pile up from layer to layer, keep float32 (Micikevicius et al., "Mixed Precision Training", arXiv
1710.03740, section 3). Attention stays too: its products are small, and where they were measured
bfloat16 brought no time. What flows between the layers of an MLP, the widest of all, is rounded for
the next product anyway, so it is held in bfloat16, which halves what waits for a solve.

A convolution whose kernel covers its whole input, as those that embed patches, is one product of
matrices and is made as one, which takes a third of the time; in float32, for pixels are no
activations. Products are taken some hundred rows at a time, so that rounded inputs and
results stay in the cache and take no new memory; what the rows are is not seen in the result.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from prismquant.kernels.instructions import multiplies_bfloat16

Wanted = torch.dtype | Literal["mixed"] | None

# Rows of a product at a time: enough that reading the weights anew costs little beside it.
_ROWS = 512
_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)


@dataclass(frozen=True)
class Precision:
    """In which dtypes blocks are run.

    Attributes:
        dtype: Of parameters and hidden states.
        products: In which linear layers multiply; None for that dtype.
    """

    dtype: torch.dtype = torch.float32
    products: torch.dtype | None = None

    @staticmethod
    def chosen(
        wanted: Wanted, device: torch.device, stored: torch.dtype, *, runs: bool = True
    ) -> Precision:
        """The one that is asked for, or the best for a device.

        Args:
            wanted: A dtype, ``mixed``, or None: on a CPU ``mixed`` where the checkpoint is stored
                in bfloat16 and the processor multiplies that natively, else float32; on other
                devices the checkpoint's dtype.
            device: Where blocks run.
            stored: The checkpoint's dtype.
            runs: Whether blocks are run at all; else there is no layer to multiply.
        """
        if isinstance(wanted, torch.dtype):
            return Precision(wanted)
        mixed = Precision(torch.float32, torch.bfloat16 if runs else None)
        if wanted == "mixed":
            return mixed
        if device.type != "cpu":
            return Precision(stored)
        return mixed if stored == torch.bfloat16 and multiplies_bfloat16() else Precision()

    def describe(self) -> str:
        """In words."""
        if self.products is None:
            return str(self.dtype)
        return f"{self.dtype}, linear layers in {self.products}"

    @contextlib.contextmanager
    def in_force(self, narrow: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Within the block, linear layers multiply as this says.

        Args:
            narrow: Modules of linear layers and what is between these: all that flows in them is
                held as products are. What they return has the dtype of what they are given.
        """
        if self.products is None:
            yield
            return
        for module in narrow:
            module.forward = functools.partial(_forward_in, self.products, module)
        try:
            with _Products(self.products):
                yield
        finally:
            for module in narrow:
                del module.forward


def _forward_in(dtype: torch.dtype, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A module's own forward, in a dtype but for gradients; tensors come and go in their own."""
    given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    forward = type(module).forward
    if given is None or torch.is_grad_enabled():
        return forward(module, *args, **kwargs)
    named = {name: _as(dtype, value) for name, value in kwargs.items()}
    return _as(given.dtype, forward(module, *(_as(dtype, value) for value in args), **named))


def _as(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class _Products(TorchFunctionMode):
    """Intercepts linear layers, whichever module calls them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func is functional.linear:
            return self._linear(*args, **given)
        if func in _CONVOLUTIONS and _covers_input(*args, **given):
            return self._convolution(*args, **given)
        return func(*args, **given)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or input.dtype == self._dtype:
            product = functional.linear(input.to(self._dtype), weight.to(self._dtype))
            product = product.to(input.dtype)
            return product if bias is None else product.add_(bias)
        return _linear_by_rows(input, weight.to(self._dtype), bias)

    def _convolution(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        output = functional.linear(input.flatten(1), weight.flatten(1), bias)
        return output.reshape(*output.shape, *(1 for _ in input.shape[2:]))


def _covers_input(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """True if a convolution multiplies each of its inputs once, with the kernel as a whole."""
    unpadded = padding == "valid" or not (isinstance(padding, str) or torch.tensor(padding).any())
    return unpadded and input.shape[1:] == weight.shape[1:] and input.dim() == weight.dim()


def _linear_by_rows(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer in the weight's dtype, bias and result in the input's; knows no gradient.

    Args:
        input: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
    """
    rows = input.reshape(-1, input.shape[-1])
    output = input.new_empty(len(rows), len(weight))
    most = min(_ROWS, len(rows))
    rounded, product = (weight.new_empty(most, width) for width in weight.shape[::-1])
    for start in range(0, len(rows), _ROWS):
        own = output[start : start + _ROWS]
        rounded[: len(own)].copy_(rows[start : start + _ROWS])
        torch.mm(rounded[: len(own)], weight.T, out=product[: len(own)])
        own.copy_(product[: len(own)])
        if bias is not None:
            own.add_(bias)
    return output.view(*input.shape[:-1], len(weight))
