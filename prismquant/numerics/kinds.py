"""The words of number formats: kinds of numbers and scales, and what shares one scale.

Without arithmetic, so that formats and recipes can be read where torch is not loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Literal, get_args

from prismquant.errors import FormatError

MIN_BITS = 2
MAX_BITS = 8

FloatKind = Literal["e4m3", "e5m2", "e3m2", "e2m3", "e2m1"]
FLOAT_KINDS: tuple[FloatKind, ...] = get_args(FloatKind)
# Width of a code.
FLOAT_BITS: Mapping[str, int] = MappingProxyType(
    {"e4m3": 8, "e5m2": 8, "e3m2": 6, "e2m3": 6, "e2m1": 4}
)

ScaleKind = Literal["float", "e8m0", "e8m0-floor", "e8m0-ceil", "e4m3"]
SCALE_KINDS: tuple[ScaleKind, ...] = get_args(ScaleKind)


class Granularity(StrEnum):
    """Values that share one scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"
    TOKEN = "token"
    BLOCK = "block"

    @property
    def grouped(self) -> bool:
        """Whether consecutive features share a scale, so that there is a group size."""
        return self in (Granularity.GROUP, Granularity.BLOCK)


def check_bits(bits: object) -> None:
    """Make sure that a number of bits is the width of an integer format.

    Raises:
        FormatError: It is not an integer from 2 to 8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise FormatError(
            f"the width of an integer format must be an integer, not {bits!r}",
            remedy=f"use {MIN_BITS} to {MAX_BITS} bits",
        )
    if not MIN_BITS <= bits <= MAX_BITS:
        raise FormatError(
            f"there is no integer format of {bits} bits",
            remedy=f"use {MIN_BITS} to {MAX_BITS} bits",
        )


def block_rows(rows: int, size: int) -> int:
    """Number of blocks of ``size`` rows that cover so many rows."""
    return -(-rows // size)


def check_group_size(features: int, group_size: int | None) -> int:
    """Make sure that groups tile the features exactly.

    Args:
        features: Length of the axis to be cut into groups.
        group_size: Features to a group.

    Returns:
        The group size.

    Raises:
        FormatError: It is missing, not positive, or does not divide ``features``; the error lists
            the sizes that would.
    """
    if group_size is None or group_size < 1:
        raise FormatError(
            f"groups and blocks need a positive group size, not {group_size}",
            remedy="give group_size, e.g. 128",
        )
    if features % group_size:
        legal = [str(d) for d in range(1, features + 1) if features % d == 0]
        raise FormatError(
            f"group size {group_size} does not divide {features} input features",
            remedy=f"use a divisor of {features} ({', '.join(legal)}) or channel granularity",
        )
    return group_size
