"""The rotation of a layer's input at run time."""

from __future__ import annotations

from torch import Tensor, nn

from prismquant.numerics.hadamard import block_hadamard
from prismquant.runtime.linear import quant_linear


class InputRotation(nn.Module):
    """Rotates a layer's input by a block-diagonal Hadamard matrix, after flipping signs.

    Args:
        block: Width of a block, a power of two that divides the features.
        signs: int8 [features] of +1 and -1, or None.
    """

    signs: Tensor | None

    def __init__(self, block: int, signs: Tensor | None = None) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("signs", signs)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., features]; dtype and shape are kept."""
        if self.signs is not None:
            x = x * self.signs.to(x.dtype)
        return block_hadamard(x, self.block)


def rotate_inputs(model: nn.Module, name: str, block: int, signs: Tensor | None) -> None:
    """Put a rotation before the linear layer called ``name`` in ``model``, in place."""
    layer = quant_linear(model, name)
    layer.input_rotation = InputRotation(block, signs).to(layer.weight.device)
