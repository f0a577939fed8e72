"""Factorizations from the last column on: exact, in the order asked for, honest about failure."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prismquant.algorithms.gptq import cholesky
from prismquant.algorithms.gptq.cholesky import (
    blocks,
    can_round,
    factorize_in_place,
    factorize_smallest_last,
)
from prismquant.kernels import pivots
from prismquant.kernels.dispatch import imported

# Whether pivots are picked by the compiled loop.
COMPILED = [
    False,
    pytest.param(
        True,
        marks=pytest.mark.skipif(
            importlib.util.find_spec("numba") is None, reason="the package numba is not installed"
        ),
    ),
]
needs_rounding = pytest.mark.skipif(
    not can_round(torch.zeros(1, 1)), reason="this processor does not multiply bfloat16"
)
# One column, less than a block, blocks with and without a rest.
SIZES = [1, 2, 7, 256, 257, 600, 1030]


def moments(features: int, seed: int = 0, noise: float = 0.3) -> Tensor:
    """Second moments of features that correlate and differ in size, float64, damped."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rank = max(1, features // 4)
    x = normal(2 * features, rank) @ normal(rank, features) / math.sqrt(rank)
    x = (x + noise * normal(2 * features, features)) * torch.exp(0.5 * normal(features))
    matrix = x.T @ x / len(x)
    return matrix + 0.1 * torch.diag(matrix.diagonal())


def lower_alone(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that holds nothing above the diagonal but what would spoil a result."""
    above = torch.ones_like(matrix).triu(1) > 0
    return matrix.to(dtype, copy=True).masked_fill_(above, math.nan)


def bits_above(matrix: Tensor) -> Tensor:
    """What is above the diagonal, as integers: NaN equals itself, and zeros have their sign."""
    rows, columns = torch.triu_indices(*matrix.shape, offset=1)
    return matrix[rows, columns].view(torch.int32 if matrix.element_size() == 4 else torch.int64)


def root_of(lines: Tensor) -> Tensor:
    """The upper triangular factor, float64."""
    return lines.double().tril().T


def smallest_last(matrix: Tensor) -> list[int]:
    """The order by definition: eliminate the column with the smallest pivot, and go on."""
    rest, late = matrix.clone(), []
    for _ in range(len(matrix)):
        free = rest.diagonal().clone()
        free[late] = math.inf
        pick = int(free.argmin())
        rest = rest - torch.outer(rest[pick], rest[pick]) / rest[pick, pick]
        late.append(pick)
    return late[::-1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("features", SIZES)
def test_the_lines_are_the_columns_of_an_upper_triangular_root(features, dtype, tolerance):
    matrix = moments(features)
    lines = lower_alone(matrix, dtype)
    assert factorize_in_place(lines)
    root = root_of(lines)
    assert float((root @ root.T - matrix).abs().max()) < tolerance * float(matrix.max())
    assert bool((lines.diagonal() > 0).all())


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("features", SIZES)
def test_with_pivots_they_are_those_of_the_ordered_matrix(
    features, dtype, tolerance, compiled, monkeypatch
):
    monkeypatch.setattr(pivots, "supports", lambda device: compiled)
    matrix = moments(features)
    lines = lower_alone(matrix, dtype)
    order = factorize_smallest_last(lines)
    assert sorted(order.tolist()) == list(range(features))
    root, ordered = root_of(lines), matrix[order][:, order]
    assert float((root @ root.T - ordered).abs().max()) < tolerance * float(matrix.max())


def moments_about_a_mean(features: int, seed: int) -> Tensor:
    """Second moments of inputs whose mean is far larger than how they differ, float64, damped."""
    matrix = moments(features, seed) + 5000 * moments(features, seed).diagonal().mean()
    return matrix + 0.1 * torch.diag(matrix.diagonal())


def pivot_errors(lines: Tensor, exact: Tensor) -> Tensor:
    """Of the squared diagonal, relative to that of an exact root."""
    return (lines.double().diagonal().square() / exact.diagonal().square() - 1).abs()


@needs_rounding
@pytest.mark.parametrize("make", [moments, moments_about_a_mean])
@pytest.mark.parametrize("features", SIZES)
def test_rounded_products_leave_pivots_good_to_a_thousandth_or_so(features, make):
    matrix = make(features, 3)
    plain = lower_alone(matrix, torch.float32)
    assert factorize_in_place(plain, rounded=True)
    order = factorize_smallest_last(lines := lower_alone(matrix, torch.float32), rounded=True)
    for found, ordered in ((plain, matrix), (lines, matrix[order][:, order])):
        exact = torch.linalg.cholesky(ordered.flip(0, 1)).flip(0, 1)
        errors = pivot_errors(found, exact)
        assert float(errors.mean()) < 1e-3
        assert float(errors.max()) < 3e-2
        # Each line of factors as a whole.
        assert float(((root_of(found) - exact).norm(dim=0) / exact.norm(dim=0)).max()) < 2e-2


@needs_rounding
def test_without_the_rule_for_heavy_lines_a_mean_would_drown_the_rest(monkeypatch):
    """So the test above would notice."""
    matrix = moments_about_a_mean(600, 3)
    monkeypatch.setattr(cholesky, "_HEAVY", math.inf)
    assert factorize_smallest_last(lower_alone(matrix, torch.float32), rounded=True) is None


@needs_rounding
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_next_to_nothing_of_a_rounded_factorization(threads):
    matrix = moments(1030, 5)
    expected = lower_alone(matrix, torch.float32)
    order = factorize_smallest_last(expected, rounded=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = lower_alone(matrix, torch.float32)
        assert torch.equal(factorize_smallest_last(found, rounded=True), order)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found.tril(), expected.tril(), rtol=1e-4, atol=1e-5)


def test_only_float32_is_rounded():
    matrix = moments(300)
    lines, rounded = lower_alone(matrix, torch.float64), lower_alone(matrix, torch.float64)
    assert factorize_smallest_last(lines).equal(factorize_smallest_last(rounded, rounded=True))
    assert torch.equal(lines.tril(), rounded.tril())


@pytest.mark.parametrize("compiled", COMPILED)
@settings(max_examples=25)
@given(features=st.integers(1, 60), seed=st.integers(0, 1000), block=st.integers(1, 70))
def test_pivots_come_in_the_order_of_their_definition_whatever_the_block(
    compiled, features, seed, block
):
    matrix = moments(features, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pivots, "supports", lambda device: compiled)
        patch.setattr(cholesky, "_PIVOT_BLOCK", block)
        patch.setattr(cholesky, "_PANEL", block + 3)
        patch.setattr(cholesky, "_TIP", block // 2 + 1)
        lines = lower_alone(matrix, torch.float64)
        order = factorize_smallest_last(lines)
    assert order.tolist() == smallest_last(matrix)
    root = root_of(lines)
    torch.testing.assert_close(root @ root.T, matrix[order][:, order], rtol=1e-11, atol=1e-11)


@settings(max_examples=25)
@given(features=st.integers(1, 60), seed=st.integers(0, 1000), block=st.integers(1, 70))
def test_without_pivots_the_root_does_not_depend_on_the_block(features, seed, block):
    matrix = moments(features, seed)
    lines = lower_alone(matrix, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cholesky, "_PLAIN_BLOCK", block)
        assert factorize_in_place(lines)
    expected = torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1)
    torch.testing.assert_close(root_of(lines), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("above", ["numbers", "nan", "signed zeros", "infinite"])
@pytest.mark.parametrize("definite", [True, False])
@pytest.mark.parametrize("rounded", [True, False])
def test_what_is_above_the_diagonal_stays_and_does_not_matter(
    rounded, definite, above, dtype, compiled, monkeypatch
):
    monkeypatch.setattr(pivots, "supports", lambda device: compiled)
    monkeypatch.setattr(cholesky, "_PANEL", 200)
    matrix = moments(600)
    if not definite:
        matrix[3, 3] *= -1
    clean = matrix.to(dtype).tril()
    noise = torch.randn(600, 600, generator=torch.Generator().manual_seed(1)).to(dtype)
    fill = {
        "numbers": noise,
        "nan": torch.full_like(noise, math.nan),
        "signed zeros": torch.zeros_like(noise).copysign(noise),
        "infinite": torch.full_like(noise, math.inf).copysign(noise),
    }[above]
    for factorize in (factorize_in_place, factorize_smallest_last):
        alone = clean.clone()
        beside = torch.where(torch.ones_like(clean).tril() > 0, clean, fill)
        before = bits_above(beside)
        expected = factorize(alone, rounded=rounded)
        found = factorize(beside, rounded=rounded)
        assert torch.equal(bits_above(beside), before)
        if definite:
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
            assert torch.equal(beside.tril(), alone.tril())
        else:
            assert found is None or found is False


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("features", [5, 300])
@pytest.mark.parametrize("place", [0, -1])
def test_a_matrix_that_is_not_positive_definite_is_told(features, place, compiled, monkeypatch):
    monkeypatch.setattr(pivots, "supports", lambda device: compiled)
    matrix = moments(features)
    matrix[place, place] *= -1
    assert not factorize_in_place(matrix.clone())
    assert factorize_smallest_last(matrix.clone()) is None


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_told(bad, compiled, monkeypatch):
    monkeypatch.setattr(pivots, "supports", lambda device: compiled)
    matrix = moments(140)
    matrix[100, 3] = matrix[3, 100] = bad
    assert not factorize_in_place(matrix.clone())
    assert factorize_smallest_last(matrix.clone()) is None


def test_nothing_is_factorized_without_columns():
    empty = torch.zeros(0, 0)
    assert factorize_in_place(empty)
    assert factorize_smallest_last(empty).tolist() == []


@given(count=st.integers(0, 50), size=st.integers(1, 60))
def test_blocks_cover_everything_once(count, size):
    found = [i for block in blocks(count, size) for i in range(block.start, block.stop)]
    assert found == list(range(count))


@pytest.mark.parametrize("compiled", COMPILED)
def test_without_a_compiler_and_with_one_the_order_is_the_same(compiled, monkeypatch):
    matrix = moments(600, 4)
    monkeypatch.setattr(pivots, "supports", lambda device: compiled)
    assert factorize_smallest_last(matrix.clone()).tolist() == smallest_last(matrix)


@pytest.mark.parametrize("compiled", COMPILED)
def test_columns_that_nobody_expects_to_go_next_go_in_their_turn(compiled, monkeypatch):
    # Each column is nearly its partner's copy: once one went, the other has the smallest pivot by
    # far, however large it was before.
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(400, 100, generator=generator, dtype=torch.float64)
    sizes = torch.exp(torch.randn(100, generator=generator, dtype=torch.float64))
    near = half + 0.01 * torch.randn(400, 100, generator=generator, dtype=torch.float64)
    x = torch.cat((half * sizes, near * sizes.flip(0)), dim=1)
    matrix = x.T @ x
    monkeypatch.setattr(pivots, "supports", lambda device: compiled)
    assert factorize_smallest_last(matrix.clone()).tolist() == smallest_last(matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_column_is_the_same_whatever_it_was_brought_up_to_date_with(dtype):
    pytest.importorskip("numba")
    matrix = moments(300, 2).to(dtype)
    many = matrix.new_empty(100, 300)
    order = pivots.pick_smallest(matrix, many)
    # No set is larger than the number of lines asked for.
    for count in (1, 3, 7, 12, 20):
        few = matrix.new_empty(count, 300)
        assert pivots.pick_smallest(matrix, few) == order[:count]
        assert torch.equal(few, many[:count])


def test_a_missing_package_leaves_pivots_to_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "prismquant.kernels.cpu_pivots", None)
    monkeypatch.delattr("prismquant.kernels.cpu_pivots", raising=False)
    imported.cache_clear()
    assert not pivots.supports(torch.device("cpu"))
    assert not pivots.supports(torch.device("cuda"))
    imported.cache_clear()
