"""A Hessian above the diagonal, another matrix below it, and neither disturbs the other."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prismquant.algorithms.gptq.cholesky import divide_lines
from prismquant.algorithms.gptq.shared_hessian import SharedHessian
from prismquant.kernels.rounding import Kernel
from prismquant.kernels.sweep import kernel_for

SIZES = st.sampled_from([1, 2, 7, 255, 256, 257, 600])
KERNELS = st.sampled_from(
    ["torch", kernel_for(torch.device("cpu"))],
)


def symmetric(count: int, seed: int) -> Tensor:
    x = torch.randn(count, count, generator=torch.Generator().manual_seed(seed))
    return x + x.T


def spoilt(hessian: Tensor, kernel: Kernel = "torch") -> SharedHessian:
    """With nothing but NaN where a factor would be, and on the diagonal."""
    shared = SharedHessian.of(hessian, kernel)
    nothing = torch.full_like(shared.matrix, torch.nan)
    shared.matrix.copy_(torch.where(torch.ones_like(nothing).tril().bool(), nothing, hessian))
    return shared


@settings(max_examples=15)
@given(count=SIZES, seed=st.integers(0, 99), kernel=KERNELS)
def test_what_is_above_the_diagonal_is_enough_to_be_whole_again(
    count: int, seed: int, kernel: Kernel
) -> None:
    hessian = symmetric(count, seed)
    shared = spoilt(hessian.clone(), kernel)
    shared.restore()
    assert torch.equal(shared.matrix, hessian)


@settings(max_examples=15)
@given(
    count=SIZES,
    seed=st.integers(0, 99),
    first=st.integers(0, 599),
    size=st.integers(1, 600),
    kernel=KERNELS,
)
def test_lines_are_those_of_the_whole(
    count: int, seed: int, first: int, size: int, kernel: Kernel
) -> None:
    hessian = symmetric(count, seed)
    block = slice(min(first, count - 1), min(first + size, count))
    shared = spoilt(hessian.clone(), kernel)
    assert torch.equal(shared.lines(block), hessian[block])
    behind = shared.lines(block, whole=False)[:, block.start :]
    assert torch.equal(behind, hessian[block, block.start :])


@settings(max_examples=15)
@given(count=SIZES, seed=st.integers(0, 99), wide=st.booleans(), kernel=KERNELS)
def test_an_order_is_put_below_the_diagonal_and_nowhere_else(
    count: int, seed: int, wide: bool, kernel: Kernel
) -> None:
    hessian = symmetric(count, seed)
    shared = spoilt(hessian.clone(), kernel)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    target = torch.zeros(count, count, dtype=torch.float64) if wide else shared.matrix
    above = target.triu().clone()
    shared.arrange(order, target)
    assert torch.equal(target.tril(-1), hessian[order][:, order].tril(-1).to(target.dtype))
    assert torch.equal(target.triu().nan_to_num(), above.nan_to_num())


def test_only_what_is_below_the_diagonal_is_divided() -> None:
    matrix = symmetric(300, 0)
    divisors = torch.rand(300, generator=torch.Generator().manual_seed(1)) + 0.5
    expected = (matrix / divisors.unsqueeze(1)).tril(-1) + matrix.triu()
    divide_lines(matrix, divisors)
    assert torch.equal(matrix, expected)
