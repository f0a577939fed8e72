"""Integer grids."""

from __future__ import annotations

import pytest

from prismquant.errors import FormatError
from prismquant.numerics.grids import IntGrid


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_full_grid_is_two_s_complement(bits: int) -> None:
    grid = IntGrid(bits)
    assert (grid.qmin, grid.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert grid.levels == 2**bits


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_narrow_grid_is_symmetric_about_zero(bits: int) -> None:
    grid = IntGrid(bits, narrow=True)
    assert grid.qmin == -grid.qmax
    assert grid.levels == 2**bits - 1


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_other_widths_are_refused_with_the_legal_ones(bits: int) -> None:
    with pytest.raises(FormatError, match=rf"{bits} bits[\s\S]*2 to 8"):
        IntGrid(bits)


@pytest.mark.parametrize("bits", [4.0, "4", True, None])
def test_a_width_must_be_an_integer(bits: object) -> None:
    with pytest.raises(FormatError, match="must be an integer"):
        IntGrid(bits)  # type: ignore[arg-type]


def test_equal_grids_are_equal_and_frozen() -> None:
    assert IntGrid(4) == IntGrid(4, narrow=False)
    assert hash(IntGrid(4)) == hash(IntGrid(4))
    with pytest.raises(AttributeError):
        IntGrid(4).bits = 8  # type: ignore[misc]
