"""Products over tokens, in 16 bits where that loses nothing.

Two numbers of 16 bits have at most 11 significant digits each, so float32 holds their product
exactly, and tensor cores add such products up in float32. So do CPUs with the instructions
``avx512_bf16``, for bfloat16, but torch has no such product there: it is compiled by numba
(:mod:`prismquant.kernels.cpu_products`). Only the order of sums differs from that of float32
inputs, and numbers below 2^-126, which those CPUs take as zero. Inputs in float32 are multiplied
in float32. TF32, which would cut them to 11 digits, is a setting of the whole process; it is off
by default and left alone.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prismquant.errors import NumericsError
from prismquant.kernels.dispatch import compiled_loops
from prismquant.kernels.moments import flat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

_HALVES = (torch.bfloat16, torch.float16)
# Tokens that are packed together: those of a block of columns stay in the cache.
_TOKENS = 1024
# Features of a line of packed tokens.
_LINE = 16
# Rows of a block that are given to one thread; whole tiles.
_STRIP = 128


@dataclass(frozen=True)
class RunningSum:
    """A sum of products of some features of an input with some others.

    Attributes:
        rows: The first of these features, a multiple of 16.
        columns: The first of the others, likewise. A sum with ``rows == columns`` is symmetric,
            and need be kept on and below its diagonal only.
        high: The sum, float32 ``[n, m]``, each line contiguous.
        low: What rounding took from it (:func:`prismquant.kernels.moments.two_sum`), likewise.
    """

    rows: int
    columns: int
    high: Tensor
    low: Tensor


@dataclass(frozen=True)
class _Packed:
    """Tokens as :mod:`prismquant.kernels.cpu_products` reads them."""

    words: NDArray[Any]
    pairs: int


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :func:`token_product` takes matrices of a dtype as they are.

    Args:
        device: Where they lie.
        dtype: Theirs.

    Returns:
        True for float32; on NVIDIA GPUs for floating-point numbers of 16 bits; and for bfloat16 on
        CPUs that multiply such numbers, if the package ``numba`` works.
    """
    if dtype == torch.float32:
        return True
    if device.type == "cpu":
        return dtype == torch.bfloat16 and _loops() is not None
    return device.type == "cuda" and torch.version.hip is None and dtype in _HALVES


def token_product(a: Tensor, b: Tensor) -> Tensor:
    """``a^T b``, summed in float32.

    Args:
        a: ``[tokens, n]``, of a dtype that :func:`supports` takes.
        b: ``[tokens, m]``, of the same dtype.

    Returns:
        float32 ``[n, m]``.

    Raises:
        NumericsError: A CPU does not multiply such numbers as they are.
    """
    if a.dtype == torch.float32:
        return a.T @ b
    if a.device.type != "cpu":
        return torch.mm(a.T, b, out_dtype=torch.float32)
    loops = _found(a)
    product, lost = (torch.zeros(a.shape[1], b.shape[1]) for _ in range(2))
    whole = RunningSum(0, 0, product, lost)
    for left, right in zip(a.split(_TOKENS), b.split(_TOKENS), strict=True):
        _run(loops.add_products, _work(_pack(loops, left), _pack(loops, right), whole, half=False))
    return product


def rounded_product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of factors that may lose digits, summed in float32, and rounded where torch must.

    Args:
        a: ``[n, k]``, any floating dtype; rounded to that of ``b``.
        b: ``[k, m]``, bfloat16, on a device that :func:`supports` it.

    Returns:
        float32 ``[n, m]``; on CPUs its numbers have the digits of bfloat16.
    """
    a = a.to(b.dtype)
    if a.device.type == "cpu":
        return torch.mm(a, b).to(torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32)


def adds(x: Tensor) -> bool:
    """Whether :func:`add_products` takes an input: bfloat16 on a CPU that :func:`supports` it."""
    return x.device.type == "cpu" and x.dtype != torch.float32 and supports(x.device, x.dtype)


def add_products(x: Tensor, sums: Iterable[RunningSum]) -> None:
    """Add what an input is in ``x^T x`` to sums of its blocks.

    Products are summed in float32 over at most 256 tokens, then added to a sum and its rest, so
    that these depend on nothing but the tokens; not on the number of threads, which is torch's.

    Args:
        x: ``[tokens, features]``, one that :func:`adds` takes.
        sums: Of blocks that do not overlap; each is brought up to date.

    Raises:
        NumericsError: The input is not one of these.
    """
    loops, sums = _found(x), list(sums)
    for part in x.split(_TOKENS):
        packed = _pack(loops, part)
        work = (_work(packed, packed, one, half=one.rows == one.columns) for one in sums)
        _run(loops.add_products, itertools.chain.from_iterable(work))


def subtracts(matrix: Tensor) -> bool:
    """Whether :func:`subtract_products` takes a matrix: float32, on a CPU that :func:`supports`."""
    return matrix.device.type == "cpu" and matrix.dtype == torch.float32 and _loops() is not None


def subtract_products(matrix: Tensor, lines: Tensor) -> None:
    """Subtract ``l^T l`` from a lower triangle, its factors rounded to bfloat16, its sums float32.

    Every number is computed by itself, so the number of threads changes none. What is above the
    diagonal is left alone.

    Args:
        matrix: ``[m, m]``, lines contiguous, one that :func:`subtracts` takes.
        lines: ``l``, float32 ``[b, m]``, at most 256 of them.

    Raises:
        NumericsError: A CPU does not multiply such numbers.
    """
    rounded = lines.to(torch.bfloat16)
    loops = _found(rounded)
    if not len(matrix) or not len(lines):
        return
    packed = _pack(loops, rounded)
    step = len(matrix) if torch.get_num_threads() == 1 else _STRIP
    ends = itertools.pairwise([*range(0, len(matrix), step), len(matrix)])
    known = (packed.words, packed.pairs, flat(matrix), matrix.stride(0))
    _run(loops.subtract_products, ((*known, *strip) for strip in ends))


def _pack(loops: Any, x: Tensor) -> _Packed:
    tokens, features = x.shape
    pairs = -(-tokens // 2)
    words = torch.empty(-(-features // _LINE) * pairs * _LINE, dtype=torch.int32).numpy()
    if len(words):
        bits = (x if x.stride(1) == 1 else x.contiguous()).view(torch.int16)
        loops.pack(flat(bits), bits.stride(0), tokens, features, words)
    return _Packed(words, pairs)


def _work(
    left: _Packed, right: _Packed, total: RunningSum, *, half: bool
) -> Iterator[tuple[Any, ...]]:
    """Arguments of the loop for one sum; on several threads those of its strips."""
    height, width = total.high.shape
    if not (height and width and left.pairs):
        return
    factors = (left.words, total.rows * left.pairs, right.words, total.columns * right.pairs)
    memory = (part for one in (total.high, total.low) for part in (flat(one), one.stride(0)))
    arguments = (*factors, left.pairs, *memory)
    step = height if torch.get_num_threads() == 1 else _STRIP
    for start, stop in itertools.pairwise([*range(0, height, step), height]):
        yield *arguments, start, stop, width, half


def _run(loop: Callable[..., None], work: Iterable[tuple[Any, ...]]) -> None:
    """Run the loop on all arguments, on as many threads as torch has."""
    work = list(work)
    threads = min(torch.get_num_threads(), len(work))
    if threads <= 1:
        for arguments in work:
            loop(*arguments)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(loop, *arguments) for arguments in work]:
            done.result()


def _loops() -> Any | None:
    """The compiled loops, where there are any."""
    return compiled_loops("cpu_products")


def _found(x: Tensor) -> Any:
    """The loops, for an input that they can read."""
    loops = _loops()
    if loops is None or not adds(x):
        raise NumericsError(
            f"inputs in {x.dtype} cannot be multiplied as they are on this CPU",
            remedy="convert them to float32",
        )
    return loops
