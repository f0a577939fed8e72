"""Constraints as bounds of sums over chosen options, and words for those that cannot be met."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from prismquant.errors import PlanError, listed
from prismquant.memory import readable_bytes
from prismquant.models.arch import Modality
from prismquant.search.constraints import Constraints
from prismquant.search.knapsack import Limit, Table, solve
from prismquant.search.sensitivity import ChoiceUnit, Sensitivity

# Names of bounds, as errors say them.
_TOTAL, _OF = "size", "size of "
LOSS, _CACHE, _LATENCY = "loss", "size of keys and values of a token", "milliseconds"
# Units that an error names as those that hold a budget where it is.
_SHOWN = 5
# Lines of an error.
_LINES = 8
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


def limits_of(
    found: Sensitivity, constraints: Constraints, units: Sequence[ChoiceUnit], losses: Table
) -> tuple[Limit, ...]:
    """Bounds of sums over the chosen options.

    Args:
        found: The sensitivity.
        constraints: What a mix must keep to.
        units: Units with the options on offer.
        losses: Weighted sum of the scores of each of these options.

    Raises:
        DataError: The table of latencies lacks times.
        PlanError: Keys and values are bounded, but no format of theirs was analyzed.
    """
    sizes = tuple(tuple(option.stored_bytes for option in unit.options) for unit in units)
    limits = []
    if constraints.total is not None:
        weights = found.fixed_weights + _weights(units)
        most = constraints.total.of(weights) - found.fixed_bytes
        limits.append(Limit(_TOTAL, sizes, most=most))
    for modality in Modality:
        name = modality.value
        own = [unit for unit in units if unit.modality == name]
        amounts = tuple(
            row if unit.modality == name else (0,) * len(row)
            for unit, row in zip(units, sizes, strict=True)
        )
        cap, floor = constraints.caps.get(name), constraints.floors.get(name)
        if cap is not None:
            limits.append(Limit(f"{_OF}{name}", amounts, most=cap.of(_weights(own))))
        if floor is not None:
            limits.append(Limit(f"{_OF}{name}", amounts, least=floor.of(_weights(own))))
    if constraints.cache_bytes is not None:
        _require_cache(units)
        cached = tuple(tuple(option.cache_bytes for option in unit.options) for unit in units)
        limits.append(Limit(_CACHE, cached, most=constraints.cache_bytes))
    if constraints.latency is not None and constraints.latency_ms is not None:
        times = constraints.latency.table(units)
        limits.append(Limit(_LATENCY, times, most=constraints.latency_ms))
    if constraints.max_loss is not None:
        limits.append(Limit(LOSS, losses, most=constraints.max_loss))
    return tuple(limits)


def _require_cache(units: Sequence[ChoiceUnit]) -> None:
    if not any(unit.kind == "kv_cache" for unit in units):
        raise PlanError(
            "the sensitivity has no format of the key-value cache, so none can be bounded",
            remedy="leave out --cache-bytes, or offer one: `analyze --formats kv:fp8,..`",
        )


def unmet(
    found: Sensitivity,
    constraints: Constraints,
    units: Sequence[ChoiceUnit],
    limits: Sequence[Limit],
    notes: Sequence[str] = (),
) -> PlanError:
    """The error for constraints that no mix keeps to: the least that can be, and what holds it.

    Args:
        found: The sensitivity.
        constraints: What was asked for.
        units: Units with the options on offer.
        limits: The same as bounds, which no mix keeps to.
        notes: Options that are not on offer, and why.
    """
    bounds = [_Bound(limit, units, found) for limit in limits]
    findings = [line for bound in bounds for line in bound.alone()]
    if not findings:
        for place, bound in enumerate(bounds):
            findings += bound.beside([*limits[:place], *limits[place + 1 :]])
    findings = [*(findings or ["three or more of them are at odds"]), *notes]
    asked = "; ".join(constraints.describe())
    return PlanError(
        f"no mix of the formats on offer keeps to: {asked}{listed(findings, _LINES)}",
        remedy="relax what is told of, or let `prismquant analyze` offer other formats (--formats)",
        findings=findings,
    )


@dataclass(frozen=True)
class _Bound:
    """A bound that is told of.

    Attributes:
        limit: The bound.
        units: Units with the options on offer.
        found: The sensitivity.
    """

    limit: Limit
    units: Sequence[ChoiceUnit]
    found: Sensitivity

    @property
    def fixed(self) -> int:
        """Part of what is bounded that no option changes."""
        return self.found.fixed_bytes if self.limit.name == _TOTAL else 0

    def alone(self) -> list[str]:
        """Line on a bound that no mix keeps to, whatever else is asked; none where some does."""
        limit, rows = self.limit, self.limit.amounts
        least = sum((Fraction(min(row)) for row in rows), Fraction(0))
        most = sum((Fraction(max(row)) for row in rows), Fraction(0))
        if limit.most is not None and least > limit.most:
            held = self._held()
            by = f", held there by {held}" if held else ""
            return [f"the least {limit.name} is {self._whole(least)}{by}"]
        if limit.least is not None and most < limit.least:
            return [f"the most {limit.name} is {self._whole(most)}"]
        return []

    def beside(self, others: Sequence[Limit]) -> list[str]:
        """Line on how far it must be moved where the others stay; none where that is no help."""
        lower, rows = self.limit.most is not None, self.limit.amounts
        costs = rows if lower else tuple(tuple(-amount for amount in row) for row in rows)
        solved = solve(costs, others)
        if solved is None:
            return []
        reached = self._whole(self.limit.total(solved.chosen))
        word = "least" if lower else "most"
        return [f"beside the rest, the {word} {self.limit.name} is {reached}"]

    def _held(self) -> str:
        """Units that have the most of a sum that cannot be less; those of all blocks together."""
        held: dict[tuple[str, str], list[int | float]] = {}
        for unit, row in zip(self.units, self.limit.amounts, strict=True):
            at = min(range(len(row)), key=row.__getitem__)
            key = (_INDEX.sub("*", unit.name), unit.options[at].format)
            held.setdefault(key, []).append(row[at])
        sums = sorted(
            ((sum(parts), key) for key, parts in held.items() if any(parts)), reverse=True
        )
        lines = [f"{self._amount(self.fixed)} in tensors of no unit"] if self.fixed else []
        for amount, (name, format_name) in sums[:_SHOWN]:
            count = len(held[name, format_name])
            of = f" in {count} units" if count > 1 else ""
            lines.append(f"{self._amount(amount)} in {name}{of} as {format_name}")
        left = len(sums) - _SHOWN
        lines += [f"less in {left} other kinds of units"] if left > 0 else []
        return "; ".join(lines)

    def _whole(self, amount: Fraction) -> str:
        """A sum with what no option changes; bytes in bits as well."""
        name, whole = self.limit.name, amount + self.fixed
        own = [unit for unit in self.units if name in (_TOTAL, f"{_OF}{unit.modality}")]
        weights = _weights(own) + (self.found.fixed_weights if name == _TOTAL else 0)
        if not weights:
            return self._amount(whole)
        # Rounded so that these bits can be had.
        digits = math.ceil if self.limit.most is not None else math.floor
        bits = digits(8 * whole / weights * 10**4) / 10**4
        return f"{self._amount(whole)}, {bits:.4f} bits per weight"

    def _amount(self, amount: Fraction | float) -> str:
        if self.limit.name in (LOSS, _LATENCY):
            return f"{float(amount):.6g}"
        return f"{math.ceil(amount):,} bytes ({readable_bytes(math.ceil(amount))})"


def _weights(units: Sequence[ChoiceUnit]) -> int:
    return sum(layer.weights for unit in units for layer in unit.layers)
