"""Formats in which a tensor is expressed in few bits: a name, and everything the name means.

A :class:`NumberSpec` is complete (nothing is left for a reader to guess) and valid from the moment
it exists. Names follow one grammar. With scales of 16 or 32 bits,

    int<bits>-<g<size>|b<size>|channel|token|tensor>[-asym][-narrow][-dyn]
    <fp8|fp8-e5m2|fp6-e3m2|fp6-e2m3|fp4>-<g<size>|b<size>|channel|token|tensor>[-dyn]

where ``fp8`` is E4M3, ``fp4`` E2M1, and floating point is always symmetric; ``b128`` is blocks of
128 x 128 weights. ``token`` is always dynamic, because the tokens are not known before they arrive.
With scales of 8 bits, which come with a group size of their own,

    nvfp4[-dyn]                                                 E2M1, groups of 16, E4M3 scales
    mx<fp4|fp6|fp6-e3m2|fp8|fp8-e5m2|int8>[-floor|-ceil][-dyn]  groups of 32, E8M0 scales

(``mxfp6`` is E2M3). The block scales of ``nvfp4-dyn`` are dynamic, its global scale is static.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from prismquant.errors import FormatError, suggest
from prismquant.numerics.kinds import (
    FLOAT_BITS,
    FLOAT_KINDS,
    SCALE_KINDS,
    FloatKind,
    Granularity,
    ScaleKind,
    block_rows,
    check_bits,
    check_group_size,
)

if TYPE_CHECKING:
    from prismquant.numerics.grids import Grid

Kind = Literal["int"] | FloatKind
KINDS: tuple[Kind, ...] = ("int", *FLOAT_KINDS)
NVFP4_GROUP, MX_GROUP = 16, 32

_FLOAT_NAMES: Mapping[FloatKind, str] = MappingProxyType(
    {"e4m3": "fp8", "e5m2": "fp8-e5m2", "e3m2": "fp6-e3m2", "e2m3": "fp6-e2m3", "e2m1": "fp4"}
)
_MX_NAMES: Mapping[Kind, str] = MappingProxyType(
    {
        "e2m1": "mxfp4",
        "e2m3": "mxfp6",
        "e3m2": "mxfp6-e3m2",
        "e4m3": "mxfp8",
        "e5m2": "mxfp8-e5m2",
        "int": "mxint8",
    }
)
_NAME = re.compile(
    r"(?:int(?P<bits>\d+)|(?P<float>fp8-e5m2|fp8|fp6-e3m2|fp6-e2m3|fp4))"
    r"-(?:g(?P<group>\d+)|b(?P<block>\d+)|(?P<unit>channel|token|tensor))"
    r"(?P<asym>-asym)?(?P<narrow>-narrow)?(?P<dyn>-dyn)?"
)
_CODED_NAME = re.compile(
    r"(?:(?P<nv>nvfp4)|(?P<mx>mxfp4|mxfp6-e3m2|mxfp6|mxfp8-e5m2|mxfp8|mxint8)(?P<rule>-floor|-ceil)?)"
    r"(?P<dyn>-dyn)?"
)


@dataclass(frozen=True)
class NumberSpec:
    """The format of a weight or an activation.

    Attributes:
        bits: Width of a code: 2 to 8 for integers, what the kind says for floating point.
        granularity: What shares one scale.
        group_size: Consecutive input features to a group, or to a block of as many rows; with
            group and block granularity only.
        symmetric: Zero is code 0; otherwise every scale has a zero point.
        narrow: Leave out the lowest code; symmetric formats only.
        dynamic: Scales are taken from each activation as it arrives.
        kind: ``int``, or a floating-point layout: ``e4m3``, ``e5m2``, ``e3m2``, ``e2m3``, ``e2m1``.
        scale: What the scales are, see :mod:`prismquant.numerics.scales`.

    Raises:
        FormatError: The combination means nothing.
    """

    bits: int
    granularity: Granularity
    group_size: int | None = None
    symmetric: bool = True
    narrow: bool = False
    dynamic: bool = False
    kind: Kind = "int"
    scale: ScaleKind = "float"

    def __post_init__(self) -> None:
        self._check_kind()
        try:
            object.__setattr__(self, "granularity", Granularity(self.granularity))
        except ValueError:
            raise FormatError(
                f"there is no granularity {self.granularity!r}",
                remedy=suggest(str(self.granularity), [g.value for g in Granularity]),
            ) from None
        for name in ("symmetric", "narrow", "dynamic"):
            if not isinstance(getattr(self, name), bool):
                raise FormatError(f"{name} must be true or false, not {getattr(self, name)!r}")
        size = self.group_size
        if self.granularity.grouped:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise FormatError(
                    f"{self.granularity} granularity needs a positive group size, not {size!r}",
                    remedy="give group_size, e.g. 128",
                )
        elif size is not None:
            raise FormatError(
                f"group size {size!r} has no meaning with {self.granularity} granularity",
                remedy="leave group_size out, or use group granularity",
            )
        if self.narrow and not self.symmetric:
            raise FormatError(
                "a narrow grid is symmetric about zero, this format is asymmetric",
                remedy="drop one of the two",
            )
        if self.granularity == Granularity.TOKEN and not self.dynamic:
            raise FormatError(
                "tokens are not known in advance: token granularity is always dynamic",
                remedy="set dynamic, or use tensor granularity for a static scale",
            )
        instead = {Granularity.CHANNEL: "token", Granularity.BLOCK: "group"}.get(self.granularity)
        if instead and self.dynamic:
            raise FormatError(
                f"{self.granularity} granularity is for weights, whose scales are never dynamic",
                remedy=f"use {instead} granularity for activations",
            )
        self._check_scale()

    def _check_kind(self) -> None:
        if self.kind not in KINDS:
            raise FormatError(
                f"there is no kind of number {self.kind!r}", remedy=suggest(str(self.kind), KINDS)
            )
        if self.kind == "int":
            check_bits(self.bits)
            return
        own = FLOAT_BITS[self.kind]
        if isinstance(self.bits, bool) or self.bits != own:
            raise FormatError(
                f"{self.kind} numbers have {own} bits, not {self.bits!r}",
                remedy=f"set bits to {own}, or kind to int",
            )
        for field, value in (("asymmetric", not self.symmetric), ("narrow", self.narrow)):
            if value:
                raise FormatError(
                    f"{self.kind} numbers are symmetric about zero, they cannot be {field}",
                    remedy="use a symmetric format that is not narrow, or integers",
                )

    def _check_scale(self) -> None:
        if self.scale not in SCALE_KINDS:
            raise FormatError(
                f"there is no kind of scale {self.scale!r}",
                remedy=suggest(str(self.scale), SCALE_KINDS),
            )
        if self.scale == "float":
            return
        group = NVFP4_GROUP if self.scale == "e4m3" else MX_GROUP
        if self.granularity != Granularity.GROUP or self.group_size != group:
            raise FormatError(
                f"{self.scale} scales are for groups of {group}, not {self._unit}",
                remedy=f"use group granularity with group_size {group}, or float scales",
            )
        if self.scale == "e4m3" and self.kind != "e2m1":
            raise FormatError(
                f"e4m3 scales are for E2M1 numbers, not {self._number}",
                remedy="use nvfp4, or float scales",
            )
        if self.kind == "int" and (self.bits != 8 or not self.narrow):
            raise FormatError(
                f"{self.scale} scales are for integers of 8 bits, narrow",
                remedy="use mxint8, or float scales",
            )

    @property
    def grid(self) -> Grid:
        """The points of this format and their codes."""
        # A format is words; torch is loaded when its numbers are computed with.
        from prismquant.numerics.grids import FloatGrid, IntGrid

        return IntGrid(self.bits, self.narrow) if self.kind == "int" else FloatGrid(self.kind)

    @property
    def name(self) -> str:
        """The name from which :func:`spec` makes this format again, e.g. ``int4-g128``."""
        if self.scale != "float":
            return "-".join(self._coded_parts())
        parts = [self._number, self._unit]
        parts += [] if self.symmetric else ["asym"]
        parts += ["narrow"] if self.narrow else []
        parts += ["dyn"] if self.dynamic and self.granularity != Granularity.TOKEN else []
        return "-".join(parts)

    def describe(self) -> str:
        """Say the format in a few words for a table, e.g. ``int4 g128 sym``, ``fp8 token dyn``."""
        if self.scale != "float":
            return " ".join(self._coded_parts()).replace("-", " ")
        parts = [self._number.replace("-", " "), self._unit]
        if not self.symmetric:
            parts.append("asym")
        elif self.narrow:
            parts.append("narrow")
        elif not self.dynamic and self.kind == "int":
            parts.append("sym")
        parts += ["dyn"] if self.dynamic else []
        return " ".join(parts)

    @property
    def calibrated(self) -> bool:
        """True if an activation of this format needs a static scale, found by calibration."""
        return not self.dynamic or self.scale == "e4m3"

    @property
    def block_structure(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale, with block granularity."""
        if self.granularity != Granularity.BLOCK or self.group_size is None:
            return None
        return (self.group_size, self.group_size)

    def effective_bits(self, in_features: int, scale_bits: int = 16) -> float:
        """Bits stored per weight, with its share of the scale and the zero point.

        Args:
            in_features: Input features of the layer.
            scale_bits: Width of a stored scale, where its kind does not say it.

        Returns:
            Bits per element. A scale of the whole tensor counts for nothing; blocks are counted as
            if none were cut off.

        Raises:
            FormatError: The group size does not divide ``in_features``.
        """
        if self.granularity == Granularity.TENSOR or in_features == 0:
            return float(self.bits)
        sharing = in_features
        if self.granularity.grouped:
            sharing = check_group_size(in_features, self.group_size)
        if self.granularity == Granularity.BLOCK:
            sharing *= sharing
        if self.scale != "float":
            scale_bits = 8
        overhead = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + overhead / sharing

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of the scale of a weight ``[out_features, in_features]``.

        Returns:
            ``(1,)``, ``(out, 1)``, ``(out, G)``, or ``(R, G)`` with ``R`` rows of blocks.

        Raises:
            FormatError: The group size does not divide ``in_features``, or the format is of tokens.
        """
        if self.granularity == Granularity.TOKEN:
            raise FormatError("a weight has no tokens", remedy="use channel granularity")
        if self.granularity == Granularity.TENSOR:
            return (1,)
        if self.granularity == Granularity.CHANNEL:
            return (out_features, 1)
        size = check_group_size(in_features, self.group_size)
        if self.granularity == Granularity.BLOCK:
            return (block_rows(out_features, size), in_features // size)
        return (out_features, in_features // size)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {**asdict(self), "granularity": self.granularity.value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NumberSpec:
        """Make a format from its fields.

        Args:
            data: Field names and values; fields with defaults may be left out, and ``bits`` where
                the kind says it.

        Raises:
            FormatError: A field is unknown or missing, or the combination means nothing.
        """
        known = {field.name for field in fields(cls)}
        for key in data:
            if key not in known:
                raise FormatError(
                    f"a number format has no field {key!r}", remedy=suggest(str(key), known)
                )
        kind = data.get("kind")
        implied = {"bits": FLOAT_BITS[kind]} if kind in FLOAT_KINDS else {}
        filled = implied | dict(data)
        for key in ("bits", "granularity"):
            if key not in filled:
                raise FormatError(f"a number format needs {key!r}, got {dict(data)}")
        return cls(**filled)

    @property
    def _number(self) -> str:
        return f"int{self.bits}" if self.kind == "int" else _FLOAT_NAMES[self.kind]

    @property
    def _unit(self) -> str:
        if self.granularity.grouped:
            return f"{self.granularity.value[0]}{self.group_size}"
        return self.granularity.value

    def _coded_parts(self) -> list[str]:
        """The name of a format with scales of 8 bits."""
        family, _, rule = self.scale.partition("-")
        parts = ["nvfp4" if family == "e4m3" else _MX_NAMES[self.kind]]
        parts += [rule] if rule else []
        return [*parts, "dyn"] if self.dynamic else parts


def spec(name: str) -> NumberSpec:
    """Make a format from its name.

    Args:
        name: A key of :data:`PRESETS`, or any name of the module's grammar, e.g. ``int5-g96``.

    Raises:
        FormatError: The name is not one, or the combination means nothing.
    """
    coded = _CODED_NAME.fullmatch(name)
    if coded is not None:
        return _coded_spec(coded)
    match = _NAME.fullmatch(name)
    if match is None:
        raise FormatError(f"there is no number format {name!r}", remedy=suggest(name, PRESETS))
    unit = match["unit"] or ("group" if match["group"] else "block")
    size = match["group"] or match["block"]
    kinds: dict[str | None, Kind] = {name: kind for kind, name in _FLOAT_NAMES.items()}
    kind = kinds.get(match["float"], "int")
    return NumberSpec(
        bits=int(match["bits"]) if kind == "int" else FLOAT_BITS[kind],
        granularity=Granularity(unit),
        group_size=None if size is None else int(size),
        symmetric=match["asym"] is None,
        narrow=match["narrow"] is not None,
        dynamic=match["dyn"] is not None or unit == Granularity.TOKEN,
        kind=kind,
    )


def _coded_spec(match: re.Match[str]) -> NumberSpec:
    """A format with scales of 8 bits."""
    dynamic = match["dyn"] is not None
    if match["nv"]:
        return _grouped("e2m1", NVFP4_GROUP, "e4m3", dynamic)
    kind = next(kind for kind, name in _MX_NAMES.items() if name == match["mx"])
    rules: dict[str | None, ScaleKind] = {"-floor": "e8m0-floor", "-ceil": "e8m0-ceil"}
    return _grouped(kind, MX_GROUP, rules.get(match["rule"], "e8m0"), dynamic)


def _grouped(kind: Kind, size: int, scale: ScaleKind, dynamic: bool) -> NumberSpec:
    integers = kind == "int"
    bits = 8 if kind == "int" else FLOAT_BITS[kind]
    return NumberSpec(
        bits, Granularity.GROUP, size, narrow=integers, dynamic=dynamic, kind=kind, scale=scale
    )


def _presets() -> Mapping[str, NumberSpec]:
    units = {
        2: ("g32", "g64", "g128"),
        3: ("g32", "g64", "g128", "channel"),
        4: ("g32", "g64", "g128", "channel", "token"),
        5: ("g128", "channel"),
        6: ("g128", "channel"),
        7: ("g128", "channel"),
        8: ("g128", "channel", "token", "tensor"),
    }
    names = [
        f"int{bits}-{unit}{suffix}"
        for bits, choices in units.items()
        for unit in choices
        for suffix in ("", "-asym")
    ]
    names += ["int8-tensor-dyn", "fp8-tensor-dyn"]
    names += [f"fp8-{unit}" for unit in ("channel", "token", "tensor", "g128", "b128", "g128-dyn")]
    names += [f"fp8-e5m2-{unit}" for unit in ("channel", "token", "tensor")]
    names += [f"fp4-{unit}" for unit in ("g16", "g32", "channel", "token", "g16-dyn", "g32-dyn")]
    blocked = ["nvfp4", *_MX_NAMES.values(), "mxfp4-floor", "mxfp4-ceil"]
    names += [f"{name}{suffix}" for name in blocked for suffix in ("", "-dyn")]
    return MappingProxyType({name: spec(name) for name in names})


# The formats that are usual, by name; any other of the grammar can be named as well.
PRESETS: Mapping[str, NumberSpec] = _presets()
