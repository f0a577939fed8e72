"""In what numbers a server keeps keys and values between tokens.

A cache of keys and values is written once for each token and read for every later one, so its
scales are static: one for all keys of a layer and one for all its values, or one of each for every
key-value head. Numbers are symmetric about zero: FP8 E4M3, or integers of 8 or 4 bits.

The stored number is ``x / scale``: what compressed-tensors and vLLM mean by ``k_scale`` and
``v_scale``. Servers know FP8; the integers, and keys that are rotated first, are for simulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

from prismquant.errors import FormatError, suggest
from prismquant.formats.spec import NumberSpec, spec

if TYPE_CHECKING:
    from prismquant.numerics.grids import Grid

KVNumber = Literal["fp8", "int8", "int4"]
KVGranularity = Literal["tensor", "head"]


@dataclass(frozen=True)
class KVCacheSpec:
    """The number format of a cache of keys and values.

    Attributes:
        format: ``fp8`` (E4M3), ``int8`` or ``int4``.
        granularity: ``tensor``: one scale for a layer's keys, one for its values; ``head``: one of
            each for every key-value head.
        rotated: Multiply queries and keys by one Hadamard matrix after the rotary embedding, which
            leaves their products as they are and spreads what stands out in single channels of the
            keys; integers only. (R3 of SpinQuant, arXiv 2405.16406, section 3.2.)

    Raises:
        FormatError: A field has another value.
    """

    format: KVNumber
    granularity: KVGranularity = "tensor"
    rotated: bool = False

    def __post_init__(self) -> None:
        for field, legal in (("format", KVNumber), ("granularity", KVGranularity)):
            value = getattr(self, field)
            if value not in get_args(legal):
                raise FormatError(
                    f"{field} of a key-value cache cannot be {value!r}",
                    remedy=suggest(str(value), get_args(legal)),
                )

        if not isinstance(self.rotated, bool):
            raise FormatError(f"rotated must be true or false, not {self.rotated!r}")
        if self.rotated and self.format == "fp8":
            raise FormatError(
                "an fp8 key-value cache is not rotated: servers would read it as if it were not",
                remedy="leave rotated out, or use int8 or int4",
            )

    @property
    def number(self) -> NumberSpec:
        """The format of a single number and its scale."""
        return spec(f"{self.format}-tensor")

    @property
    def grid(self) -> Grid:
        """The points of the format and their codes."""
        return self.number.grid

    @property
    def per_head(self) -> bool:
        """True if every key-value head has its own scales."""
        return self.granularity == "head"

    @property
    def name(self) -> str:
        """The name from which :func:`kv_cache_spec` makes this format again, e.g. ``fp8-head``."""
        parts = [("head", self.per_head), ("rotated", self.rotated)]
        return "-".join([self.format, *(part for part, said in parts if said)])

    def describe(self) -> str:
        """Say the format in a few words for a table, e.g. ``fp8 head``."""
        return f"{self.format} {self.granularity}" + (" rotated" if self.rotated else "")

    def scale_shape(self, kv_heads: int) -> tuple[int, ...]:
        """Shape of the keys' scale, and of the values', on disk and in memory."""
        return (kv_heads, 1, 1) if self.per_head else (1,)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KVCacheSpec:
        """Make a format from its fields; all but ``format`` may be left out.

        Raises:
            FormatError: A field is unknown or missing, or has no such value.
        """
        known = {field.name for field in fields(cls)}
        for key in data:
            if key not in known:
                raise FormatError(
                    f"the format of a key-value cache has no field {key!r}",
                    remedy=suggest(str(key), known),
                )
        if "format" not in data:
            raise FormatError(
                "the format of a key-value cache is missing",
                remedy=f"give `format`: {' or '.join(get_args(KVNumber))}",
            )
        return cls(**data)


KV_PRESETS: Mapping[str, KVCacheSpec] = MappingProxyType(
    {
        made.name: made
        for made in (
            KVCacheSpec(number, granularity, rotated)
            for number in get_args(KVNumber)
            for granularity in get_args(KVGranularity)
            for rotated in (False, True)
            if not (rotated and number == "fp8")
        )
    }
)


def kv_cache_spec(name: str) -> KVCacheSpec:
    """The format of that name, e.g. ``fp8``, ``int8-head`` or ``int4-head-rotated``.

    Raises:
        FormatError: There is none of this name.
    """
    if name not in KV_PRESETS:
        raise FormatError(
            f"there is no format {name!r} of a key-value cache", remedy=suggest(name, KV_PRESETS)
        )
    return KV_PRESETS[name]
