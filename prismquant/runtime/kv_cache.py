"""A cache of keys and values at run time, as far as the numbers go.

A server rounds keys after the rotary embedding, and values as they leave their projection, when it
writes them to its cache, and reads only rounded ones. :class:`KVQuantizer` does that to a layer's
keys and values on their way into attention; :mod:`prismquant.models.attention` puts it there.
Scales are static, so a key is rounded to the same number whenever it is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prismquant.errors import FormatError
from prismquant.formats.kv_formats import KVCacheSpec
from prismquant.numerics.affine import simulate
from prismquant.numerics.hadamard import block_hadamard, power_of_two_block
from prismquant.numerics.kinds import Granularity
from prismquant.runtime.linear import straight_through, switched_off


class KVHook(nn.Module):
    """Stands before attention: is given keys and values, and says which ones attention sees."""

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Both ``[batch, kv_heads, tokens, head_dim]``; hands them on as they are."""
        return key, value


class KVWatch(KVHook):
    """Shows keys and values to somebody.

    Args:
        see: Is given both, as :meth:`forward` gets them.
    """

    def __init__(self, see: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Show them and hand them on."""
        self._see(key, value)
        return key, value


class KVQuantizer(KVHook):
    """Quantizes and dequantizes a layer's keys and values.

    Args:
        spec: The numbers.
        k_scale: Scale of the keys: [1], or [kv_heads, 1, 1] for a scale per head.
        v_scale: Scale of the values, alike.

    Raises:
        FormatError: A scale has another shape, or is not positive and finite.
    """

    k_scale: Tensor
    v_scale: Tensor

    def __init__(self, spec: KVCacheSpec, k_scale: Tensor, v_scale: Tensor) -> None:
        super().__init__()
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if tuple(scale.shape) != spec.scale_shape(scale.numel()):
                raise FormatError(
                    f"{name} of a {spec.name} cache cannot have shape {list(scale.shape)}",
                    remedy="[1] for one scale, [kv_heads, 1, 1] for a scale per head",
                )
            if not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise FormatError(f"{name} of a key-value cache must be positive and finite")
        self.spec = spec
        self.enabled = True
        self.register_buffer("k_scale", k_scale)
        self.register_buffer("v_scale", v_scale)

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Simulate the cache on ``[batch, kv_heads, tokens, head_dim]``; dtypes are kept.

        Gradients pass as if nothing were rounded.
        """
        if not self.enabled:
            return key, value
        value = self._rounded(value, self.v_scale)
        if not self.spec.rotated:
            return self._rounded(key, self.k_scale), value
        # Rotating back what was rounded is to products what rotating the queries would be.
        return rotated(self._rounded(rotated(key), self.k_scale)), value

    def _rounded(self, x: Tensor, scale: Tensor) -> Tensor:
        return straight_through(x, lambda values: self._simulated(values, scale))

    def _simulated(self, x: Tensor, scale: Tensor) -> Tensor:
        if not self.spec.per_head:
            return simulate(x, scale, None, self.spec.grid, Granularity.TENSOR)
        by_head = x.transpose(0, 1)
        rows = by_head.reshape(len(scale), -1)
        rounded = simulate(rows, scale.reshape(-1, 1), None, self.spec.grid, Granularity.CHANNEL)
        return rounded.reshape(by_head.shape).transpose(0, 1)


def rotated(key: Tensor) -> Tensor:
    """Keys, or queries, times a Hadamard matrix of the head's width; twice is the identity.

    Where the width is no power of two, in blocks of the largest power of two that divides it.

    Args:
        key: ``[..., head_dim]``.
    """
    return block_hadamard(key, power_of_two_block(key.shape[-1]))


def cache_in_float(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within the block, keys and values are not quantized."""
    return switched_off(model, KVQuantizer)
