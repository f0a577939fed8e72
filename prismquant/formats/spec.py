"""How one tensor is expressed in integers: a name, and everything the name means.

A :class:`NumberSpec` is complete (nothing is left for a reader to guess) and valid from the moment
it exists. Names follow one grammar,
``int<bits>-<g<size>|channel|token|tensor>[-asym][-narrow][-dyn]``; ``token`` is always dynamic,
because the tokens are not known before they arrive.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from prismquant.errors import FormatError, suggest
from prismquant.numerics.affine import Granularity, check_group_size
from prismquant.numerics.grids import IntGrid

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAME = re.compile(
    r"int(?P<bits>\d+)-(?:g(?P<size>\d+)|(?P<unit>channel|token|tensor))"
    r"(?P<asym>-asym)?(?P<narrow>-narrow)?(?P<dyn>-dyn)?"
)


@dataclass(frozen=True)
class NumberSpec:
    """An integer format of a weight or an activation.

    Attributes:
        bits: Width of a code, 2 to 8.
        granularity: What shares one scale.
        group_size: Consecutive input features to a group; with group granularity only.
        symmetric: Zero is code 0; otherwise every scale has a zero point.
        narrow: Leave out the lowest code; symmetric formats only.
        dynamic: Scales are taken from each activation as it arrives.

    Raises:
        FormatError: The combination means nothing.
    """

    bits: int
    granularity: Granularity
    group_size: int | None = None
    symmetric: bool = True
    narrow: bool = False
    dynamic: bool = False

    def __post_init__(self) -> None:
        IntGrid(self.bits, self.narrow)
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

    @property
    def grid(self) -> IntGrid:
        """The codes of this format."""
        return IntGrid(self.bits, self.narrow)

    @property
    def name(self) -> str:
        """The name from which :func:`spec` makes this format again, e.g. ``int4-g128``."""
        parts = [f"int{self.bits}", self._unit]
        parts += [] if self.symmetric else ["asym"]
        parts += ["narrow"] if self.narrow else []
        parts += ["dyn"] if self.dynamic and self.granularity != Granularity.TOKEN else []
        return "-".join(parts)

    def describe(self) -> str:
        """Say the format in a few words for a table, e.g. ``int4 g128 sym``, ``int8 token dyn``."""
        parts = [f"int{self.bits}", self._unit]
        if not self.symmetric:
            parts.append("asym")
        elif self.narrow:
            parts.append("narrow")
        elif not self.dynamic:
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
            data: Field names and values; fields with defaults may be left out.

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
        for key in ("bits", "granularity"):
            if key not in data:
                raise FormatError(f"a number format needs {key!r}, got {dict(data)}")
        return cls(**data)

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
    return NumberSpec(
        bits=int(match["bits"]),
        granularity=Granularity(unit or Granularity.GROUP),
        group_size=None if unit else int(match["size"]),
        symmetric=match["asym"] is None,
        narrow=match["narrow"] is not None,
        dynamic=match["dyn"] is not None or unit == Granularity.TOKEN,
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
    return MappingProxyType({name: spec(name) for name in (*names, "int8-tensor-dyn")})


# The formats that serving engines read, by name; any other of the grammar can be named as well.
PRESETS: Mapping[str, NumberSpec] = _presets()
