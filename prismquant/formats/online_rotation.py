"""Rotation of a layer's input at run time, as plan, engine, writer and reader know it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prismquant.numerics.hadamard import block_hadamard, random_signs


@dataclass(frozen=True)
class OnlineRotation:
    """Rotation of a layer's input at run time: ``block_hadamard(x * signs, block)``.

    Attributes:
        block: Width of the blocks.
        features: Features of the input.
        seed: Decides the signs; None where there are none, or the layer before has them in its
            weights.
    """

    block: int
    features: int
    seed: str | None = None

    @property
    def signs(self) -> Tensor | None:
        """int8 ``[in]`` of one and minus one; None: not applied at run time."""
        return None if self.seed is None else random_signs(self.features, self.seed)

    def apply(self, x: Tensor) -> Tensor:
        """The rotated input; ``[..., in]`` of any floating dtype."""
        signs = self.signs
        return block_hadamard(x if signs is None else x * signs.to(x), self.block)

    def stored_bytes(self, itemsize: int) -> int:
        """Bytes of the matrix, in a dtype of ``itemsize`` bytes, and of the signs."""
        signs = 0 if self.seed is None else self.features
        return self.block**2 * itemsize + signs
