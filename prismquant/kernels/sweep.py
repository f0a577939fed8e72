"""A block of GPTQ's columns in one kernel: rounded one by one, each answering for those before.

What torch does with some four launches a column is one for the block here: a program holds the
targets of all columns of its rows in registers, takes the first, rounds it, and lets its error pull
at the rest. The arithmetic is that of :class:`prismquant.algorithms.gptq.GPTQ` on torch, operation
by operation, in float32 and rounded alike, except that pulls of earlier columns are added one after
the other and not by matrix products. Codes differ only where that last bit decides.

The kernel needs the package ``triton`` (the extra ``gpu``). Nothing is imported before a device
asks for it.
"""

from __future__ import annotations

import contextlib
import subprocess
from dataclasses import dataclass

import torch
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.numerics.grids import Grid, IntGrid

# Columns that a program can hold in registers, of as many rows as a warp has threads.
MOST_COLUMNS = 128
TILE_ROWS = 32
# Offsets inside a block are 32 bits wide.
_MOST_ROWS = 2**31 // MOST_COLUMNS - 1
# The first GPU generation that the compiler is kept working for.
_CAPABILITY = (8, 0)
# Digits of a float32 behind the leading one.
_MANTISSA = 23


@dataclass(frozen=True, eq=False)
class ScaleLines:
    """Scales of ``r`` rows, and which of them each column uses.

    Attributes:
        steps: float32 ``[G, r]``, rows next to one another.
        zeros: Zero points, likewise, or ``None``.
        lines: Which of the ``G`` lines each column uses, int64 ``[columns]``.
    """

    steps: Tensor
    zeros: Tensor | None
    lines: Tensor

    def of(self, columns: slice) -> ScaleLines:
        """Those of some of the columns."""
        return ScaleLines(self.steps, self.zeros, self.lines[columns])


@dataclass(frozen=True)
class Rounding:
    """A grid as the kernel knows it: rounding is adding a number, and taking it away again.

    Adding 1.5 * 2^23 times the grid's spacing leaves float32 no digit below that spacing, and so
    rounds half to even. All integers have one spacing; that of floating-point grids is a fraction
    of the power of two at or below the value, and stays the same below the smallest normal number.

    Attributes:
        lowest: The lowest point.
        highest: The highest point.
        shift: What is added, of floating-point grids at a value of 1.
        smallest: The smallest normal number of a floating-point grid; 0 of integers.
    """

    lowest: float
    highest: float
    shift: float
    smallest: float

    @staticmethod
    def of(grid: Grid) -> Rounding:
        """That of any grid."""
        if isinstance(grid, IntGrid):
            return Rounding(float(grid.qmin), float(grid.qmax), 1.5 * 2.0**_MANTISSA, 0.0)
        shift = 1.5 * 2.0 ** (_MANTISSA - grid.mantissa)
        return Rounding(-grid.largest, grid.largest, shift, grid.smallest_normal)


def supports(device: torch.device, grid: Grid) -> bool:
    """Whether :func:`round_columns` works here: tries it on one number.

    Beside the package and an NVIDIA GPU of the generation of 2020 or later, the compiler needs a C
    compiler at run time, which small images lack; a trial finds out.

    Args:
        device: Where the columns lie.
        grid: What they are rounded to.

    Returns:
        Whether it does.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return False
    one = torch.ones(1, 1, device=device)
    scales = ScaleLines(one, None, torch.zeros(1, dtype=torch.int64, device=device))
    try:
        round_columns(one.clone(), one, one, scales, grid, errors=one.clone(), points=one.clone())
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError):
        return False
    return True


def round_columns(
    targets: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    scales: ScaleLines,
    grid: Grid,
    *,
    errors: Tensor,
    points: Tensor,
) -> None:
    """Round ``b`` columns one by one: column k from ``t_k + sum over j < k of c_kj e_j``.

    All matrices are float32 with rows of the weight next to one another in memory. Source of the
    recurrence: Frantar et al., arXiv 2210.17323, in the left-looking form of
    ``prismquant/algorithms/gptq.py``.

    Args:
        targets: ``t``, ``[b, r]``, ``b`` up to :data:`MOST_COLUMNS`; replaced by those sums.
        weights: ``[b, r]``.
        coefficients: ``c``, ``[b, b]``; read below the diagonal.
        scales: Of these columns.
        grid: What to round to.
        errors: ``[b, r]``, to be filled with ``e = w - q``.
        points: ``[b, r]``, to be filled with what ``grid`` rounds to.

    Raises:
        FormatError: There are too many columns or rows, or a line is not contiguous.
        ImportError: There is no Triton.
    """
    from prismquant.kernels import triton_sweep

    matrices = [targets, weights, coefficients, scales.steps, errors, points]
    if scales.zeros is not None:
        matrices.append(scales.zeros)
    if len(targets) > MOST_COLUMNS or targets.shape[1] > _MOST_ROWS:
        raise FormatError(
            f"the sweep kernel takes {MOST_COLUMNS} columns of {_MOST_ROWS} rows, "
            f"not {list(targets.shape)}",
        )
    if any(m.shape[1] > 1 and m.stride(1) != 1 for m in matrices):
        raise FormatError(
            f"the sweep kernel reads contiguous lines, not strides {[m.stride() for m in matrices]}"
        )
    with _current(targets.device):
        triton_sweep.launch(
            targets,
            weights,
            coefficients,
            scales,
            Rounding.of(grid),
            errors,
            points,
            block=MOST_COLUMNS,
            tile=TILE_ROWS,
        )


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device of the process."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
