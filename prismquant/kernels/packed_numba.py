"""Few rows times a weight in codes, on a CPU, by loops that numba compiles.

The loops multiply codes as they lie in memory, which a processor reads in a fraction of the time
that it takes to read floating-point weights. Their work grows with the rows as that of a product of
matrices does, at which torch is better: many rows are for :mod:`prismquant.kernels.packed_tiles`.
"""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prismquant.kernels import cpu_packed
from prismquant.kernels.instructions import multiplies_bfloat16
from prismquant.kernels.tiled_weight import ROWS, TiledWeight
from prismquant.numerics.grids import FloatGrid

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

# Rows of an input up to which the loops multiply: bench/packed.py. With instructions for bfloat16,
# torch's products are several times as fast.
FEW_ROWS = 32
FEW_ROWS_BESIDE_BFLOAT16 = 8
# Codes that are worth a thread.
_CODES_OF_A_THREAD = 1 << 18
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(x: Tensor, weight: TiledWeight) -> str | None:
    """A few words on why a case is not taken, or None."""
    most = FEW_ROWS_BESIDE_BFLOAT16 if multiplies_bfloat16() else FEW_ROWS
    return wrong_kind(x) or (None if len(x) <= most else f"it takes {most} rows at most")


def run(x: Tensor, weight: TiledWeight) -> Tensor:
    """``x`` times the weight, summed in float32; as of :func:`.packed_torch.run`."""
    rows = x.to(torch.float32)
    rows = (rows if weight.order is None else rows[:, weight.order]).contiguous()
    tiles = len(weight.scale)
    out = torch.zeros(len(x), tiles * ROWS)
    known = (*loop_arguments(weight), rows.numpy(), out.numpy())
    codes = weight.shape[0] * weight.shape[1]
    threads = min(torch.get_num_threads(), max(1, codes // _CODES_OF_A_THREAD))
    spans = itertools.pairwise([tiles * i // threads for i in range(threads + 1)])
    _run(cpu_packed.multiply_tiles, [(*known, *span) for span in spans])
    return weight.divided(out[:, : weight.shape[0]]).to(x.dtype)


def loop_arguments(weight: TiledWeight) -> tuple[Any, ...]:
    """The first arguments of the loops of :mod:`prismquant.kernels.cpu_packed`."""
    grid = weight.grid
    pattern = (grid.mantissa, grid.bias) if isinstance(grid, FloatGrid) else (0, 0)
    counts = (grid.bits, len(weight.scale), weight.columns, weight.scale.shape[1], weight.group)
    return (weight.words.numpy(), (*counts, *pattern), _both(weight.scale), _both(weight.zero))


def wrong_kind(x: Tensor) -> str | None:
    """A few words on why the loops cannot read an input, or None."""
    if x.device.type != "cpu":
        return f"it is for CPUs, not {x.device.type}"
    return None if x.dtype in _DTYPES else f"it does not take {x.dtype}"


def _both(value: Tensor | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Scales as the loops read them: upper halves of numbers, or these; one of the two is empty."""
    narrow, wide = np.empty(0, np.int16), np.empty(0, np.float32)
    if value is None:
        return narrow, wide
    flat = value.flatten()
    if flat.dtype == torch.bfloat16:
        return flat.view(torch.int16).numpy(), wide
    return narrow, flat.numpy()


def _run(loop: Callable[..., None], work: list[tuple[Any, ...]]) -> None:
    """Run a loop on all arguments, each on a thread of its own."""
    if len(work) == 1:
        loop(*work[0])
        return
    for done in [_pool(len(work)).submit(loop, *arguments) for arguments in work]:
        done.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay: a layer is multiplied in less time than it takes to start them."""
    return ThreadPoolExecutor(threads, thread_name_prefix="packed")
