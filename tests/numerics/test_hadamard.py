"""Hadamard and orthogonal matrices are what they claim, and spread what sits in one channel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prismquant.errors import NumericsError
from prismquant.numerics.hadamard import (
    KINDS,
    block_hadamard,
    hadamard_matrix,
    known_order,
    orthogonal,
    orthogonal_matrix,
    power_of_two_block,
    random_signs,
)

# Sylvester; Paley I for a prime and a prime power (27); Paley II for a prime and a prime power (9,
# 25); a product of two of Paley's.
ORDERS = [1, 2, 4, 64, 12, 20, 28, 36, 52, 56, 100, 144, 148, 400]
# Widths of released models, and orders without any Hadamard matrix.
WIDTHS = [1, 2, 3, 6, 15, 72, 80, 92, 128, 184, 1152, 1280]


# ------------------------------------------------------------------------------ Hadamard matrices


@pytest.mark.parametrize("n", ORDERS)
def test_a_hadamard_matrix_has_orthogonal_rows_of_signs(n: int):
    matrix = hadamard_matrix(n)
    assert matrix.dtype == torch.float64
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.mT, n * torch.eye(n, dtype=torch.float64))


def test_powers_of_two_are_symmetric_and_begin_with_ones():
    for n in (2, 8, 64):
        matrix = hadamard_matrix(n)
        assert torch.equal(matrix, matrix.mT)
        assert matrix[0].eq(1).all()


def test_the_orders_that_are_known_are_those_that_are_documented():
    multiples = range(4, 1001, 4)
    missing = [n for n in multiples if not known_order(n)]
    assert len(missing) == 55
    assert missing[:3] == [92, 116, 156]
    # hidden sizes and MLP widths of Qwen's and SigLIP's models
    sizes = (1024, 1152, 1280, 1536, 2048, 2560, 3584, 4096, 5120, 8192, 11008, 18944, 29568, 128)
    assert all(known_order(n) for n in sizes)


@pytest.mark.parametrize("n", [0, -4, 3, 6, 10, 92])
def test_an_order_without_a_construction_is_refused(n: int):
    assert not known_order(n)
    with pytest.raises(NumericsError, match=f"order {n} can be constructed"):
        hadamard_matrix(n)


# ---------------------------------------------------------------------------- orthogonal matrices


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("fix_ones", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_width_has_an_orthogonal_matrix(n: int, fix_ones: bool, kind):
    if kind == "random" and n > 200:
        n = 200 + n % 8  # a dense one takes seconds to build
    matrix = orthogonal_matrix(n, 3, kind=kind, fix_ones=fix_ones)
    one = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.mT, one, rtol=0, atol=1e-12)
    if fix_ones:
        ones = torch.ones(n, dtype=torch.float64)
        torch.testing.assert_close(matrix @ ones, ones, rtol=0, atol=1e-12)
        torch.testing.assert_close(ones @ matrix, ones, rtol=0, atol=1e-12)


def test_a_matrix_that_fixes_ones_commutes_with_layer_norm():
    """Also behind a concatenation of several rotated pieces, which one norm then covers."""
    x = torch.randn(5, 4 * 72, dtype=torch.float64)
    matrix = orthogonal_matrix(72, 1, fix_ones=True)
    for big in (matrix, torch.kron(torch.eye(4, dtype=torch.float64), matrix)):
        piece = x[:, : len(big)]
        shape = (len(big),)
        after = torch.nn.functional.layer_norm(piece @ big, shape)
        before = torch.nn.functional.layer_norm(piece, shape) @ big
        torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 12, 92, 128, 1280])
@pytest.mark.parametrize("fix_ones", [False, True])
def test_the_quick_product_is_the_product_with_the_matrix(n: int, fix_ones: bool):
    quick = orthogonal(n, "a", fix_ones=fix_ones)
    x = torch.randn(3, 2, n, dtype=torch.float64)
    torch.testing.assert_close(quick.rotate(x), x @ quick.dense(), rtol=0, atol=1e-12)
    assert quick.order == n


@pytest.mark.parametrize("n", [128, 1152, 1280])
def test_a_single_channel_is_spread_over_all(n: int):
    """Exactly evenly by a Hadamard matrix; within a small factor when ones are fixed."""
    plain = orthogonal_matrix(n, 0).abs() * math.sqrt(n)
    torch.testing.assert_close(plain, torch.ones_like(plain), rtol=0, atol=1e-12)
    fixed = orthogonal_matrix(n, 0, fix_ones=True).abs() * math.sqrt(n)
    assert fixed.max() < 3


def test_without_signs_the_mean_goes_into_one_channel():
    ones = torch.ones(64, dtype=torch.float64)
    piled = ones @ orthogonal_matrix(64, 0, signs=False)
    assert piled[0] == pytest.approx(8.0)
    assert (ones @ orthogonal_matrix(64, 0)).abs().max() < 4.5


def test_a_seed_decides_everything():
    for kind in KINDS:
        first = orthogonal_matrix(24, 5, kind=kind)
        assert torch.equal(first, orthogonal_matrix(24, 5, kind=kind))
        assert not torch.equal(first, orthogonal_matrix(24, 6, kind=kind))
    state = torch.get_rng_state()
    orthogonal_matrix(24, 5, kind="random")
    assert torch.equal(state, torch.get_rng_state())


def test_random_signs_are_the_same_everywhere():
    """Served models draw them again, so that these bits must never change."""
    expected = [1, -1, 1, -1, 1, 1, 1, -1, -1, 1, -1, -1, -1, 1, -1, 1]
    assert random_signs(16, "0:a").tolist() == expected
    signs = random_signs(4001, 7)
    assert signs.dtype == torch.int8
    assert signs.abs().eq(1).all()
    assert abs(signs.sum().item()) < 300
    assert torch.equal(signs[:100], random_signs(100, 7))


def test_impossible_matrices_are_refused():
    with pytest.raises(NumericsError, match="cannot have order 0"):
        orthogonal_matrix(0, 1)
    with pytest.raises(NumericsError, match="unknown kind of rotation 'hadamrd'") as caught:
        orthogonal_matrix(4, 1, kind="hadamrd")  # type: ignore[arg-type]
    assert "hadamard" in str(caught.value)


# ------------------------------------------------------------------------------- block Hadamard


@given(n=st.integers(1, 10_000))
def test_the_block_is_the_largest_power_of_two_that_divides(n: int):
    block = power_of_two_block(n)
    assert n % block == 0
    assert n % (2 * block)
    assert block & (block - 1) == 0


@given(exponent=st.integers(0, 8), blocks=st.integers(1, 3), rows=st.integers(0, 3))
def test_blocks_equal_the_matrix_and_undo_themselves(exponent: int, blocks: int, rows: int):
    block = 2**exponent
    x = torch.randn(rows, 2, blocks * block, dtype=torch.float64)
    one = torch.eye(blocks, dtype=torch.float64)
    matrix = torch.kron(one, hadamard_matrix(block)) / math.sqrt(block)
    result = block_hadamard(x, block)
    torch.testing.assert_close(result, x @ matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(block_hadamard(result, block), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_computed_in_float32(dtype: torch.dtype):
    """The only error is the rounding of the result."""
    x = torch.randn(4, 4096).to(dtype)
    result = block_hadamard(x, 4096)
    assert result.dtype == dtype
    assert torch.equal(result, block_hadamard(x.float(), 4096).to(dtype))


def test_gradients_pass_through():
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: block_hadamard(y, 8), (x,))


def test_input_that_is_not_contiguous_is_fine():
    x = torch.randn(64, 5, dtype=torch.float64)
    assert torch.equal(block_hadamard(x.mT, 64), block_hadamard(x.mT.contiguous(), 64))


@pytest.mark.parametrize("block", [0, -2, 3, 24, 16])
def test_blocks_that_do_not_fit_are_refused(block: int):
    with pytest.raises(NumericsError, match=f"blocks of {block}"):
        block_hadamard(torch.zeros(2, 24), block)
    with pytest.raises(NumericsError, match="divides 0"):
        power_of_two_block(0)
