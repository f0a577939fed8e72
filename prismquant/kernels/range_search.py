"""The search for scales with a first look at all trials, compiled for a CPU.

The search of :mod:`prismquant.numerics.ranges` weighs every trial of every unit, in many passes of
torch. Here a compiled loop weighs them while the values are in the cache, to some five digits, with
a bound on what it may be off by; it gives a trial up once it has lost. The few trials that bounds
cannot tell apart are left to torch's own arithmetic. So what is chosen is the same, bit for bit.

Needs the package ``numba``; nothing is imported before a search asks for it, and without it every
trial is weighed in torch.
"""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from prismquant.kernels.dispatch import compiled_loops
from prismquant.kernels.rounding import Rounding
from prismquant.numerics import ranges

if TYPE_CHECKING:
    from collections.abc import Callable

    from prismquant.numerics.grids import Grid
    from prismquant.numerics.kinds import Granularity
    from prismquant.numerics.rules import RangeRule
    from prismquant.numerics.scale_search import Look, Search
    from prismquant.numerics.scales import AnyScale

# Units of a tile.
_TILE = 16
# Tiles that are worth a thread.
_TILES_OF_A_THREAD = 8
# What either side's powers may be off by, relatively: a fixed part, and one for the exponent.
_POWER, _BY_NORM = 3e-5, 1e-5
# Rounding of one addition, and the most that follow one another in torch's sums.
_ROUNDING, _MOST_TERMS = 6e-8, 256
# What quotients may differ by, in units of the largest.
_DRIFT = 3e-7


def weight_scales(
    weight: Tensor,
    grid: Grid,
    symmetric: bool,
    granularity: Granularity,
    group_size: int | None,
    rule: RangeRule,
    scale_dtype: AnyScale,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scales of :func:`prismquant.numerics.ranges.weight_scales`, bit for bit, but sooner.

    Args:
        weight: ``[out, in]``, any floating dtype.
        grid: The points and their codes.
        symmetric: Keep zero at code 0.
        granularity: tensor, channel, group or block.
        group_size: For group and block granularity.
        rule: Any but ``ema``.
        scale_dtype: How the scale is stored.
        importance: ``[in]``, not negative.

    Returns:
        Scale and zero point.

    Raises:
        RecipeError: As there.
        NumericsError: As there.
        FormatError: As there.
    """
    unit = (granularity, group_size)
    look = look_for(weight.device) if rule.kind in ranges.SEARCHES else None
    return ranges.weight_scales(
        weight, grid, symmetric, *unit, rule, scale_dtype, importance, look=look
    )


def look_for(device: torch.device) -> Look | None:
    """The first look that works on a device.

    Args:
        device: Where the weight lies.

    Returns:
        On a CPU with a numba that works, the compiled one; else ``None``.
    """
    loops = compiled_loops("cpu_search") if device.type == "cpu" else None
    return None if loops is None else functools.partial(_look, loops.look)


def _look(
    loop: Callable[..., Any],
    search: Search,
    values: Tensor,
    importance: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    unit: Tensor,
) -> tuple[Tensor, Tensor]:
    """A :class:`prismquant.numerics.scale_search.Look` with the compiled loop."""
    count, terms = values.shape
    rounding = Rounding.of(search.grid)
    norm = search.rule.norm
    slack = _POWER + _BY_NORM * norm
    slack += _ROUNDING * (min(terms, _MOST_TERMS) + terms / 32 + 64)
    costs = torch.ones(1, terms) if importance is None else importance
    first = torch.empty(-(-count // _TILE) * _TILE)
    left = torch.zeros(count, len(scales), dtype=torch.uint8)
    shifts = scales[:0] if zeros is None else zeros
    matrices = (values, costs, _padded(scales), _padded(shifts), _padded(unit.unsqueeze(0))[0])
    numbers = (rounding.lowest, rounding.highest, rounding.shift, rounding.smallest)
    arguments = (
        *(matrix.detach().contiguous().numpy() for matrix in matrices),
        *numbers,
        norm,
        slack,
        _DRIFT,
        first.numpy(),
        left.numpy(),
    )
    tiles = len(first) // _TILE
    threads = min(torch.get_num_threads(), max(1, tiles // _TILES_OF_A_THREAD))
    ends = [_TILE * (tiles * i // threads) for i in range(threads + 1)]
    if threads == 1:
        loop(*arguments, *ends)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(loop, *arguments, *s) for s in itertools.pairwise(ends)]:
                done.result()
    return first[:count].to(torch.int64), left.view(torch.bool)


def _padded(x: Tensor) -> Tensor:
    """As float32, filled up with ones to whole tiles."""
    return pad(x.to(torch.float32), (0, -x.shape[-1] % _TILE), value=1.0)
