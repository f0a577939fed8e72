"""Codes and scales of a layer as a golden file keeps them: checksums, and the first numbers."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

_SHOWN = 12
_DIGITS = 4


def told(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, by_row: bool = False
) -> dict[str, Any]:
    """Codes and scales as JSON types.

    Args:
        codes: Whole numbers ``[rows, columns]``.
        scale: Scales ``[rows, groups]``.
        zero_point: Zero points like the scales, which are taken from the codes.
        by_row: Whether codes have a checksum a row, by which it is seen how many rows differ.

    Returns:
        ``codes`` and ``scales``, checksums of their bytes (int16, float32); ``first``, the first
        codes and scales of the first row.
    """
    points = codes.detach().to(torch.int16)
    if zero_point is not None:
        groups = zero_point.reshape(len(codes), -1).to(torch.int16)
        points = points - groups.repeat_interleave(codes.shape[1] // groups.shape[1], dim=1)
    scales = scale.detach().to(torch.float32).reshape(len(scale), -1)
    return {
        "codes": "".join(row[:_DIGITS] for row in map(checksum, points))
        if by_row
        else checksum(points),
        "scales": checksum(scales),
        "first": [points[0, :_SHOWN].tolist(), scales[0, :2].tolist()],
    }


def checksum(values: Tensor) -> str:
    """CRC-32 of a tensor's bytes, in eight digits."""
    return f"{zlib.crc32(values.contiguous().numpy().tobytes()):08x}"


def differing_rows(one: str, other: str, rows: int) -> int:
    """Number of rows whose checksums differ; all of them where a checksum is of the whole."""
    if len(one) != rows * _DIGITS or len(one) != len(other):
        return 0 if one == other else rows
    starts = range(0, len(one), _DIGITS)
    return sum(one[at : at + _DIGITS] != other[at : at + _DIGITS] for at in starts)
