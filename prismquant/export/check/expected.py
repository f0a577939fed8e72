"""The tensors that a layer must have on disk, by layout: names, shapes and dtypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prismquant.export.check.scheme import (
    FLOAT,
    INT,
    MXFP4,
    MXFP6,
    MXFP8,
    NAIVE,
    NVFP4,
    PACK,
    Args,
    Group,
)

REAL = (torch.bfloat16, torch.float16, torch.float32)
SCALES = (*REAL, torch.float64)
_E4M3, _E8M0 = (torch.float8_e4m3fn,), (torch.uint8, torch.float8_e8m0fnu)
_WORD = 32


@dataclass(frozen=True)
class Expected:
    """One tensor.

    Attributes:
        shapes: Those that readers take; the first is the usual one.
        dtypes: Likewise.
        required: Whether readers miss it.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    required: bool = True


def expected_tensors(group: Group, rows: int, columns: int) -> dict[str, Expected]:
    """The tensors of one layer by suffix; empty for a layout without a rule.

    Args:
        group: Its group; well formed.
        rows, columns: Out and in features.
    """
    weights = group.weights
    if weights is None:
        return {}
    tensors = _weight_tensors(group.layout, weights, rows, columns)
    if not tensors:
        return {}
    return tensors | _static("input", group) | _static("output", group)


def scale_shapes(args: Args, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
    """Shapes that the scale of a weight may have."""
    if args.strategy == "tensor":
        return ((1,), (), (1, 1))
    if args.strategy == "block" and args.block is not None:
        high, wide = args.block
        return ((-(-rows // high), -(-columns // wide)),)
    if args.per_block and args.group_size:
        return ((rows, -(-columns // args.group_size)),)
    return ((rows, 1), (rows,))


def padded_words(columns: int, bits: int) -> int:
    """int32 words a row where no code straddles two, as older libraries packed them."""
    return -(-columns // (_WORD // bits))


def _weight_tensors(layout: str, args: Args, rows: int, columns: int) -> dict[str, Expected]:
    plain = ((rows, columns),)
    scales = scale_shapes(args, rows, columns)
    if layout == PACK:
        return _packed(args, rows, columns)
    if layout == INT:
        tensors = {
            "weight": Expected(plain, (torch.int8,)),
            "weight_scale": Expected(scales, SCALES),
        }
        if not args.symmetric:
            tensors["weight_zero_point"] = Expected(scales, (torch.int8,))
        return tensors
    if layout in (FLOAT, NAIVE):
        return {
            "weight": Expected(plain, _E4M3),
            "weight_scale": Expected(scales, SCALES),
        }
    if layout == NVFP4:
        return {
            "weight_packed": Expected(((rows, -(-columns // 2)),), (torch.uint8,)),
            "weight_scale": Expected(scales, _E4M3),
            "weight_global_scale": Expected(((1,), ()), SCALES),
        }
    if layout == MXFP4:
        return {
            "weight_packed": Expected(((rows, -(-columns // 2)),), (torch.uint8,)),
            "weight_scale": Expected(scales, _E8M0),
        }
    if layout == MXFP6:
        return {
            "weight_packed": Expected(((rows, -(-columns * 3 // 4)),), (torch.uint8,)),
            "weight_scale": Expected(scales, _E8M0),
        }
    if layout == MXFP8:
        return {"weight": Expected(plain, _E4M3), "weight_scale": Expected(scales, _E8M0)}
    return {}


def _packed(args: Args, rows: int, columns: int) -> dict[str, Expected]:
    scales = scale_shapes(args, rows, columns)[:1]
    tensors = {
        "weight_packed": Expected(((rows, _words(columns, args.bits)),), (torch.int32,)),
        "weight_scale": Expected(scales, SCALES),
        "weight_shape": Expected(((2,),), (torch.int64,)),
    }
    if not args.symmetric:
        shape = (_words(rows, args.bits), scales[0][1])
        tensors["weight_zero_point"] = Expected((shape,), (torch.int32,))
    return tensors


def _static(side: str, group: Group) -> dict[str, Expected]:
    """Scales that were found by calibration."""
    args = group.inputs if side == "input" else group.outputs
    if args is None:
        return {}
    if args.strategy == "tensor_group":
        known = args.dynamic in ("local", False)
        return {f"{side}_global_scale": Expected(((1,), ()), SCALES)} if known else {}
    if args.dynamic:
        return {}
    shapes: tuple[tuple[int, ...], ...] = ((1,), (), (1, 1))
    tensors = {f"{side}_scale": Expected(shapes, SCALES)}
    # Libraries write zeros for symmetric inputs too, in some versions.
    if not args.symmetric:
        tensors[f"{side}_zero_point"] = Expected(shapes, (torch.int8,))
    return tensors


def _words(count: int, bits: int) -> int:
    return -(-count * bits // _WORD)
