"""Products of bfloat16 tokens on a CPU: what float64 gives, whatever the shape and the threads."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prismquant.errors import NumericsError
from prismquant.kernels import products
from prismquant.kernels.dispatch import imported, use
from prismquant.kernels.products import (
    RunningSum,
    add_products,
    subtract_products,
    token_product,
)
from prismquant.statistics.hessian import Hessian

CPU = torch.device("cpu")
multiplies = pytest.mark.skipif(
    not products.supports(CPU, torch.bfloat16),
    reason="needs the package numba and a CPU that multiplies bfloat16",
)
# What lies beside a sum, and must stay.
CANARY = -777.0


def narrow(tokens: int, features: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, features, generator=generator).bfloat16()


def worst(product: Tensor, a: Tensor, b: Tensor) -> float:
    """The largest error, in parts of the product of both columns' lengths."""
    a, b = a.double(), b.double()
    sizes = torch.outer(a.norm(dim=0), b.norm(dim=0)).clamp(min=1e-30)
    return float(((product - a.T @ b) / sizes).abs().max())


def record_of(*batches: Tensor) -> Hessian:
    record = Hessian(batches[0].shape[1])
    for batch in batches:
        record.update(batch)
    return record


@multiplies
@pytest.mark.parametrize("tokens", [1, 2, 3, 255, 256, 257, 1023, 1025, 2500])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (8, 48), (7, 130), (37, 15), (64, 49)])
def test_a_product_is_that_of_float64(tokens, n, m):
    a, b = narrow(tokens, n, seed=tokens), narrow(tokens, m, seed=n)
    product = token_product(a, b)
    assert (product.dtype, product.shape) == (torch.float32, (n, m))
    assert worst(product, a, b) < 2e-6


@multiplies
@settings(max_examples=40)
@given(
    tokens=st.integers(0, 70),
    n=st.integers(0, 60),
    m=st.integers(0, 60),
    place=st.integers(0, 20),
    every=st.integers(1, 3),
    turned=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_whole_numbers_are_multiplied_exactly_wherever_they_lie(
    tokens, n, m, place, every, turned, seed
):
    """Slices of larger matrices, with tokens left out, and matrices that lie transposed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3 * tokens, 80)
    whole = torch.randint(-8, 9, shape[::-1] if turned else shape, generator=generator).bfloat16()
    whole = whole.T if turned else whole
    a, b = (whole[::every, place : place + size][:tokens] for size in (n, m))
    assert torch.equal(token_product(a, b), (a.double().T @ b.double()).float())


@multiplies
@settings(max_examples=40)
@given(
    lines=st.integers(0, 256),
    columns=st.sampled_from([0, 1, 7, 8, 15, 16, 47, 48, 49, 100, 961, 1100]),
    beside=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_products_are_subtracted_from_a_lower_triangle_alone(lines, columns, beside, seed):
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(lines, columns, generator=generator)
    memory = torch.randn(columns, columns + beside, generator=generator)
    whole = memory.clone()
    subtract_products(whole[:, :columns], factors)
    rounded = factors.bfloat16().double()
    expected = memory[:, :columns].double() - rounded.T @ rounded
    found, lower = whole[:, :columns], torch.ones(columns, columns).tril() > 0
    assert torch.equal(found[~lower], memory[:, :columns][~lower])
    assert torch.equal(whole[:, columns:], memory[:, columns:])
    sizes = rounded.norm(dim=0).outer(rounded.norm(dim=0))
    error = (found.double() - expected).abs()
    assert bool((error <= 1e-6 * (1 + sizes + expected.abs()))[lower].all())


@multiplies
def test_threads_subtract_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(256, 700, generator=generator)
    matrix, before = torch.randn(700, 700, generator=generator), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            subtract_products(own := matrix.clone(), factors)
            found.append(own)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_what_no_cpu_multiplies_is_not_subtracted():
    with use("torch"):
        assert not products.subtracts(torch.zeros(2, 2))
        with pytest.raises(NumericsError, match="cannot be multiplied"):
            subtract_products(torch.zeros(2, 2), torch.ones(1, 2))


@multiplies
def test_infinities_and_nan_come_out_as_such():
    a, b = torch.ones(5, 20).bfloat16(), torch.ones(5, 50).bfloat16()
    a[4, 3], a[1, 4], b[2, 7], b[4, 8] = math.inf, math.nan, -math.inf, 0
    expected = a.float().T @ b.float()
    assert bool(expected.isnan().any())
    torch.testing.assert_close(token_product(a, b), expected, rtol=0, atol=0, equal_nan=True)


@multiplies
@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (32, 32), (48, 0), (16, 64)])
def test_sums_of_blocks_grow_and_nothing_beside_them_is_touched(rows, columns):
    x = narrow(300, 110, seed=4)
    high, low = (torch.full((60, 70), CANARY) for _ in range(2))
    place = slice(3, 40), slice(5, 5 + (37 if rows == columns else 45))
    height, width = high[place].shape
    start = torch.randn(height, width, generator=torch.Generator().manual_seed(0))
    high[place], low[place] = 1e4 * start, 0
    add_products(x, [RunningSum(rows, columns, high[place], low[place])])
    a, b = (x[:, i : i + size].double() for i, size in ((rows, height), (columns, width)))
    exact = (1e4 * start).double() + a.T @ b
    error = (high[place].double() + low[place].double() - exact).abs()
    assert float((error.tril() if rows == columns else error).max()) < 1e-3
    for matrix in (high, low):
        matrix[place] = CANARY
        assert bool((matrix == CANARY).all())


@multiplies
@pytest.mark.parametrize("features", [1, 40, 511, 512, 530, 1100])
def test_second_moments_are_those_of_float32_but_for_the_order_of_sums(features):
    x = narrow(600, features, seed=features) * torch.logspace(-3, 3, features).bfloat16()
    mean = record_of(*x.split(250)).result()
    assert worst(600 * mean, x, x) < 2e-6
    assert torch.equal(mean, mean.T)
    wide = record_of(x.float()).result()
    size = wide.diagonal().sqrt()
    assert float(((mean - wide) / torch.outer(size, size)).abs().max()) < 2e-6


@multiplies
def test_neither_order_nor_who_has_seen_a_batch_changes_a_bit():
    """Magnitudes differ by a factor of a million, so that plain sums would not do."""
    batches = [narrow(50, 600, seed=n) * 10.0 ** (n % 4) for n in range(12)]
    expected = record_of(*batches).result()
    assert torch.equal(record_of(*batches[::-1]).result(), expected)
    for ranks in (2, 3):
        records = [record_of(*batches[rank::ranks]) for rank in range(ranks)]
        for other in records[1:]:
            records[0].merge(other)
        assert torch.equal(records[0].result(), expected)


@multiplies
def test_threads_and_how_many_tokens_are_packed_at_once_change_no_bit(monkeypatch):
    x = narrow(1300, 700, seed=8)
    expected = record_of(x).state_dict()
    monkeypatch.setattr(products, "_TOKENS", 512)
    before = torch.get_num_threads()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            state = record_of(x).state_dict()
        finally:
            torch.set_num_threads(before)
        for name, part in expected.items():
            assert torch.equal(part, state[name]), name


@multiplies
def test_padding_is_dropped_and_weights_are_multiplied_in_float32():
    x = narrow(90, 70, seed=9)
    kept = torch.arange(90) % 3 != 0
    padded = Hessian(70)
    padded.update(x.where(kept.unsqueeze(1), torch.nan), kept)
    assert torch.equal(padded.result(), record_of(x[kept]).result())
    weighted, wide = Hessian(70), Hessian(70)
    weighted.update(x, 0.3 * kept)
    wide.update(x.float(), 0.3 * kept)
    assert torch.equal(weighted.result(), wide.result())


@multiplies
def test_numbers_that_are_not_normal_count_as_zero():
    tiny = torch.full((4, 3), 1e-39).bfloat16()
    assert bool((tiny > 0).all())
    assert not bool(token_product(tiny, torch.ones(4, 20).bfloat16()).any())


@pytest.mark.parametrize("missing", ["numba", "prismquant.kernels.cpu_products"])
def test_without_a_compiler_bfloat16_is_multiplied_in_float32(monkeypatch, missing):
    imported.cache_clear()
    monkeypatch.delitem(sys.modules, "prismquant.kernels.cpu_products", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    x = narrow(20, 70, seed=10)
    try:
        assert not products.supports(CPU, torch.bfloat16)
        assert torch.equal(record_of(x).result(), record_of(x.float()).result())
    finally:
        imported.cache_clear()


def test_other_types_of_16_bits_are_not_multiplied_as_they_are_on_a_cpu():
    assert not products.supports(CPU, torch.float16)
    assert not products.supports(CPU, torch.float64)
    assert not products.adds(torch.ones(2, 2))
    x = torch.ones(2, 2, dtype=torch.float16)
    assert not products.adds(x)
    with pytest.raises(NumericsError, match="float16"):
        token_product(x, x)
    with pytest.raises(NumericsError, match="float16"):
        add_products(x, [])
