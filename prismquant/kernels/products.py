"""Products over tokens, on tensor cores where that loses nothing.

Two numbers of 16 bits have at most 11 significant digits each, so float32 holds their product
exactly, and tensor cores add such products up in float32. Inputs in float32 are multiplied in
float32. TF32, which would cut them to 11 digits, is a setting of the whole process; it is off by
default and left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALVES = (torch.bfloat16, torch.float16)


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :func:`token_product` takes matrices of a dtype as they are.

    Args:
        device: Where they lie.
        dtype: Theirs.

    Returns:
        True for float32, and on NVIDIA GPUs for floating-point numbers of 16 bits.
    """
    if dtype == torch.float32:
        return True
    return device.type == "cuda" and torch.version.hip is None and dtype in _HALVES


def token_product(a: Tensor, b: Tensor) -> Tensor:
    """``a^T b``, summed in float32.

    Args:
        a: ``[tokens, n]``, of a dtype that :func:`supports` takes.
        b: ``[tokens, m]``, of the same dtype.

    Returns:
        float32 ``[n, m]``.
    """
    if a.dtype == torch.float32:
        return a.T @ b
    return torch.mm(a.T, b, out_dtype=torch.float32)
