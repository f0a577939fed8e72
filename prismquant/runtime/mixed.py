"""Mixed precision: linear layers multiply in bfloat16, all else stays in float32.

Processors with instructions for bfloat16 multiply it two to sixteen times as fast as float32, and
linear layers are where a forward pass spends its time. Their inputs and weights are rounded to 8
digits for the product, which is what a server does that runs the model in bfloat16; sums are formed
in float32, and norms, rotary embeddings, softmax, activation functions and the residual stream,
where rounding errors pile up from layer to layer, keep float32 (Micikevicius et al., "Mixed
Precision Training", arXiv 1710.03740, section 3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Wanted = torch.dtype | Literal["mixed"] | None

# What `torch.cpu.get_capabilities` calls the instructions that multiply bfloat16.
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16")


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

    def in_force(self) -> contextlib.AbstractContextManager[object]:
        """Within the block, linear layers multiply as this says."""
        return contextlib.nullcontext() if self.products is None else _Products(self.products)


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16."""
    told: Callable[[], Mapping[str, object]] = getattr(torch.cpu, "get_capabilities", dict)
    return any(told().get(name) for name in _INSTRUCTIONS)


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
        if func is functional.linear:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = functional.linear(input.to(self._dtype), weight.to(self._dtype)).to(input.dtype)
        return product if bias is None else product.add_(bias)
