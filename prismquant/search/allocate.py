"""The best mix of formats within constraints: a multiple-choice knapsack over stored bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prismquant.errors import PlanError
from prismquant.search.constraints import Constraints
from prismquant.search.knapsack import Limit, Solved, Table, solve, total
from prismquant.search.limits import limits_of, unmet
from prismquant.search.offers import offers
from prismquant.search.sensitivity import (
    FLOAT,
    TOKEN_CLASSES,
    ChoiceUnit,
    FormatOption,
    Sensitivity,
    TokenClass,
)


@dataclass(frozen=True)
class Mix:
    """A format for every unit of choice, with what is predicted of it.

    Attributes:
        formats: Name of the option of each unit, by the unit's name.
        loss: Weighted sum of the scores.
        losses: Sum of the scores by class of token, not weighted.
        stored_bytes: Bytes of all tensors on disk.
        bits: Mean bits per weight: eight times these bytes, through the number of all weights.
        cache_bytes: Bytes of keys and values for each token in the cache.
        latency_ms: Milliseconds by the table of latencies; None where there is none.
        gap: What is proved of it: no other mix within the constraints has a loss lower by more,
            or, where bytes were made few, that many bytes less.
        minimised: ``loss`` or ``bytes``.
        notes: Things that a user should know: options that were not on offer, and why.
    """

    formats: Mapping[str, str]
    loss: float
    losses: Mapping[TokenClass, float]
    stored_bytes: int
    bits: float
    cache_bytes: int
    latency_ms: float | None
    gap: float
    minimised: str
    notes: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether any unit is not left alone."""
        return any(name != FLOAT for name in self.formats.values())


@dataclass(frozen=True)
class Allocation:
    """A search that is set up: what may be chosen, and what it costs.

    Attributes:
        found: The sensitivity.
        constraints: What a mix must keep to.
        units: Units with the options on offer.
        losses: Weighted sum of the scores of each option of each unit.
        limits: Bounds of sums over the chosen options.
        notes: Options that are not on offer, and why.
    """

    found: Sensitivity
    constraints: Constraints
    units: tuple[ChoiceUnit, ...]
    losses: Table
    limits: tuple[Limit, ...]
    notes: tuple[str, ...]

    @property
    def sizes(self) -> Table:
        """Stored bytes of each option of each unit."""
        return table_of(self.units, lambda option: option.stored_bytes)

    def mix(self, solved: Solved, minimised: str = "loss") -> Mix:
        """The mix that an answer means."""
        chosen = solved.chosen
        options = [unit.options[at] for unit, at in zip(self.units, chosen, strict=True)]
        names = {unit.name: option.format for unit, option in zip(self.units, options, strict=True)}
        size = stored_bytes(self.found, options)
        latency = self.constraints.latency
        times = None if latency is None else float(total(latency.table(self.units), chosen))
        kinds = [k for k in TOKEN_CLASSES if any(k in option.scores for option in options)]
        return Mix(
            formats=names,
            loss=float(total(self.losses, chosen)),
            losses={
                kind: sum(o.scores[kind].loss for o in options if kind in o.scores)
                for kind in kinds
            },
            stored_bytes=size,
            bits=8 * size / all_weights(self.found),
            cache_bytes=sum(option.cache_bytes for option in options),
            latency_ms=times,
            gap=solved.gap,
            minimised=minimised,
            notes=self.notes,
        )


def set_up(found: Sensitivity, constraints: Constraints) -> Allocation:
    """Set up a search: what is on offer, what it costs, and what bounds it.

    Args:
        found: The sensitivity.
        constraints: What a mix must keep to.

    Raises:
        PlanError: An option lacks the scores of a class of token that counts.
        DataError: The table of latencies lacks times, or names units that there are not.
    """
    units, dropped = offers(found, constraints)
    if constraints.latency is not None:
        constraints.latency.require_units(found)
        dropped += constraints.latency.idle(found)
    weights = constraints.weights or found.weights
    losses = table_of(units, lambda option: weighted(option, weights))
    dropped += _require_scores(units, weights)
    limits = limits_of(found, constraints, units, losses)
    return Allocation(found, constraints, units, losses, limits, tuple(dropped))


def allocate(found: Sensitivity, constraints: Constraints) -> Mix:
    """Find the mix of the least loss within constraints, or of the fewest bytes within a loss.

    The fewest bytes are looked for where ``max_loss`` is given and no total; of all mixes of these
    bytes the best is taken.

    Args:
        found: The sensitivity.
        constraints: What the mix must keep to.

    Returns:
        The mix, which keeps to every constraint in exact arithmetic.

    Raises:
        PlanError: No mix keeps to the constraints; says which least can, and what holds it there.
        DataError: The table of latencies lacks times.
    """
    search = set_up(found, constraints)
    smallest = constraints.max_loss is not None and constraints.total is None
    solved = solve(search.sizes if smallest else search.losses, search.limits)
    if solved is None:
        raise unmet(found, constraints, search.units, search.limits, search.notes)
    if not smallest:
        return search.mix(solved)
    size = Limit("bytes", search.sizes, most=total(search.sizes, solved.chosen))
    best = solve(search.losses, [*search.limits, size]) or solved
    return search.mix(Solved(best.chosen, solved.cost, solved.gap), "bytes")


def table_of(units: Sequence[ChoiceUnit], number: Callable[[FormatOption], int | float]) -> Table:
    """A number of each option of each unit."""
    return tuple(tuple(number(option) for option in unit.options) for unit in units)


def weighted(option: FormatOption, weights: Mapping[TokenClass, float]) -> float:
    """Sum of an option's scores; classes without a weight count nothing."""
    return sum(weights.get(kind, 0.0) * score.loss for kind, score in option.scores.items())


def all_weights(found: Sensitivity) -> int:
    """Number of all weights of a model: of its layers, and of everything else on disk."""
    return found.fixed_weights + sum(layer.weights for u in found.units for layer in u.layers)


def stored_bytes(found: Sensitivity, options: Sequence[FormatOption]) -> int:
    """Bytes of all tensors on disk where the units have these options."""
    return found.fixed_bytes + sum(option.stored_bytes for option in options)


def _require_scores(units: Sequence[ChoiceUnit], weights: Mapping[TokenClass, float]) -> list[str]:
    """Refuse options that lack a score that counts; lines on classes of which there is no score."""
    counted = {kind for kind, weight in weights.items() if weight}
    scored = {kind for unit in units for option in unit.options for kind in option.scores}
    if not counted & scored:
        raise PlanError(
            f"no option has scores of {', '.join(sorted(counted)) or 'any'} tokens",
            remedy=f"weigh others with --weight; there are {', '.join(sorted(scored))}"
            if scored
            else "analyze again with another --method, or other --formats",
        )
    for unit in units:
        for option in unit.options[1:]:
            missing = counted & scored - option.scores.keys()
            if missing:
                raise PlanError(
                    f"{option.format} has no score of {', '.join(sorted(missing))} tokens",
                    where=unit.name,
                    remedy="analyze again with samples of that kind, or weigh it with 0",
                )
    return [
        f"the analysis has seen no {kind} tokens, so their weight counts nothing"
        for kind in sorted(counted - scored)
    ]
