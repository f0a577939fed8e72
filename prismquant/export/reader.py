"""A checkpoint in the compressed-tensors format, read back: schemes, rotations, codes, values.

Nothing is read that does not mean one thing: a layer's tensors are those of its scheme and no
others, scales are numbers that can be divided by, codes lie in their range, and what is in floating
point is finite.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from prismquant.errors import FormatError, NumericsError
from prismquant.export.arguments import specification
from prismquant.export.expected import SPLIT_INDEX, SPLIT_WEIGHT
from prismquant.export.kv_section import ROTATED_AT
from prismquant.export.section import PACK, Group, Section, Transform, group_in_prismquant
from prismquant.formats.packed import (
    QuantizedTensor,
    check_layout,
    finite_fault,
    scale_fault,
    unpack,
)
from prismquant.formats.quantized_layer import OutlierColumns, StaticScale
from prismquant.formats.spec import NumberSpec
from prismquant.headers import TensorInfo
from prismquant.storage import ShardReader

_NO_ALIASES: Mapping[str, Collection[str]] = MappingProxyType({})
_WEIGHT_SUFFIXES = (
    *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    *("weight_global_scale", "weight_g_idx"),
)
_COPY = "copy the checkpoint again, or quantize again: its values are damaged"


@dataclass(frozen=True)
class StoredScheme:
    """How one layer of a checkpoint is stored, as its configuration says.

    Attributes:
        weights: The weight's number format.
        layout: ``pack-quantized``, ``int-quantized`` or ``float-quantized``.
        activations: The input's number format, or None.
        outputs: The output's, or None.
        reordered: Whether each input feature says its group (``weight_g_idx``).
        group: The entry of the configuration that says so; None where a plan does.
    """

    weights: NumberSpec
    layout: str
    activations: NumberSpec | None = None
    outputs: NumberSpec | None = None
    reordered: bool = False
    group: Group | None = None


def read_schemes(
    section: Section,
    linears: Collection[str],
    aliases: Mapping[str, Collection[str]] = _NO_ALIASES,
) -> dict[str, StoredScheme]:
    """Which linear layers of a model are stored quantized, and how.

    Args:
        section: The checkpoint's configuration.
        linears: Names of the model's linear layers, as the configuration calls them.
        aliases: Other names that a layer goes by. llm-compressor's ``ignore`` and older releases'
            targets hold names on disk (``visual.blocks.0.attn.qkv``) where transformers 5 has
            other module paths (``model.visual.blocks.0.attn.qkv``).

    Raises:
        FormatError: The method or a format is one that PrismQuant does not read, or the
            configuration has a fault.
    """
    section.require()
    read = {group.name: _read_scheme(group) for group in section.groups}
    schemes: dict[str, StoredScheme] = {}
    for name in linears:
        group = group_in_prismquant((name, *aliases.get(name, ())), section)
        if group is None:
            continue
        if (scheme := read[group.name]) is not None:
            schemes[name] = scheme
        elif group.inputs is not None or group.outputs is not None:
            raise FormatError(
                "a quantized input or output of a layer whose weight is not cannot be read",
                where=name,
                remedy="give the group weights, or ignore the layer",
            )
    return schemes


def _read_scheme(group: Group) -> StoredScheme | None:
    """The scheme of a group; None where it has no weights, as one of attention modules."""
    if group.weights is None:
        return None
    where = f"config_groups, {group.name}"
    if group.layout == str(None):
        raise FormatError(
            "the configuration does not say how weights are laid out",
            where=where,
            remedy="write format in every group",
        )
    try:
        scheme = StoredScheme(
            specification(group.weights, group.layout),
            group.layout,
            activations=specification(group.inputs) if group.inputs else None,
            outputs=specification(group.outputs) if group.outputs else None,
            reordered=group.weights.reordered,
            group=group,
        )
        check_layout(scheme.weights, scheme.layout)
        if scheme.reordered and scheme.layout != PACK:
            raise FormatError(f"{scheme.layout} weights have no groups of columns of their own")
    except FormatError as error:
        raise FormatError(error.what, where=where, remedy=error.remedy) from error
    return scheme


def read_rotations(
    section: Section,
    linears: Mapping[str, int],
    aliases: Mapping[str, Collection[str]] = _NO_ALIASES,
) -> dict[str, int]:
    """Which linear layers of a model rotate their input, and in blocks of what width.

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


def _unread_transform(transform: Transform, where: str) -> FormatError:
    return FormatError(
        f"transform {transform.name!r} ({transform.type} at {where}) cannot be read",
        remedy="only hadamard transforms of inputs are supported, in blocks or across a width that "
        "is a power of two",
    )


# ---------------------------------------------------------------------------------------- tensors


class FiniteReader(ShardReader):
    """A checkpoint of which nothing that is no number gets in."""

    def read(self, name: str) -> Tensor:
        """The tensor.

        Raises:
            NumericsError: It holds NaN or an infinity.
        """
        tensor = super().read(name)
        if fault := finite_fault(tensor):
            raise NumericsError(f"a tensor {fault}", where=name, remedy=_COPY)
        return tensor


class DequantizingReader(ShardReader):
    """A checkpoint seen as if it were in floating point: packed weights are unpacked when they are
    read.

    Args:
        folder: The checkpoint.
        schemes: How layers are stored, and their shapes, by prefix of their names on disk.
    """

    def __init__(
        self, folder: Path, schemes: Mapping[str, tuple[StoredScheme, tuple[int, int]]]
    ) -> None:
        super().__init__(folder)
        self._schemes = schemes
        self._stored = FiniteReader(folder)
        self._own: dict[str, set[str]] = {prefix: set() for prefix in schemes}
        for name in self._stored.names:
            prefix, _, suffix = name.rpartition(".")
            # A bias is a tensor of its own.
            if prefix in self._own and suffix != "bias":
                self._own[prefix].add(name)

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors, each quantized layer's as one ``weight``."""
        hidden = {name for own in self._own.values() for name in own}
        return (self._stored.names - hidden) | {f"{prefix}.weight" for prefix in self._schemes}

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        prefix, _, leaf = name.rpartition(".")
        if leaf != "weight" or prefix not in self._schemes:
            return self._stored.info(name)
        scale = self._stored.info(f"{prefix}.weight_scale")
        return TensorInfo(scale.dtype, self._schemes[prefix][1], scale.file)

    def read(self, name: str) -> Tensor:
        """The tensor; a quantized weight dequantized in float32.

        Raises:
            NumericsError: It holds NaN or an infinity.
            FormatError: A quantized weight is not what its scheme says.
        """
        prefix, _, leaf = name.rpartition(".")
        if leaf != "weight" or prefix not in self._schemes:
            return self._stored.read(name)
        values = self.quantized(prefix).dequantize(torch.float32)
        columns = self.split_columns(prefix)
        if columns is None:
            return values
        return values.index_copy_(1, columns.index, columns.weight.float())

    def quantized(self, prefix: str) -> QuantizedTensor:
        """The codes and scales of the quantized layer of that name on disk."""
        scheme, shape = self._schemes[prefix]
        return read_weight(self._stored, prefix, scheme, shape)

    def static_scale(self, prefix: str, side: str, spec: NumberSpec) -> StaticScale | None:
        """The static scale of a layer's ``input`` or ``output`` in a format that may have one."""
        return static_scale(self._stored, prefix, side, spec)

    def split_columns(self, prefix: str) -> OutlierColumns | None:
        """The columns of a layer that stay in floating point, where there are any."""
        return split_columns(self._stored, prefix, self._schemes[prefix][1])


def read_weight(
    reader: ShardReader, prefix: str, scheme: StoredScheme, shape: tuple[int, int]
) -> QuantizedTensor:
    """The weight of a layer that is stored in codes.

    Args:
        reader: Its tensors as they are stored.
        prefix: What their names begin with.
        scheme: How they are stored.
        shape: ``(out, in)``, as the model has it.

    Raises:
        FormatError: A tensor is missing, unexpected or of another shape; a code or a scale is none.
        NumericsError: A scale is NaN or infinite.
    """
    present = [suffix for suffix in _WEIGHT_SUFFIXES if f"{prefix}.{suffix}" in reader.names]
    try:
        if scheme.reordered != ("weight_g_idx" in present):
            have = "has no" if scheme.reordered else "must not have a"
            raise FormatError(
                f"a weight of {scheme.weights.describe()} {have} weight_g_idx",
                remedy="declare actorder: group exactly where the checkpoint has the index",
            )
        tensors = {suffix: reader.read(f"{prefix}.{suffix}") for suffix in present}
        return unpack(tensors, scheme.weights, scheme.layout, shape)
    except FormatError as error:
        raise FormatError(error.what, where=prefix, remedy=error.remedy) from error


def static_scale(
    reader: ShardReader, prefix: str, side: str, spec: NumberSpec
) -> StaticScale | None:
    """The scale of a layer's input or output that calibration found; None: there is none.

    Args:
        reader: Its tensors as they are stored.
        prefix: What their names begin with.
        side: ``input`` or ``output``.
        spec: Its number format.

    Raises:
        FormatError: It is no positive number, or the zero point is none of the format's.
        NumericsError: It is NaN or infinite.
    """
    name = f"{prefix}.{side}_{'global_scale' if spec.scale == 'e4m3' else 'scale'}"
    zero_name = f"{prefix}.{side}_zero_point"
    if name not in reader.names:
        return None
    scale = reader.read(name)
    zero = reader.read(zero_name) if zero_name in reader.names else None
    fault = scale_fault(scale, signed=False) if scale.numel() == 1 else "is not one number"
    if fault:
        raise FormatError(f"a static scale {fault}", where=name, remedy="calibrate again")
    if zero is not None:
        # Some writers store zeros for symmetric formats.
        most = 0 if spec.symmetric else 1 << (spec.bits - 1)
        low, high = -most, max(0, most - 1)
        if zero.numel() != 1 or zero.is_floating_point() or not low <= int(zero) <= high:
            raise FormatError(
                f"a zero point of {spec.describe()} is {zero.flatten().tolist()[:4]}, outside "
                f"[{low}, {high}]",
                where=zero_name,
                remedy="calibrate again, or delete it where the format is symmetric",
            )
    elif not spec.symmetric:
        raise FormatError(f"{spec.describe()} has no zero point", where=prefix)
    point = None if zero is None or spec.symmetric else zero.to(torch.int8).reshape(1)
    return StaticScale(scale.reshape(1), point)


def split_columns(
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
