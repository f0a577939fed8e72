"""Attributes of ModelOpt's quantizers, as number formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prismquant.errors import PrismQuantError
from prismquant.formats.spec import spec
from prismquant.recipe.importers.ledger import joined, quoted, shown
from prismquant.recipe.importers.quantizer_names import Kind
from prismquant.recipe.importers.source_section import Setting, SourceSection, Table, idle

ATTRIBUTES: Table = (
    Setting("num_bits", "8", "bits, kind", "an integer, (E, M), or a word such as e4m3"),
    Setting("axis", "null", "granularity", "0: channel, of weights; null: tensor"),
    Setting("block_sizes", "null", "granularity, group_size, scale", "see below"),
    Setting("type", "static", "dynamic", "dynamic tensor scales become token"),
    Setting("narrow_range", "false", "narrow", "codes at absmax are the same either way"),
    Setting("unsigned", "false", "", "true is an error"),
    Setting("enable", "true", "skip, activations: none"),
    Setting("calibrator", "max", "activation_range", "histogram: percentile 0.9999"),
    Setting("rotate", "false", "", "true is an error; nearest: transforms: rotation"),
    Setting("bias", "null", "", "an error: a cache is symmetric"),
    Setting("backend", "null", "", "an error: formats are ours"),
    Setting("use_constant_amax", "false", "kv_cache", "scales are calibrated"),
    Setting("constant_amax", "null", "activations", "scales are calibrated"),
    idle("effective_bits", "bytes are counted exactly"),
    idle("fake_quant", "what is simulated is what is stored"),
    idle("learn_amax", "never read there", "tuner: autoround"),
    idle("trt_high_precision_dtype", "about another file format"),
    idle("pass_through_bwd", "nothing is trained through a quantizer"),
    idle("backend_extra_args", "of a backend"),
)
BLOCK_SIZES: Table = (
    Setting("-1", "null", "group_size", "null: the whole axis; inputs: token"),
    Setting("-2", "null", "granularity: block", "as large as that of -1"),
    Setting("type", "static", "dynamic"),
    Setting("scale_bits", "null", "scale", "(4, 3): NVFP4; (8, 0): MX, rounded up"),
    Setting("four_over_six", "null", "weight_range: four_over_six"),
    idle("scale_block_sizes", "the global scale is of the tensor"),
)

_FLOATS: Mapping[Any, str] = {
    (4, 3): "fp8",
    (5, 2): "fp8-e5m2",
    (3, 2): "fp6-e3m2",
    (2, 3): "fp6-e2m3",
    (2, 1): "fp4",
}
_MX: Mapping[Any, str] = {
    (4, 3): "mxfp8",
    (5, 2): "mxfp8-e5m2",
    (3, 2): "mxfp6-e3m2",
    (2, 3): "mxfp6",
    (2, 1): "mxfp4",
    8: "mxint8",
}
_WORDS = {f"e{e}m{m}": (e, m) for e, m in _FLOATS} | {"e8m0": (8, 0)}


@dataclass(frozen=True)
class Quantizer:
    """Work of a quantizer.

    Attributes:
        name: Of the number format; None where it cannot be had, which is noted.
        four_over_six: Whether blocks choose between two scales.
        histogram: Whether a static range is clipped.
    """

    name: str | None
    four_over_six: bool = False
    histogram: bool = False


def quantizer_of(section: SourceSection, kind: Kind, cache: bool = False) -> Quantizer:
    """The number format that attributes mean, with notes on all of them.

    Args:
        section: The attributes, read against :data:`ATTRIBUTES`.
        kind: Of the quantizer.
        cache: Whether it is of keys or values, as inputs of attention.
    """
    _refuse(section)
    bits = _bits(section, "num_bits", 8)
    blocks = _blocks(section)
    name = _name(section, kind, bits, blocks)
    if name is not None:
        try:
            name = spec(name).name
        except PrismQuantError as error:
            section.ledger.wrong(section.place, "; ".join(filter(None, (error.what, error.remedy))))
            name = None
    told = f"{_SIDES[kind]}: {name}"
    if cache:
        told = f"kv_cache.format: {(name or '').partition('-')[0]}"
    for key in ("num_bits", "axis", "narrow_range", "unsigned", "rotate", "enable"):
        section.honoured(key, told)
    dynamic = section.content.get("type") == "dynamic"
    if dynamic and kind != "weight_quantizer" and "block_sizes" not in section:
        section.changed("type", told, "a scale for each token, which is finer: tensor is static")
    else:
        section.honoured("type", told)
    for key in ("use_constant_amax", "constant_amax"):
        section.changed(key, told, "scales are calibrated")
    section.honoured("block_sizes", told)
    histogram = section.word("calibrator", "max", ("max", "histogram")) == "histogram"
    clipped = kind != "weight_quantizer" and not cache and "-tensor" in (name or "")
    if histogram and not clipped:
        histogram = False
        section.dropped("calibrator", "only static ranges of inputs are clipped")
    elif histogram:
        section.changed("calibrator", "activation_range: percentile", "of 0.9999 of the values")
    else:
        section.honoured("calibrator", told)
    return Quantizer(name, bool(blocks.get("four_over_six")), histogram)


_SIDES: Mapping[Kind, str] = {
    "weight_quantizer": "weights",
    "input_quantizer": "activations",
    "output_quantizer": "outputs",
}


def _refuse(section: SourceSection) -> None:
    if section.flag("unsigned", False):
        section.wrong("unsigned", "codes have a sign here: leave it out")
    if section.content.get("rotate"):
        section.wrong("rotate", "rotations are transforms here: transforms: [{name: rotation}]")
    for key in ("bias", "backend"):
        if key in section:
            section.wrong(key, "nothing here is like it: leave it out")


def _bits(section: SourceSection, key: str, default: Any) -> int | tuple[int, ...] | None:
    """A width, or exponent and mantissa."""
    value = section.content.get(key, default)
    if isinstance(value, str):
        value = _WORDS.get(value.lower(), value)
    if isinstance(value, list | tuple) and all(isinstance(one, int) for one in value):
        return tuple(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if value is not None:
        section.wrong(key, f"an integer, (E, M) or a word such as e4m3, not {quoted(value)}")
    return None


def _blocks(section: SourceSection) -> Mapping[str, Any]:
    """Block sizes with keys that are words."""
    value = section.content.get("block_sizes")
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        section.wrong("block_sizes", f"expected a mapping, found {quoted(value)}")
        return {}
    place = joined(section.place, "block_sizes")
    found = {str(key): one for key, one in value.items()}
    own = SourceSection(section.ledger, place, found, BLOCK_SIZES)
    for key in ("-1", "-2"):
        size = own.content.get(key)
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            own.wrong(key, f"a size or null, not {quoted(size)}")
    for key in found:
        if key not in ("scale_block_sizes",):
            own.honoured(key, "its format")
    return dict(own.content) | {"scale_bits": _bits(own, "scale_bits", None)}


def _name(
    section: SourceSection,
    kind: Kind,
    bits: int | tuple[int, ...] | None,
    blocks: Mapping[str, Any],
) -> str | None:
    """Name of the format, as far as it is one."""
    if bits is None:
        return None
    scale = blocks.get("scale_bits")
    inputs = kind != "weight_quantizer"
    dynamic = "dynamic" in (section.content.get("type"), blocks.get("type"))
    if scale == (4, 3):
        return _with_group(section, blocks, 16, "nvfp4-dyn" if inputs else "nvfp4", bits, (2, 1))
    if scale == (8, 0):
        mx = _MX.get(bits)
        name = f"{mx}-ceil-dyn" if inputs else f"{mx}-ceil"
        return _with_group(section, blocks, 32, name, bits, bits if mx else None)
    if scale is not None:
        section.wrong("block_sizes", f"scales have (4, 3) or (8, 0) bits, not {quoted(scale)}")
        return None
    number = f"int{bits}" if isinstance(bits, int) else _FLOATS.get(bits)
    if number is None:
        section.wrong("num_bits", f"there is no number of {shown(bits)} bits here")
        return None
    unit = _unit(section, inputs, dynamic, blocks)
    if unit is None:
        return None
    narrow = "-narrow" if isinstance(bits, int) else ""
    ending = "-dyn" if inputs and unit[0] == "g" else ""
    return f"{number}-{unit}{narrow}{ending}"


def _with_group(
    section: SourceSection,
    blocks: Mapping[str, Any],
    size: int,
    name: str,
    bits: Any,
    known: Any,
) -> str | None:
    """The name of a format with scales of 8 bits, where its groups are those that there are."""
    if blocks.get("-1") != size or blocks.get("-2") is not None:
        section.wrong("block_sizes", f"such scales are of {size} columns, not {quoted(blocks)}")
        return None
    if known is None or bits != known:
        section.wrong("num_bits", f"no format has {shown(bits)} bits with such scales")
        return None
    return name


def _unit(
    section: SourceSection, inputs: bool, dynamic: bool, blocks: Mapping[str, Any]
) -> str | None:
    """Unit that shares a scale, in the words of a format's name."""
    axis = section.content.get("axis")
    if "-1" in blocks:
        size, rows = blocks["-1"], blocks.get("-2")
        if size is None:
            return "token" if inputs else "channel"
        if rows is not None:
            if inputs or rows != size:
                section.wrong("block_sizes", "blocks are squares of weights")
            return f"b{size}"
        if inputs and not dynamic:
            section.wrong("block_sizes", "blocks of inputs are dynamic: set type: dynamic")
        return f"g{size}"
    if blocks:
        section.wrong("block_sizes", "blocks of columns (-1) are missing")
        return None
    if axis is None:
        return "token" if inputs and dynamic else "tensor"
    if axis in (0, (0,), [0]) and not isinstance(axis, bool) and not inputs:
        return "channel"
    section.wrong("axis", f"null, or 0 for weights, not {quoted(axis)}")
    return None
