"""Integer grids: which codes a format of so many bits may use.

Codes are always signed, in ``[-2^(b-1), 2^(b-1) - 1]``; an asymmetric format shifts them by a zero
point instead of becoming unsigned, and only the bit layout on disk adds an offset.
"""

from __future__ import annotations

from dataclasses import dataclass

from prismquant.errors import FormatError

MIN_BITS = 2
MAX_BITS = 8


@dataclass(frozen=True)
class IntGrid:
    """The integer codes of a signed format.

    Attributes:
        bits: Width of a code, 2 to 8.
        narrow: Leave out the lowest code, so that the grid is symmetric about zero.

    Raises:
        FormatError: ``bits`` is not an integer from 2 to 8.
    """

    bits: int
    narrow: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise FormatError(
                f"the width of an integer format must be an integer, not {self.bits!r}",
                remedy=f"use {MIN_BITS} to {MAX_BITS} bits",
            )
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise FormatError(
                f"there is no integer format of {self.bits} bits",
                remedy=f"use {MIN_BITS} to {MAX_BITS} bits",
            )

    @property
    def qmin(self) -> int:
        """The lowest code."""
        return -(1 << (self.bits - 1)) + int(self.narrow)

    @property
    def qmax(self) -> int:
        """The highest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return self.qmax - self.qmin + 1
