"""How one tensor is expressed in few bits: a name, and everything the name means.

A :class:`NumberSpec` is complete (nothing is left for a reader to guess) and valid from the moment
it exists. Names follow one grammar,
``int<bits>-<g<size>|channel|token|tensor>[-asym][-narrow][-dyn]`` for integers and
``<fp8|fp8-e5m2|fp4>-<g<size>|channel|token|tensor>[-dyn]`` for floating point, which is always
symmetric; ``fp8`` is E4M3 and ``fp4`` E2M1. ``token`` is always dynamic, because the tokens are not
known before they arrive.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, Literal

from prismquant.errors import FormatError, suggest
from prismquant.numerics.affine import Granularity, check_group_size
from prismquant.numerics.grids import FLOAT_KINDS, FloatGrid, FloatKind, Grid, IntGrid

Kind = Literal["int"] | FloatKind

KINDS: tuple[Kind, ...] = ("int", *FLOAT_KINDS)

_FLOAT_NAMES: Mapping[FloatKind, str] = MappingProxyType(
    {"e4m3": "fp8", "e5m2": "fp8-e5m2", "e2m1": "fp4"}
)
_NAME = re.compile(
    r"(?:int(?P<bits>\d+)|(?P<float>fp8-e5m2|fp8|fp4))-(?:g(?P<size>\d+)|(?P<unit>channel|token|tensor))"
    r"(?P<asym>-asym)?(?P<narrow>-narrow)?(?P<dyn>-dyn)?"
)


@dataclass(frozen=True)
class NumberSpec:
    """The format of a weight or an activation.

    Attributes:
        bits: Width of a code: 2 to 8 for integers, what the kind says for floating point.
        granularity: What shares one scale.
        group_size: Consecutive input features to a group; with group granularity only.
        symmetric: Zero is code 0; otherwise every scale has a zero point.
        narrow: Leave out the lowest code; symmetric formats only.
        dynamic: Scales are taken from each activation as it arrives.
        kind: ``int``, or a floating-point layout: ``e4m3``, ``e5m2`` or ``e2m1``.

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
        if self.granularity == Granularity.GROUP:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise FormatError(
                    f"group granularity needs a positive group size, not {size!r}",
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
        if self.granularity == Granularity.CHANNEL and self.dynamic:
            raise FormatError(
                "channel granularity is for weights, whose scales are never dynamic",
                remedy="use token granularity for activations",
            )

    def _check_kind(self) -> None:
        if self.kind not in KINDS:
            raise FormatError(
                f"there is no kind of number {self.kind!r}", remedy=suggest(str(self.kind), KINDS)
            )
        if self.kind == "int":
            IntGrid(self.bits, self.narrow)
            return
        own = FloatGrid(self.kind).bits
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

    @property
    def grid(self) -> Grid:
        """The points of this format and their codes."""
        return IntGrid(self.bits, self.narrow) if self.kind == "int" else FloatGrid(self.kind)

    @property
    def name(self) -> str:
        """The name from which :func:`spec` makes this format again, e.g. ``int4-g128``."""
        parts = [self._number, self._unit]
        parts += [] if self.symmetric else ["asym"]
        parts += ["narrow"] if self.narrow else []
        parts += ["dyn"] if self.dynamic and self.granularity != Granularity.TOKEN else []
        return "-".join(parts)

    def describe(self) -> str:
        """Say the format in a few words for a table, e.g. ``int4 g128 sym``, ``fp8 token dyn``."""
        parts = [self._number.replace("-", " "), self._unit]
        if not self.symmetric:
            parts.append("asym")
        elif self.narrow:
            parts.append("narrow")
        elif not self.dynamic and self.kind == "int":
            parts.append("sym")
        parts += ["dyn"] if self.dynamic else []
        return " ".join(parts)

    def effective_bits(self, in_features: int, scale_bits: int = 16) -> float:
        """Bits stored per weight, with its share of the scale and the zero point.

        Args:
            in_features: Input features of the layer.
            scale_bits: Width of a stored scale.

        Returns:
            Bits per element. A scale of the whole tensor counts for nothing.

        Raises:
            FormatError: The group size does not divide ``in_features``.
        """
        if self.granularity == Granularity.TENSOR or in_features == 0:
            return float(self.bits)
        sharing = in_features
        if self.granularity == Granularity.GROUP:
            sharing = check_group_size(in_features, self.group_size)
        overhead = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + overhead / sharing

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of the scale of a weight ``[out_features, in_features]``.

        Args:
            out_features: Rows.
            in_features: Columns.

        Returns:
            ``(1,)``, ``(out, 1)`` or ``(out, G)``.

        Raises:
            FormatError: The group size does not divide ``in_features``, or the format is of tokens.
        """
        if self.granularity == Granularity.TOKEN:
            raise FormatError("a weight has no tokens", remedy="use channel granularity")
        if self.granularity == Granularity.TENSOR:
            return (1,)
        if self.granularity == Granularity.CHANNEL:
            return (out_features, 1)
        return (out_features, in_features // check_group_size(in_features, self.group_size))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {**asdict(self), "granularity": self.granularity.value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NumberSpec:
        """Make a format from its fields.

        Args:
            data: Field names and values; fields with defaults may be left out, and ``bits`` where
                the kind says it.

        Returns:
            The format.

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
        implied = {"bits": FloatGrid(kind).bits} if kind in FLOAT_KINDS else {}
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
        if self.granularity == Granularity.GROUP:
            return f"g{self.group_size}"
        return self.granularity.value


def spec(name: str) -> NumberSpec:
    """Make a format from its name.

    Args:
        name: A key of :data:`PRESETS`, or any name of the module's grammar, e.g. ``int5-g96``.

    Returns:
        The format.

    Raises:
        FormatError: The name is not one, or the combination means nothing.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise FormatError(f"there is no number format {name!r}", remedy=suggest(name, PRESETS))
    unit = match["unit"]
    kinds: dict[str | None, Kind] = {name: kind for kind, name in _FLOAT_NAMES.items()}
    kind = kinds.get(match["float"], "int")
    return NumberSpec(
        bits=int(match["bits"]) if kind == "int" else FloatGrid(kind).bits,
        granularity=Granularity(unit or Granularity.GROUP),
        group_size=None if unit else int(match["size"]),
        symmetric=match["asym"] is None,
        narrow=match["narrow"] is not None,
        dynamic=match["dyn"] is not None or unit == Granularity.TOKEN,
        kind=kind,
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
    names += [f"fp8-{unit}" for unit in ("channel", "token", "tensor", "g128")]
    names += [f"fp8-e5m2-{unit}" for unit in ("channel", "token", "tensor")]
    names += [f"fp4-{unit}" for unit in ("g16", "g32", "channel", "token", "g16-dyn", "g32-dyn")]
    return MappingProxyType({name: spec(name) for name in names})


# The formats that are usual, by name; any other of the grammar can be named as well.
PRESETS: Mapping[str, NumberSpec] = _presets()
