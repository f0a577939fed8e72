"""Checkpoints in the compressed-tensors format, whoever wrote them, as sources."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.formats.packed import PackedWeight, bit_layout, check_layout
from prismquant.formats.quantization_args import spec_of
from prismquant.formats.section import CONFIG_KEY, SPLIT_INDEX, SchemeGroup, Section
from prismquant.formats.section_grammar import read_section
from prismquant.formats.spec import NumberSpec
from prismquant.shards import ShardReader
from prismquant.sources.source_headers import SourceHeaders
from prismquant.sources.source_weight import SourceWeight

_SUFFIXES = (
    *("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_global_scale"),
    *("weight_g_idx", "weight_shape"),
)
# Parts that nothing has but a weight in codes.
_CODED = ("weight_packed", "weight_scale")
_BYTES = (torch.int8, torch.uint8, torch.float8_e4m3fn)
_WORDS = (torch.int32, torch.uint8)
_RUN_TIME = ("input", "output")
_WORD_BITS = 32


@dataclass(frozen=True)
class CompressedWeight(SourceWeight):
    """A weight in one of the layouts of the compressed-tensors format; parts by their suffixes.

    Attributes:
        spec: Its number format.
        layout: One of :data:`~prismquant.formats.packed.LAYOUTS`.
    """

    spec: NumberSpec
    layout: str

    def values(self, stored: ShardReader, dtype: torch.dtype, index: int | None = None) -> Tensor:
        """Codes less zero points, times scales."""
        tensors = {suffix: stored.read(name) for suffix, name in self.parts.items()}
        packed = PackedWeight(tensors, self.spec, self.layout, (self.shape[0], self.shape[1]))
        try:
            return packed.unpack().dequantize(dtype)
        except FormatError as error:
            # Its remedies are for whoever writes such a weight.
            raise FormatError(error.what) from error


def compressed_weights(source: SourceHeaders) -> Iterator[tuple[str, SourceWeight]]:
    """Weights in codes, by the name that they have in floating point.

    Raises:
        FormatError: The configuration cannot be read, does not cover a weight, or says that inputs
            are transformed at run time.
    """
    if not (prefixes := list(dict.fromkeys(_prefixes(source)))):
        return
    section = read_section({CONFIG_KEY: source.section})
    section.require()
    _refuse_run_time(source, section)
    specs = {group.name: _spec(group) for group in section.groups}
    shards: list[ShardReader] = []
    for prefix in prefixes:
        parts = {
            suffix: f"{prefix}.{suffix}"
            for suffix in _SUFFIXES
            if f"{prefix}.{suffix}" in source.infos
        }
        group = _group(source.called(prefix), section)
        spec = None if group is None else specs[group.name]
        if group is None or spec is None:
            raise FormatError(
                f"{prefix} is stored in codes, and no entry of config_groups is about it",
                where=source.place(next(iter(parts.values()))),
                remedy="restore config.json from the original checkpoint",
            )
        _require_parts(source, prefix, parts, spec, group.layout)
        shape = _shape(source, parts, spec, shards)
        _require_shapes(source, parts, spec, shape)
        form = spec.describe()
        yield f"{prefix}.weight", CompressedWeight(shape, parts, form, spec, group.layout)


def _prefixes(source: SourceHeaders) -> Iterator[str]:
    """Names of layers whose weights are stored in codes, or of which a part of such is there."""
    for name, info in source.infos.items():
        prefix, _, suffix = name.rpartition(".")
        if suffix in _CODED or (suffix == "weight" and info.dtype in _BYTES):
            yield prefix


def _require_parts(
    source: SourceHeaders, prefix: str, parts: dict[str, str], spec: NumberSpec, layout: str
) -> None:
    """Refuse a weight of which a tensor is missing, or one too many.

    Raises:
        FormatError: It names what is missing, and the file that it should be in.
    """
    try:
        bit_layout(layout).check_names(parts, spec)
    except FormatError as error:
        found = next(iter(parts.values()))
        raise FormatError(
            f"{prefix}: {error.what}", where=source.place(found), remedy=source.copy_again(found)
        ) from error


def _require_shapes(
    source: SourceHeaders, parts: dict[str, str], spec: NumberSpec, shape: tuple[int, int]
) -> None:
    """Refuse codes and scales that do not belong together.

    Raises:
        FormatError: It names both tensors.
    """
    coded, scale = parts.get("weight_packed") or parts["weight"], parts["weight_scale"]
    width, steps = source.infos[coded].shape[-1], source.infos[scale].shape
    filled = shape[1]
    if "weight_packed" in parts:
        per_unit = 8 if source.infos[coded].dtype is torch.uint8 else _WORD_BITS
        filled = -(-shape[1] * spec.bits // per_unit)
    whole = spec.group_size is None or not shape[1] % spec.group_size
    if not whole or filled != width or math.prod(steps) != math.prod(spec.scale_shape(*shape)):
        raise FormatError(
            f"{scale} {list(steps)} does not fit {coded} {list(source.infos[coded].shape)} in "
            f"{spec.describe()}",
            where=source.place(scale),
            remedy=source.copy_again(scale),
        )


def _group(names: tuple[str, ...], section: Section) -> SchemeGroup | None:
    """The entry that is about a layer; what is ignored is not in codes, whatever it is called."""
    hits = [
        (hit, place)
        for place, group in enumerate(section.groups)
        if (hit := group.targets.hit(names, section.matcher)) is not None
    ]
    return section.groups[min(hits)[1]] if hits else None


def _spec(group: SchemeGroup) -> NumberSpec | None:
    if group.weights is None:
        return None
    try:
        spec = spec_of(group.weights, group.layout)
        check_layout(spec, group.layout)
    except FormatError as error:
        where = f"config_groups, {group.name}"
        raise FormatError(error.what, where=where, remedy=error.remedy) from error
    return spec


def _shape(
    source: SourceHeaders, parts: dict[str, str], spec: NumberSpec, shards: list[ShardReader]
) -> tuple[int, int]:
    """Rows and columns of a weight; of one that is packed from what fixes them."""
    coded = parts.get("weight_packed") or parts["weight"]
    info = source.infos[coded]
    fits = info.dtype in (_WORDS if coded.endswith("_packed") else _BYTES)
    if len(info.shape) != 2 or not fits or not source.infos[parts["weight_scale"]].shape:
        raise FormatError(
            f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)} is no matrix of codes in "
            f"{spec.describe()}",
            where=source.place(coded),
            remedy=source.copy_again(coded),
        )
    rows, width = info.shape
    if "weight_packed" not in parts:
        return rows, width
    if source.infos[coded].dtype is torch.uint8:
        return rows, width * 8 // spec.bits
    if spec.group_size is not None:
        return rows, source.infos[parts["weight_scale"]].shape[-1] * spec.group_size
    if "weight_shape" not in parts:
        return rows, width * _WORD_BITS // spec.bits
    # The last word of a row may be filled up: sixteen bytes of the checkpoint say it.
    if not shards:
        shards.append(ShardReader(source.folder))
    said = shards[0].read(parts["weight_shape"]).flatten().tolist()
    return (rows, int(said[-1])) if said else (rows, width * _WORD_BITS // spec.bits)


def _refuse_run_time(source: SourceHeaders, section: Section) -> None:
    """Refuse weights that belong to an input which is changed at run time.

    Raises:
        FormatError: There are such.
    """
    applies = [apply for one in section.transforms for apply in one.applies]
    split = next((name for name in source.infos if name.endswith(f".{SPLIT_INDEX}")), None)
    if split or any(apply.location in _RUN_TIME for apply in applies):
        raise FormatError(
            "columns of weights are stored apart"
            if split
            else "inputs of layers are rotated at run time, and weights with them",
            where=split or "transform_config",
            remedy="write it in floating point first: `prismquant export DIR --format dense --out "
            "OUT`, and use that",
        )
    sparse = source.section.get("sparsity_config") or {}
    if sparse.get("format") not in (None, "dense"):
        raise FormatError(
            f"sparse weights ({sparse['format']}) cannot be read",
            where="sparsity_config",
            remedy="use the checkpoint that it was made from",
        )
