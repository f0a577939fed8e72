"""Checkpoints of numbers with scales beside them: FP8 of transformers, and ModelOpt's formats.

Which format a weight has is told by the dtypes and shapes of its tensors, not by names of layers in
a configuration: one file may hold several.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from prismquant.errors import FormatError
from prismquant.headers import TensorInfo
from prismquant.sources.source_headers import SourceHeaders
from prismquant.sources.source_weight import ScaledWeight

_BYTES = (torch.uint8, torch.float8_e8m0fnu)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_CODED = (*_FP8, torch.uint8, torch.int8)
# Of a weight's name; "_inv" is a relic: such a scale multiplies, too.
_SCALES = ("_scale_inv", "_scale")


def scaled_weights(source: SourceHeaders) -> Iterator[tuple[str, ScaledWeight]]:
    """Weights in codes that have a scale beside them, by the name that they have in floating point.

    Raises:
        FormatError: A weight in codes has no scale, or one of another shape.
    """
    section, infos = source.section, source.infos
    for name, info in infos.items():
        if info.dtype in _CODED and len(info.shape) >= 2 and not name.endswith(_SCALES):
            scale = next((f"{name}{end}" for end in _SCALES if f"{name}{end}" in infos), None)
            if scale is None:
                raise FormatError(
                    f"a weight is stored as {_short(info.dtype)}, and no scale beside it",
                    where=name,
                    remedy="complete the download, or use the unquantized checkpoint",
                )
            yield name, _scaled(name, scale, infos, section)


def _scaled(
    name: str, scale: str, infos: Mapping[str, TensorInfo], section: Mapping[str, Any]
) -> ScaledWeight:
    info, steps = infos[name], infos[scale]
    parts = {"weight": name, "scale": scale}
    if f"{name}_scale_2" in infos:
        parts["scale_2"] = f"{name}_scale_2"
    # ModelOpt's: the input is multiplied by it, which is the same as the weight's columns.
    factors = f"{name.rpartition('.')[0]}.pre_quant_scale"
    if factors in infos:
        parts["columns"] = factors
    *stack, rows, columns = info.shape
    kind, packed = _kind(name, info, steps, doubled="scale_2" in parts)
    rows, columns = (rows, 2 * columns) if packed == "e2m1" else (rows, columns)
    rows = 2 * rows if packed == "int4" else rows
    block = _block(rows, columns, math.prod(stack), steps.shape, section)
    if block is None:
        raise FormatError(
            f"scales {list(steps.shape)} do not fit a weight {[*stack, rows, columns]}",
            where=scale,
            remedy="use the unquantized checkpoint",
        )
    words = f"{kind} {_unit(rows, columns, block)}"
    return ScaledWeight((*stack, rows, columns), parts, words, block, packed)


def _kind(
    name: str, info: TensorInfo, scale: TensorInfo, *, doubled: bool
) -> tuple[str, str | None]:
    """Name of a kind of number, and the way in which those of 4 bits lie."""
    eight = {**dict.fromkeys(_FP8, "fp8"), torch.int8: "int8"}
    if info.dtype in eight and not doubled:
        mx = info.dtype is torch.float8_e4m3fn and scale.dtype in _BYTES
        return (
            "mxfp8" if mx and scale.shape[-1] * 32 == info.shape[-1] else eight[info.dtype]
        ), None
    if info.dtype is torch.uint8 and scale.dtype is torch.float8_e4m3fn and doubled:
        return "nvfp4", "e2m1"
    if info.dtype is torch.uint8 and scale.dtype in _BYTES and not doubled:
        return "mxfp4", "e2m1"
    if info.dtype is torch.uint8 and scale.dtype in _FLOATS and not doubled:
        return "int4", "int4"
    raise FormatError(
        f"a weight in {_short(info.dtype)} with scales in {_short(scale.dtype)}"
        f"{' of two levels' * doubled} is in no format that is known",
        where=name,
        remedy="use the unquantized checkpoint",
    )


def _block(
    rows: int, columns: int, count: int, scale: tuple[int, ...], section: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where none fit."""
    shape = tuple(side for side in scale if side != 1)
    shape = shape[1:] if count > 1 and shape[:1] == (count,) else shape
    size = section.get("weight_block_size")
    if not shape:
        return rows, columns
    if isinstance(size, list) and len(size) == 2 and all(type(x) is int and x > 0 for x in size):
        grid = (-(-rows // size[0]), -(-columns // size[1]))
        if shape == tuple(side for side in grid if side != 1):
            return size[0], size[1]
    if shape == (rows,):
        return 1, columns
    if len(shape) == 2 and not rows % shape[0] and not columns % shape[1]:
        return rows // shape[0], columns // shape[1]
    if len(shape) == 1 and rows == 1 and not columns % shape[0]:
        return 1, columns // shape[0]
    return None


def _unit(rows: int, columns: int, block: tuple[int, int]) -> str:
    if block == (rows, columns):
        return "with one scale"
    if block[0] == 1:
        return "with a scale a row" if block[1] == columns else f"in groups of {block[1]}"
    return f"in blocks of {block[0]} x {block[1]}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
