"""Values that are not finite: found, counted and refused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from prismquant.errors import NumericsError

if TYPE_CHECKING:
    from torch import Tensor


def check_finite(x: Tensor, what: str) -> None:
    """Refuse NaN and infinities; say how many, where the first one is, and how large the rest.

    Args:
        x: Any tensor.
        what: What to call it in the error.

    Raises:
        NumericsError: ``x`` holds a value that is not finite.
    """
    if x.numel() == 0 or not x.is_floating_point() or all_finite(x):
        return
    bad = (~torch.isfinite(x)).nonzero()
    first = tuple(int(i) for i in bad[0])
    raise NumericsError(
        f"{what} holds {finiteness(x)}; the first is {float(x[first])} at index {list(first)}",
        remedy="check the checkpoint and the calibration data, or compute in a wider dtype",
    )


def finiteness(x: Tensor) -> str:
    """The values that are not finite, counted, and the extremes of those that are, for an error.

    Args:
        x: Any shape, any floating dtype.

    Returns:
        E.g. ``2 NaN and 1 infinite of 4096 values, the finite ones from -3.1 to 2.7``.
    """
    finite = x[torch.isfinite(x)]
    said = _counted(x)
    if not finite.numel():
        return said
    return f"{said}, the finite ones from {float(finite.min()):.4g} to {float(finite.max()):.4g}"


def nonfinite(x: Tensor) -> str:
    """The values of a tensor of any dtype that are not finite, counted.

    Returns:
        E.g. ``2 NaN and 1 infinite of 4096 values``; empty where all are finite, as integers are.
    """
    if not x.is_floating_point():
        return ""
    # Of single bytes there is no arithmetic, and bfloat16 holds them all.
    values = x.to(torch.bfloat16) if x.itemsize == 1 else x
    return "" if all_finite(values) else _counted(values)


def _counted(x: Tensor) -> str:
    nans, infinite = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
    return f"{nans} NaN and {infinite} infinite of {x.numel()} values"


def all_finite(x: Tensor) -> bool:
    """Whether all values are finite, read once as a rule, and without a mask of the tensor's size.

    Args:
        x: Any shape, any floating dtype.
    """
    # A sum tells at once, unless it overflows by itself.
    if x.numel() == 0 or math.isfinite(float(x.sum())):
        return True
    low, high = torch.aminmax(x)
    return math.isfinite(float(low)) and math.isfinite(float(high))
