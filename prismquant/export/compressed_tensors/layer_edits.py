"""Edits of layers' inputs on disk: rotations at run time, and columns that stay in floating point.

Rotations are declared as transforms of the configuration, each with its matrix; the signs before
them, and the columns, are tensors that PrismQuant alone reads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.formats.online_rotation import OnlineRotation
from prismquant.formats.quantized_layer import OutlierColumns
from prismquant.formats.section import (
    ROTATED_AT,
    SIGNS,
    SPLIT_INDEX,
    SPLIT_WEIGHT,
    DeclaredTransform,
    Section,
)
from prismquant.numerics.hadamard import hadamard_matrix

if TYPE_CHECKING:
    from prismquant.shards import ShardReader

_NO_ALIASES: Mapping[str, Collection[str]] = MappingProxyType({})


def read_rotations(
    section: Section,
    linears: Mapping[str, int],
    aliases: Mapping[str, Collection[str]] = _NO_ALIASES,
) -> dict[str, int]:
    """Widths of the blocks in which linear layers of a model rotate their input.

    Transforms of weights were applied before these were stored, and need nothing of a reader.

    Args:
        section: The checkpoint's configuration.
        linears: Input features of the model's linear layers, by what the configuration calls them.
        aliases: Other names that a layer goes by.

    Raises:
        FormatError: A transform is one that PrismQuant does not have.
    """
    section.require()
    found: dict[str, int] = {}
    for transform in section.transforms:
        known = transform.type == "hadamard" and not transform.randomize
        for apply in transform.applies:
            if apply.location.startswith("weight_") or (known and apply.location in ROTATED_AT):
                continue  # done, or of queries and keys: the key-value cache's affair
            if not known or apply.location != "input":
                raise _unread_transform(transform, apply.location)
            for linear, width in linears.items():
                names = (linear, *aliases.get(linear, ()))
                hit = apply.targets.hit(names, section.matcher)
                if hit and not apply.ignore.hit(names, section.matcher):
                    block = transform.head_dim or width
                    # Across a whole width the library takes other matrices than we have.
                    fits = width % block == 0 and block & (block - 1) == 0
                    if not fits:
                        raise _unread_transform(transform, apply.location)
                    found[linear] = block
    return found


def _unread_transform(transform: DeclaredTransform, where: str) -> FormatError:
    return FormatError(
        f"transform {transform.name!r} ({transform.type} at {where}) cannot be read",
        remedy="only hadamard transforms of inputs are supported, in blocks or across a width that "
        "is a power of two",
    )


def transform_name(block: int) -> str:
    """Name of the configuration's transform that rotates in blocks of this width."""
    return f"hadamard_{block}"


def rotation_tensors(rotation: OnlineRotation, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors by which readers rotate a layer's input, by the end of their names: matrix, signs."""
    matrix = hadamard_matrix(rotation.block).to(dtype)
    tensors = {f"{transform_name(rotation.block)}_input.weight": matrix}
    return tensors if rotation.signs is None else tensors | {SIGNS: rotation.signs}


def read_signs(reader: ShardReader, prefix: str, features: int) -> Tensor | None:
    """Signs of a layer's input before its rotation, int8 ``[in]``; None: ones.

    Raises:
        FormatError: They are none.
    """
    if f"{prefix}.{SIGNS}" not in reader.names:
        return None
    signs = reader.read(f"{prefix}.{SIGNS}")
    if tuple(signs.shape) != (features,) or not bool((signs.abs() == 1).all()):
        raise FormatError(
            f"{SIGNS} are not {features} numbers of 1 and -1",
            where=prefix,
            remedy="copy the checkpoint again",
        )
    return signs


def column_tensors(
    found: OutlierColumns | None, room: int, out_features: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Columns in floating point as tensors, by the end of their names.

    Args:
        found: Those that calibration has found.
        room: As many as the plan made room for; what is left is padded with index -1.
        out_features: Of the layer.
        dtype: Of the columns.
    """
    index = torch.full((room,), -1, dtype=torch.int32)
    weight = torch.zeros(out_features, room, dtype=dtype)
    if found is not None:
        count = len(found.index)
        index[:count] = found.index.to(index)
        weight[:, :count] = found.weight.to(weight)
    return {SPLIT_INDEX: index, SPLIT_WEIGHT: weight}


def read_outlier_columns(
    reader: ShardReader, prefix: str, shape: tuple[int, int]
) -> OutlierColumns | None:
    """The columns of a layer that stay in floating point, where there are any.

    Args:
        reader: Its tensors as they are stored.
        prefix: What their names begin with.
        shape: ``(out, in)``, as the model has it.

    Raises:
        FormatError: The indices are none of the layer's columns, or do not fit what is stored.
        NumericsError: A column is not finite.
    """
    if f"{prefix}.{SPLIT_INDEX}" not in reader.names:
        return None
    index = reader.read(f"{prefix}.{SPLIT_INDEX}").long()
    weight = reader.read(f"{prefix}.{SPLIT_WEIGHT}")
    used = index >= 0
    kept = index[used]
    if index.ndim != 1 or tuple(weight.shape) != (shape[0], len(index)):
        raise FormatError(
            f"{SPLIT_WEIGHT} is {list(weight.shape)}, not {[shape[0], index.numel()]}",
            where=prefix,
        )
    if not len(kept):
        return None
    if len(kept.unique()) != len(kept) or int(kept.max()) >= shape[1]:
        raise FormatError(
            f"{SPLIT_INDEX} names a column twice, or one of {shape[1]} that is not there",
            where=prefix,
        )
    return OutlierColumns(kept, weight[:, used])
