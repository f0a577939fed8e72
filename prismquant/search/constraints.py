"""Constraints of a search: what a mix of formats must keep to, and what it is scored by."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, TypedDict

from prismquant.arguments import as_bytes, as_choice, as_count, as_items, as_path
from prismquant.check.target_reader import TargetReader
from prismquant.errors import ArgumentError, suggest
from prismquant.models.arch import Modality
from prismquant.recipe.schema import MAX_DEVICES
from prismquant.search.analysis_request import as_token_weights
from prismquant.search.latency import LatencyTable, read_latency
from prismquant.search.sensitivity import TokenClass

_MOST_BITS = 64
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Amount:
    """An amount of storage.

    Attributes:
        bits: Mean bits per weight; None: it is given in bytes.
        bytes: Bytes; None: it is given in bits.
    """

    bits: float | None = None
    bytes: int | None = None

    def of(self, weights: int) -> Fraction:
        """Bytes that so many weights may take."""
        if self.bytes is not None:
            return Fraction(self.bytes)
        return Fraction(self.bits or 0) * weights / 8

    def exceeds(self, other: Amount) -> bool:
        """Whether it is more than another one of its kind; bits and bytes do not compare."""
        if self.bytes is not None and other.bytes is not None:
            return self.bytes > other.bytes
        return self.bits is not None and other.bits is not None and self.bits > other.bits

    def describe(self) -> str:
        """The amount in words."""
        return f"{self.bits:g} bits" if self.bytes is None else f"{self.bytes:,} bytes"


@dataclass(frozen=True)
class Constraints:
    """All that a mix must keep to. None and empty mappings ask for nothing.

    Attributes:
        total: Stored bytes of all tensors, or mean bits per weight of the whole model.
        max_loss: The most loss; without ``total`` the mix of the fewest bytes is looked for.
        caps, floors: By modality the most, or the least, that its layers may take.
        cache_bytes: Bytes of keys and values for each token in the cache.
        latency: Times of layers.
        latency_ms: The most milliseconds, by that table.
        tensor_parallel: Devices that will share each layer; formats must fit the parts.
        reader: Who is to load the checkpoint; None: nobody in particular.
        weights: Weight of each class of token in the sum of scores; None: the file's own.
    """

    total: Amount | None = None
    max_loss: float | None = None
    caps: Mapping[str, Amount] = field(default_factory=dict)
    floors: Mapping[str, Amount] = field(default_factory=dict)
    cache_bytes: int | None = None
    latency: LatencyTable | None = None
    latency_ms: float | None = None
    tensor_parallel: int = 1
    reader: TargetReader | None = None
    weights: Mapping[TokenClass, float] | None = None

    @property
    def bounded(self) -> bool:
        """Whether anything keeps a mix from leaving everything alone."""
        bounds = (self.total, self.max_loss, self.cache_bytes, self.latency_ms)
        return bool(self.caps) or any(bound is not None for bound in bounds)

    def require_bounded(self) -> None:
        """Refuse constraints that bound nothing.

        Raises:
            ArgumentError: They do not.
        """
        if not self.bounded:
            raise ArgumentError(
                "nothing bounds the mix: the best one leaves everything alone",
                remedy="give --bits, --size or --max-loss; or --cap, --cache-bytes or --latency-ms",
            )

    def describe(self) -> list[str]:
        """The constraints in words, one each."""
        found = [f"total at most {self.total.describe()}"] if self.total else []
        found += [f"loss at most {self.max_loss:g}"] if self.max_loss is not None else []
        found += [f"{name} at most {amount.describe()}" for name, amount in self.caps.items()]
        found += [f"{name} at least {amount.describe()}" for name, amount in self.floors.items()]
        if self.cache_bytes is not None:
            found.append(f"key-value cache at most {self.cache_bytes:,} bytes a token")
        if self.latency is not None and self.latency_ms is not None:
            found.append(f"latency at most {self.latency_ms:g} ms by {self.latency.source}")
        if self.tensor_parallel > 1:
            found.append(f"layers cut over {self.tensor_parallel} devices")
        return [*found, *([f"for {self.reader}"] if self.reader else [])]


class Asked(TypedDict, total=False):
    """Constraints as a caller or a command line gives them; None asks for nothing.

    Attributes:
        bits: Mean bits per weight, a number.
        size: Bytes, or a size such as ``3.2GB``.
        max_loss: A number.
        weight: ``answer=1,text=0.2``, or a mapping.
        cap, floor: ``vision=8`` (bits) or ``vision=500MB``, several in a list or with commas
            between them; or a mapping.
        cache_bytes: Bytes of keys and values of a token, or a size.
        latency: A file of milliseconds, see :mod:`prismquant.search.latency`.
        latency_ms: A number.
        tensor_parallel: A count of devices.
        reader: ``vllm``, ``transformers``, ``sglang`` or ``prismquant``.
    """

    bits: float | str | None
    size: int | str | None
    max_loss: float | str | None
    weight: str | Sequence[str] | Mapping[str, Any] | None
    cap: str | Sequence[str] | Mapping[str, Any] | None
    floor: str | Sequence[str] | Mapping[str, Any] | None
    cache_bytes: int | str | None
    latency: str | Path | None
    latency_ms: float | str | None
    tensor_parallel: int | None
    reader: str | None


def parse_constraints(asked: Asked) -> Constraints:
    """Constraints out of what a caller or a command line gives.

    Raises:
        ArgumentError: A value is none that there is, or two do not go together.
        StorageError, DataError: The table of latencies cannot be read.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    for name in given:
        if name not in Asked.__annotations__:
            raise ArgumentError(
                f"a search has no constraint {name!r}", remedy=suggest(name, Asked.__annotations__)
            )
    if {"bits", "size"} <= given.keys():
        raise ArgumentError(
            "a size and bits are both given", where="--size and --bits", remedy="give one of them"
        )
    if ("latency" in given) != ("latency_ms" in given):
        raise ArgumentError(
            "a table of latencies and the most milliseconds go together",
            where="latency (--latency) and latency_ms (--latency-ms)",
            remedy="give both",
        )
    total = None
    if "bits" in given:
        total = Amount(bits=_bits(given["bits"], "bits (--bits)"))
    elif "size" in given:
        total = Amount(bytes=as_bytes(given["size"], "size"))

    def optional(name: str, parse: Callable[[Any, str], Any]) -> Any:
        return parse(given[name], name) if name in given else None

    caps, floors = _amounts(given.get("cap"), "cap"), _amounts(given.get("floor"), "floor")
    for name in caps.keys() & floors.keys():
        if floors[name].exceeds(caps[name]):
            raise ArgumentError(
                f"{name} is to take {floors[name].describe()} at least and "
                f"{caps[name].describe()} at most",
                where="cap (--cap) and floor (--floor)",
                remedy="raise the cap or lower the floor",
            )
    return Constraints(
        total=total,
        max_loss=optional("max_loss", _number),
        caps=caps,
        floors=floors,
        cache_bytes=optional("cache_bytes", as_bytes),
        latency=optional("latency", lambda value, name: read_latency(as_path(value, name))),
        latency_ms=optional("latency_ms", _number),
        tensor_parallel=optional("tensor_parallel", _devices) or 1,
        reader=optional("reader", lambda v, n: TargetReader(as_choice(v, n, TargetReader))),
        weights=optional("weight", lambda value, _: as_token_weights(value)),
    )


def _devices(value: Any, name: str) -> int:
    return as_count(value, name, most=MAX_DEVICES)


def _pairs(given: Any, name: str, known: Iterable[str]) -> dict[str, Any]:
    """Names and values out of a mapping, a text, or a list of texts."""
    where, words = f"{name} (--{name})", sorted(known)
    if isinstance(given, Mapping):
        pairs: list[tuple[Any, Any]] = list(given.items())
    else:
        texts = as_items(given)
        parts = [part for text in texts for part in str(text).split(",") if part.strip()]
        pairs = [(key.strip(), said.strip()) for key, _, said in (p.partition("=") for p in parts)]
    if not pairs:
        raise ArgumentError(
            "no modality is named", where=where, remedy=f"write --{name} {words[0]}=NUMBER"
        )
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key not in words:
            raise ArgumentError(
                f"there is no {key!r} to give a {name}",
                where=where,
                remedy=suggest(str(key), words),
            )
        if value in ("", None):
            raise ArgumentError(
                f"{key} has no value", where=where, remedy=f"write --{name} {key}=NUMBER"
            )
        if key in found:
            raise ArgumentError(f"{key} is given twice", where=where, remedy="give it once")
        found[str(key)] = value
    return found


def _amounts(given: Any, name: str) -> dict[str, Amount]:
    pairs = {} if given is None else _pairs(given, name, Modality)
    return {key: _amount(key, value, name) for key, value in pairs.items()}


def _amount(modality: str, value: Any, name: str) -> Amount:
    """Bits, where it is a plain number; else bytes."""
    if isinstance(value, Amount):
        return value
    try:
        if not isinstance(value, str) or _NUMBER.fullmatch(value):
            return Amount(bits=_bits(value, name))
        return Amount(bytes=as_bytes(value, name))
    except ArgumentError as error:
        raise ArgumentError(
            f"{modality}={value} is neither a size nor bits per weight above 0 and to {_MOST_BITS}",
            where=f"{name} (--{name})",
            remedy=f"write --{name} {modality}=4.5 for bits, or --{name} {modality}=500MB",
        ) from error


def _bits(value: Any, name: str) -> float:
    found = _number(value, name)
    if not 0 < found <= _MOST_BITS:
        raise ArgumentError(
            f"{value!r} is no number of bits per weight",
            where=name,
            remedy="give a number such as 4.6; --size takes sizes such as 3.2GB",
        )
    return found


def _number(value: Any, name: str) -> float:
    fits = not isinstance(value, bool) and isinstance(value, int | float)
    if isinstance(value, str):
        fits = _NUMBER.fullmatch(value) is not None
    if not fits or not math.isfinite(float(value)):
        option = "" if " " in name else f" (--{name.replace('_', '-')})"
        raise ArgumentError(
            f"{value!r} is not a number",
            where=name + option,
            remedy="give a plain number, e.g. 4.6 or 1e-3",
        )
    return float(value)
