"""GGML's block types: 32 neighbouring weights of a row, their scale, and what else the type has.

====== ===== ==================================================== ==================
type   bytes layout                                               value
====== ===== ==================================================== ==================
Q4_0   18    d, 16 bytes                                          (u - 8) d
Q4_1   20    d, m, 16 bytes                                       u d + m
Q5_0   22    d, 4 bytes of high bits, 16 bytes                    (u - 16) d
Q5_1   24    d, m, 4 bytes of high bits, 16 bytes                 u d + m
Q8_0   34    d, 32 bytes                                          q d
MXFP4  17    exponent byte e, 16 bytes                            E2M1 2^(e - 127)
====== ===== ==================================================== ==================

``d`` and ``m`` are float16; byte ``j`` of the sixteen holds elements ``j`` (low) and ``j + 16``
(high nibble), bit ``i`` of the high bits belongs to element ``i``.

Nothing is rounded: a stored weight is ``(q - z) s`` with whole numbers ``q`` and ``z``, and any
type that holds ``q - z`` and ``s`` holds the weight. So a scale that spans more than one block is
repeated, narrow codes go into the next wider type, and asymmetric formats fit symmetric types that
are one bit wider, since ``q - z`` has one bit more than ``q``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.formats.spec import NumberSpec
from prismquant.numerics.kinds import Granularity

BLOCK = 32
Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, MXFP4 = "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"
BYTES: Mapping[str, int] = MappingProxyType(
    {Q4_0: 18, Q4_1: 20, Q5_0: 22, Q5_1: 24, Q8_0: 34, MXFP4: 17}
)
# Largest magnitude below zero of q - z that a symmetric type holds; above zero it is one less.
_REACH: Mapping[str, int] = MappingProxyType({Q4_0: 8, Q5_0: 16, Q8_0: 128})
# Types with a minimum, by the bits of the code.
_WITH_MINIMUM: Mapping[int, str] = MappingProxyType({4: Q4_1, 5: Q5_1})


def why_not(spec: NumberSpec, columns: int) -> str | None:
    """The reason why no block type can hold a format, or None if one can.

    Args:
        spec: The weight's format.
        columns: Input features.
    """
    if columns % BLOCK:
        return f"its input features must divide by {BLOCK}, the width of a block"
    if _is_mxfp4(spec):
        return None
    if spec.kind != "int" or spec.scale != "float":
        return f"no block type that is written here holds {spec.describe()}"
    if spec.granularity == Granularity.GROUP and (spec.group_size or 0) % BLOCK:
        return f"its groups of {spec.group_size} are no whole number of blocks of {BLOCK}"
    if spec.granularity not in (Granularity.GROUP, Granularity.CHANNEL, Granularity.TENSOR):
        return f"no block type holds {spec.granularity} scales"
    if not spec.symmetric and spec.bits == 8:
        return "differences of asymmetric 8-bit codes and zero points take nine bits"
    return None


def block_type(spec: NumberSpec, weight: Callable[[], QuantizedTensor]) -> str:
    """The smallest block type that holds a weight exactly.

    Args:
        spec: Its format, which :func:`why_not` finds nothing against.
        weight: Reads it; called only where its values decide.
    """
    if _is_mxfp4(spec):
        return MXFP4
    reach = (1 << spec.bits - 1) if spec.symmetric else 1 << spec.bits
    symmetric = next(name for name, own in _REACH.items() if own >= reach)
    smaller = _WITH_MINIMUM.get(spec.bits)
    if smaller is None or spec.symmetric or not _exact(_minimum(weight())):
        return symmetric
    return smaller


def pack(q: QuantizedTensor, name: str) -> Tensor:
    """A weight in blocks.

    Args:
        q: The weight, [out, in].
        name: Its type: what :func:`block_type` says of it.

    Returns:
        uint8 ``[out, in / 32 * bytes of a block]``.
    """
    rows, columns = q.shape
    shape = (rows, columns // BLOCK, BLOCK)
    if name == MXFP4:
        exponent = q.scale.view(torch.uint8).reshape(*shape[:2], 1)
        parts = [exponent, _nibbles(q.codes.view(torch.uint8).reshape(shape))]
    else:
        head = [_half(_by_block(q.scale.float(), shape))]
        if name in _REACH:
            values = q.codes.to(torch.int16).reshape(shape) - _zero(q, shape)
            unsigned = (values + _REACH[name]).to(torch.uint8)
            whole = values.to(torch.int8).view(torch.uint8)
        else:
            unsigned = (q.codes.reshape(shape).to(torch.int16) + (1 << q.spec.bits - 1)).byte()
            whole = unsigned
            head.append(_half(_by_block(_minimum(q), shape)))
        if name == Q8_0:
            parts = [*head, whole]
        elif name in (Q5_0, Q5_1):
            parts = [*head, _high_bits(unsigned), _nibbles(unsigned & 15)]
        else:
            parts = [*head, _nibbles(unsigned)]
    return torch.cat(parts, dim=-1).reshape(rows, -1)


def _is_mxfp4(spec: NumberSpec) -> bool:
    mx = spec.kind == "e2m1" and spec.scale not in ("float", "e4m3")
    return mx and spec.group_size == BLOCK


def _minimum(q: QuantizedTensor) -> Tensor:
    """float32, shaped like the scale: what code 0 of the unsigned code stands for."""
    zero = torch.zeros((), dtype=torch.int8) if q.zero_point is None else q.zero_point
    return -(zero.float() + (1 << q.spec.bits - 1)) * q.scale.float()


def _exact(x: Tensor) -> bool:
    return bool((x.half().float() == x).all())


def _zero(q: QuantizedTensor, shape: tuple[int, int, int]) -> Tensor | int:
    return 0 if q.zero_point is None else _by_block(q.zero_point.to(torch.int16), shape)


def _by_block(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """A parameter of a tensor, of rows or of groups, repeated for every block: [out, blocks, 1]."""
    rows, blocks, _ = shape
    x = x.reshape(rows, -1) if x.numel() > 1 else x.reshape(1, 1).expand(rows, 1)
    return x.repeat_interleave(blocks // x.shape[1], dim=1).unsqueeze(-1)


def _half(x: Tensor) -> Tensor:
    """[.., 1] -> the two bytes of its float16."""
    return x.half().contiguous().view(torch.uint8)


def _nibbles(unsigned: Tensor) -> Tensor:
    """Elements j and j + 16 share a byte."""
    half = BLOCK // 2
    return unsigned[..., :half] | (unsigned[..., half:] << 4)


def _high_bits(unsigned: Tensor) -> Tensor:
    """The fifth bit of each element, as four bytes, least significant first."""
    bits = (unsigned >> 4).reshape(*unsigned.shape[:-1], BLOCK // 8, 8)
    weights = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8)
    return (bits * weights).sum(dim=-1, dtype=torch.uint8)
