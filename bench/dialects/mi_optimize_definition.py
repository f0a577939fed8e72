"""Rounding of MI-optimize's quantizers with unsigned codes, by their definition.

The tool itself needs releases of transformers and torch that no longer install, so this is no run
of it: the formulas are written down again from its documentation and sources, in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

RECIPES: dict[str, dict[str, Any]] = {
    "rtn W4A16": {"w_dtype": "int4", "w_qtype": "per_group", "w_groupsize": 128},
    "rtn W4A16, zero points": {
        "w_dtype": "int4",
        "w_qtype": "per_group",
        "w_groupsize": 128,
        "w_has_zero": True,
    },
    "rtn W8A8": {
        "w_dtype": "int8",
        "w_qtype": "per_channel",
        "a_dtype": "int8",
        "a_qtype": "per_token",
        "quantization_type": "dynamic",
    },
    "rtn W4A8": {
        "w_dtype": "int4",
        "w_qtype": "per_channel",
        "a_dtype": "int8",
        "a_qtype": "per_token",
        "quantization_type": "dynamic",
    },
    "rtn W4A8, zero points": {
        "w_dtype": "int4",
        "w_qtype": "per_channel",
        "w_has_zero": True,
        "a_dtype": "int8",
        "a_qtype": "per_token",
        "quantization_type": "dynamic",
    },
}
"""Arguments of ``algo: rtn``, as they stand below ``kwargs``."""


def recipe(arguments: dict[str, Any]) -> dict[str, Any]:
    """The recipe around the arguments."""
    return {"quant_config": {"algo": "rtn", "kwargs": {"a_dtype": "float16"} | arguments}}


def rounded(values: Tensor, bits: int, group: int, *, zero: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points, one scale for ``group`` neighbours of a row.

    Args:
        values: ``[rows, columns]``.
        bits: Of a code.
        group: Neighbours that share a scale; a row's length for one scale a row or token.
        zero: Whether codes have a zero point; else they are symmetric about the middle code.

    Returns:
        Codes ``[rows, columns]`` from 0 up, scales and zero points ``[rows, groups]``.
    """
    parts = values.reshape(len(values), -1, group)
    low, high, most = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True), (1 << bits) - 1
    if zero:
        scale = (high - low) / most
        point = -torch.round(low / scale)
    else:
        scale = torch.maximum(high.abs(), low.abs()) / (most // 2)
        point = torch.full_like(scale, most // 2)
    codes = torch.clamp(torch.round(parts / scale + point), 0, most)
    return codes.reshape(values.shape), scale.squeeze(-1), point.squeeze(-1)
