"""Checkpoints of numbers with scales beside them: FP8 of transformers, and ModelOpt's formats.

Which format a weight has is told by the dtypes and shapes of its tensors, not by names of layers in
a configuration: one file may hold several.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

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
_MODELOPT = "modelopt"
_BLOCK_SIZE = "weight_block_size"


@dataclass(frozen=True)
class _Numbers:
    """A kind of number.

    Attributes:
        name: In words.
        packed: As of :class:`~prismquant.sources.source_weight.ScaledWeight`.
        declared: Whether ``weight_block_size`` is about it.
    """

    name: str
    packed: str | None = None
    declared: bool = False


def scaled_weights(source: SourceHeaders) -> Iterator[tuple[str, ScaledWeight]]:
    """Weights in codes that have a scale beside them, by the name that they have in floating point.

    Raises:
        FormatError: A weight in codes has no scale, two of them, or one of another shape or dtype
            than its format and ``weight_block_size`` say; a scale has no weight in codes.
    """
    for name, info in source.infos.items():
        if name.endswith(_SCALES):
            _require_codes(name, source)
        elif info.dtype in _CODED and len(info.shape) >= 2:
            yield name, _scaled(name, _scale_of(name, source), source)


def _require_codes(scale: str, source: SourceHeaders) -> None:
    """Refuse a scale of a weight that is not there, or is in floating point."""
    name = next(scale.removesuffix(end) for end in _SCALES if scale.endswith(end))
    info = source.infos.get(name)
    if info is None and name.endswith("weight"):
        raise FormatError(
            f"a scale is there, and its weight {name} is not",
            where=source.place(scale),
            remedy=source.copy_again(scale),
        )
    if info is not None and info.dtype not in _CODED and len(info.shape) >= 2:
        raise FormatError(
            f"a scale lies beside {name}, whose {_short(info.dtype)} numbers are no codes: nothing "
            "tells whether they are multiplied by it already",
            where=source.place(scale),
            remedy=source.copy_again(name),
        )


def _scale_of(name: str, source: SourceHeaders) -> str:
    """Name of the one scale of a weight.

    Raises:
        FormatError: There is none, or there are two.
    """
    found = [f"{name}{end}" for end in _SCALES if f"{name}{end}" in source.infos]
    if len(found) == 1:
        return found[0]
    raise FormatError(
        f"a weight is stored as {_short(source.infos[name].dtype)}, and "
        + (f"two scales beside it, {' and '.join(found)}" if found else "no scale beside it"),
        where=source.place(name),
        remedy=source.copy_again(name),
    )


def _scaled(name: str, scale: str, source: SourceHeaders) -> ScaledWeight:
    infos = source.infos
    info, steps = infos[name], infos[scale]
    parts = {"weight": name, "scale": scale}
    if f"{name}_scale_2" in infos:
        parts["scale_2"] = f"{name}_scale_2"
    *stack, rows, columns = info.shape
    numbers = _numbers(name, scale, source, doubled="scale_2" in parts)
    rows, columns = (rows, 2 * columns) if numbers.packed == "e2m1" else (rows, columns)
    rows = 2 * rows if numbers.packed == "int4" else rows
    # ModelOpt's: the input is multiplied by it, which is the same as the weight's columns.
    factors = f"{name.rpartition('.')[0]}.pre_quant_scale"
    if factors in infos:
        parts["columns"] = factors
    shape = (*stack, rows, columns)
    _check_sides(parts, shape, source)
    block = _block(shape, steps.shape, _declared(source) if numbers.declared else None)
    if block is None:
        said = f" in blocks of {source.section[_BLOCK_SIZE]}, which {_BLOCK_SIZE} names"
        raise FormatError(
            f"scales {list(steps.shape)} do not fit a weight {list(shape)}"
            + said * (numbers.declared and _declared(source) is not None),
            where=source.place(scale),
            remedy=source.copy_again(scale),
        )
    return ScaledWeight(
        shape, parts, f"{numbers.name} {_unit(rows, columns, block)}", block, numbers.packed
    )


def _check_sides(parts: dict[str, str], shape: tuple[int, ...], source: SourceHeaders) -> None:
    """Refuse factors of columns, and scales of scales, that do not fit a weight."""
    counts = {"scale_2": {1, math.prod(shape[:-2])}, "columns": {shape[-1]}}
    for part, fitting in counts.items():
        found = source.infos[parts[part]].shape if part in parts else None
        if found is not None and math.prod(found) not in fitting:
            raise FormatError(
                f"{list(found)} numbers do not fit a weight {list(shape)}",
                where=source.place(parts[part]),
                remedy=source.copy_again(parts[part]),
            )


def _numbers(name: str, scale: str, source: SourceHeaders, *, doubled: bool) -> _Numbers:
    """The kind of number that a weight has, by the dtypes of its tensors.

    Raises:
        FormatError: No known format has such tensors.
    """
    info, steps = source.infos[name], source.infos[scale]
    found = _kind(info, steps, doubled=doubled, modelopt=_is_modelopt(source))
    if found is None:
        said = f"a weight in {_short(info.dtype)} with scales in {_short(steps.dtype)}"
        raise FormatError(
            f"{said} {list(steps.shape)}{' of two levels' * doubled} is in no format of "
            f"quant_method {source.section.get('quant_method')!r}",
            where=source.place(name),
            remedy=source.copy_again(name),
        )
    return found


def _is_modelopt(source: SourceHeaders) -> bool:
    return str(source.section.get("quant_method", "")).lower() == _MODELOPT


def _kind(info: TensorInfo, scale: TensorInfo, *, doubled: bool, modelopt: bool) -> _Numbers | None:
    """A kind of number; None: there is none with these dtypes.

    Bytes of integers mean two numbers of four bits to transformers, eight bits to ModelOpt.
    """
    eights = bool(scale.shape) and scale.dtype in _BYTES
    if doubled:
        two = info.dtype is torch.uint8 and scale.dtype is torch.float8_e4m3fn
        return _Numbers("nvfp4", "e2m1") if two else None
    if info.dtype in _FP8 and scale.dtype in (*_FLOATS, *_BYTES):
        mx = info.dtype is torch.float8_e4m3fn and eights
        mx = mx and scale.shape[-1] * 32 == info.shape[-1]
        return _Numbers("mxfp8" if mx else "fp8", declared=not modelopt)
    if not modelopt:
        mx = info.dtype is torch.int8 and eights and scale.shape[-1] * 16 == info.shape[-1]
        return _Numbers("mxfp4", "e2m1") if mx else None
    if info.dtype is torch.int8 and scale.dtype in _FLOATS:
        return _Numbers("int8")
    if info.dtype is torch.uint8 and scale.dtype in _BYTES:
        return _Numbers("mxfp4", "e2m1")
    if info.dtype is torch.uint8 and scale.dtype in _FLOATS:
        return _Numbers("int4", "int4")
    return None


def _declared(source: SourceHeaders) -> tuple[int, int] | None:
    """Rows and columns of blocks by the configuration; None: it names none.

    Raises:
        FormatError: What it says are no two numbers.
    """
    size = source.section.get(_BLOCK_SIZE)
    if size is None:
        return None
    if isinstance(size, list) and len(size) == 2 and all(type(x) is int and x > 0 for x in size):
        return size[0], size[1]
    raise FormatError(
        f"{_BLOCK_SIZE} is {size!r}, not a list of rows and columns",
        where="config.json: quantization_config",
        remedy="restore config.json from the original checkpoint",
    )


def _block(
    shape: tuple[int, ...], scale: tuple[int, ...], declared: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where none fit.

    Args:
        shape: Of the weight, ``[.., out, in]``.
        scale: Shape of its scales.
        declared: Rows and columns by the configuration, if it names them.
    """
    *stack, rows, columns = shape
    if declared is not None:
        grid = (-(-rows // declared[0]), -(-columns // declared[1]))
        one = math.prod(scale) == 1 == math.prod((*stack, *grid))
        return declared if one or scale == (*stack, *grid) else None
    own = scale[len(stack) :] if stack and scale[: len(stack)] == tuple(stack) else scale
    if math.prod(own) == 1:
        return rows, columns
    own = own if len(own) < 3 else tuple(side for side in own if side != 1)
    if len(own) == 1:
        own = (rows, 1) if own == (rows,) else (1, *own) if rows == 1 else own
    fits = len(own) == 2 and all(own) and not rows % own[0] and not columns % own[1]
    return (rows // own[0], columns // own[1]) if fits else None


def _unit(rows: int, columns: int, block: tuple[int, int]) -> str:
    if block == (rows, columns):
        return "with one scale"
    if block[0] == 1:
        return "with a scale a row" if block[1] == columns else f"in groups of {block[1]}"
    return f"in blocks of {block[0]} x {block[1]}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
