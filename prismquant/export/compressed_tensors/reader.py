"""Schemes and tensors of a checkpoint, read back: codes, values, static scales, outlier columns.

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
from prismquant.formats.packed import PackedWeight, check_layout
from prismquant.formats.quantization_args import spec_of
from prismquant.formats.quantized_layer import (
    OutlierColumns,
    QuantizedTensor,
    StaticScale,
    finite_fault,
    scale_fault,
)
from prismquant.formats.section import (
    PACK,
    SPLIT_INDEX,
    SchemeGroup,
    Section,
    group_in_prismquant,
)
from prismquant.formats.spec import NumberSpec
from prismquant.headers import TensorInfo
from prismquant.shards import NO_VIEWS, ShardReader, TensorView

_NO_ALIASES: Mapping[str, Collection[str]] = MappingProxyType({})
_WEIGHT_SUFFIXES = (
    *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    *("weight_global_scale", "weight_g_idx"),
)
_COPY = "copy the checkpoint again, or quantize again: its values are damaged"


@dataclass(frozen=True)
class StoredScheme:
    """The way in which a layer of a checkpoint is stored, as its configuration says.

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
    group: SchemeGroup | None = None


@dataclass(frozen=True)
class StoredLayer:
    """One linear layer of a checkpoint.

    Attributes:
        name: Its module path in transformers.
        called: What the checkpoint's configuration calls it.
        prefix: What its tensors' names begin with on disk.
        shape: ``(out, in)``.
        scheme: How it is stored; None: in floating point.
        rotation: Width of the Hadamard blocks that rotate its input at run time; None: no rotation.
        inputs, outputs: In what numbers its input and its output are; None: floating point. A layer
            that is stored in floating point may have them too.
    """

    name: str
    called: str
    prefix: str
    shape: tuple[int, int]
    scheme: StoredScheme | None
    rotation: int | None
    inputs: NumberSpec | None = None
    outputs: NumberSpec | None = None

    @property
    def is_plain(self) -> bool:
        """True if it is an ordinary linear layer."""
        parts = (self.scheme, self.rotation, self.inputs, self.outputs)
        return all(part is None for part in parts)


def read_schemes(
    section: Section,
    linears: Collection[str],
    aliases: Mapping[str, Collection[str]] = _NO_ALIASES,
) -> dict[str, StoredScheme]:
    """Schemes of the linear layers of a model that are stored quantized.

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


def _read_scheme(group: SchemeGroup) -> StoredScheme | None:
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
            spec_of(group.weights, group.layout),
            group.layout,
            activations=spec_of(group.inputs) if group.inputs else None,
            outputs=spec_of(group.outputs) if group.outputs else None,
            reordered=group.weights.reordered,
            group=group,
        )
        check_layout(scheme.weights, scheme.layout)
        if scheme.reordered and scheme.layout != PACK:
            raise FormatError(f"{scheme.layout} weights have no groups of columns of their own")
    except FormatError as error:
        raise FormatError(error.what, where=where, remedy=error.remedy) from error
    return scheme


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
        views: As for :class:`~prismquant.shards.ShardReader`.
    """

    def __init__(
        self,
        folder: Path,
        schemes: Mapping[str, tuple[StoredScheme, tuple[int, int]]],
        views: Mapping[str, TensorView] = NO_VIEWS,
    ) -> None:
        super().__init__(folder, views=views)
        self._schemes = schemes
        self._stored = FiniteReader(folder, views=views)
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
        columns = self.outlier_columns(prefix)
        if columns is None:
            return values
        return values.index_copy_(1, columns.index, columns.weight.float())

    def packed(self, prefix: str) -> PackedWeight:
        """The weight of the quantized layer of that name on disk, as it lies there."""
        scheme, shape = self._schemes[prefix]
        return read_packed(self._stored, prefix, scheme, shape)

    def quantized(self, prefix: str) -> QuantizedTensor:
        """The codes and scales of the quantized layer of that name on disk."""
        return _unpacked(self.packed(prefix), prefix)

    def static_scale(self, prefix: str, side: str, spec: NumberSpec) -> StaticScale | None:
        """The static scale of a layer's ``input`` or ``output`` in a format that may have one."""
        return static_scale(self._stored, prefix, side, spec)

    def outlier_columns(self, prefix: str) -> OutlierColumns | None:
        """The columns of a layer that stay in floating point, where there are any."""
        if f"{prefix}.{SPLIT_INDEX}" not in self._stored.names:
            return None
        from prismquant.export.compressed_tensors.layer_edits import read_outlier_columns

        return read_outlier_columns(self._stored, prefix, self._schemes[prefix][1])


def read_weight(
    reader: ShardReader, prefix: str, scheme: StoredScheme, shape: tuple[int, int]
) -> QuantizedTensor:
    """The codes and scales of a layer's weight; arguments and errors as of :func:`read_packed`.

    Raises:
        FormatError: A tensor is of another shape; a code or a scale is none.
    """
    return _unpacked(read_packed(reader, prefix, scheme, shape), prefix)


def _unpacked(packed: PackedWeight, prefix: str) -> QuantizedTensor:
    try:
        return packed.unpack()
    except FormatError as error:
        raise FormatError(error.what, where=prefix, remedy=error.remedy) from error


def read_packed(
    reader: ShardReader, prefix: str, scheme: StoredScheme, shape: tuple[int, int]
) -> PackedWeight:
    """The weight of a layer that is stored in codes, as it lies in the checkpoint.

    Args:
        reader: Its tensors as they are stored.
        prefix: What their names begin with.
        scheme: How they are stored.
        shape: ``(out, in)``, as the model has it.

    Raises:
        FormatError: There is an index of groups that is not declared, or none that is.
        NumericsError: A scale is NaN or infinite.
    """
    present = [suffix for suffix in _WEIGHT_SUFFIXES if f"{prefix}.{suffix}" in reader.names]
    if scheme.reordered != ("weight_g_idx" in present):
        have = "has no" if scheme.reordered else "must not have a"
        raise FormatError(
            f"a weight of {scheme.weights.describe()} {have} weight_g_idx",
            where=prefix,
            remedy="declare actorder: group exactly where the checkpoint has the index",
        )
    tensors = {suffix: reader.read(f"{prefix}.{suffix}") for suffix in present}
    return PackedWeight(tensors, scheme.weights, scheme.layout, shape)


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
