"""Verify and repair: a found mix is measured, and swaps of formats that measure better are kept.

Scores of single units are added as if the units did not meet, so a mix may lose more than was
predicted of it. Here the mix itself is run and measured on data that no statistic saw. Then pairs
of units swap precision: one gets a better format, another a smaller one that frees the bytes. Units
come into question by what they are predicted to gain, or to lose, for a byte; pairs of them by what
they may gain where scores are off by some two thirds, for a pair of small ones brings nothing,
however close the call is. A swap is kept where the measured loss falls by more than its noise:
differences are taken sample by sample, so what is hard about a sample cancels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from prismquant.errors import DataError
from prismquant.evaluate.figures import Outcome
from prismquant.search.allocate import Allocation, Mix, set_up
from prismquant.search.constraints import Constraints
from prismquant.search.knapsack import Limit, Solved, total
from prismquant.search.limits import LOSS
from prismquant.search.sensitivity import TOKEN_CLASSES, Score, Sensitivity, TokenClass

NOISE = 2.0
"""Standard errors by which a swap must lower the loss to be kept."""
MAX_SWAPS = 1000
PATIENCE = 4
"""Swaps in a row that change nothing beyond noise, after which no more are tried."""

Moves = tuple[tuple[int, int], tuple[int, int]]
"""Two units, each with the option that it is given, by their places."""

# Share by which a score may be off. On made-up models with wrong scores twice as much repaired
# less, and so did the ratio of gain and cost alone.
_DOUBT = 0.7
# Of the changes with the best ratios, so many on either side are paired.
_PAIRED = 48


@dataclass(frozen=True)
class Measured:
    """Loss of a mix that was run.

    Attributes:
        losses: KL divergence from the unquantized model in nats a token, by class of token.
        loss: Their weighted sum.
        error: Its standard error over samples.
        parts: Share of each sample in the weighted sum, by its place and id.
    """

    losses: Mapping[TokenClass, Score]
    loss: float
    error: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Swap:
    """Formats that two units swapped for others, and what came of it.

    Attributes:
        before, after: Formats of the units, by name.
        predicted: Change of the predicted loss.
        measured: Change of the measured loss, below zero where it got better.
        error: Its standard error, from differences sample by sample.
        bytes: Change of the stored bytes.
        kept: Whether the mix has it.
    """

    before: Mapping[str, str]
    after: Mapping[str, str]
    predicted: float
    measured: float
    error: float
    bytes: int
    kept: bool


@dataclass(frozen=True)
class Verified:
    """A mix that was measured, and repaired where that helped.

    Attributes:
        mix: The mix, with the swaps that were kept.
        first: Measure of the mix as it was found.
        last: Measure of the mix as it is now.
        swaps: Swaps that were tried, in order.
    """

    mix: Mix
    first: Measured
    last: Measured
    swaps: tuple[Swap, ...]


def measured(outcomes: Sequence[Outcome], weights: Mapping[TokenClass, float]) -> Measured:
    """Weighted loss of an evaluation against the unquantized model.

    Args:
        outcomes: One for each sample.
        weights: Weight of each class of token.

    Raises:
        DataError: There are fewer than two samples, or none has tokens of a class that counts.
    """
    sums = {f"{place}: {one.id}": _by_class(one) for place, one in enumerate(outcomes)}
    try:
        return weighted(sums, weights)
    except DataError as error:
        raise DataError(
            f"the mix cannot be verified: {error.what}",
            where="--verify",
            remedy="give other samples",
        ) from error


def weighted(
    sums: Mapping[str, Mapping[TokenClass, tuple[float, int]]], weights: Mapping[TokenClass, float]
) -> Measured:
    """Weighted loss of samples.

    Args:
        sums: Divergence in nats, and tokens, of each sample by class of token, by the sample.
        weights: Weight of each class of token.

    Raises:
        DataError: There are fewer than two samples, or none has tokens of a class that counts.
    """
    tokens = {
        kind: sum(own[kind][1] for own in sums.values() if kind in own) for kind in TOKEN_CLASSES
    }
    counted = {k: w for k, w in weights.items() if w and tokens[k]}
    if len(sums) < 2 or not counted:
        what = "there are fewer than two samples"
        if len(sums) > 1:
            what = f"no sample has {' or '.join(k for k, w in weights.items() if w)} tokens"
        raise DataError(what)
    parts = {
        name: sum(w * own[k][0] / tokens[k] for k, w in counted.items() if k in own)
        for name, own in sums.items()
    }
    losses = {
        kind: Score(*_mean([own[kind] for own in sums.values() if kind in own]))
        for kind in TOKEN_CLASSES
        if tokens[kind]
    }
    return Measured(losses, math.fsum(parts.values()), _error(list(parts.values())), parts)


def difference(before: Measured, after: Measured) -> tuple[float, float]:
    """Change of the weighted loss, and its standard error from differences sample by sample.

    Raises:
        DataError: They are not of the same samples.
    """
    if before.parts.keys() != after.parts.keys():
        raise DataError("two measurements are of different samples", where="--verify")
    changes = [after.parts[name] - part for name, part in before.parts.items()]
    return math.fsum(changes), _error(changes)


def verify(
    found: Sensitivity,
    mix: Mix,
    constraints: Constraints,
    run: Callable[[Mix], Measured],
    trials: int,
) -> Verified:
    """Measure a mix, and swap formats of units while that helps.

    Swaps keep to all constraints but that on the predicted loss, in whose place the measured one
    falls; none takes more bytes than the mix as it was found.

    Args:
        found: The sensitivity.
        mix: The mix.
        constraints: What it keeps to.
        run: Quantizes the model to a mix and measures it.
        trials: At most so many swaps are tried.

    Raises:
        PrismQuantError: A mix cannot be run or measured.
    """
    search = set_up(found, replace(constraints, max_loss=None))
    chosen = _chosen(search, mix)
    size = Limit("size", search.sizes, most=total(search.sizes, chosen))
    search = replace(search, limits=(*(x for x in search.limits if x.name != LOSS), size))
    first = last = run(mix)
    swaps: list[Swap] = []
    spent: list[Moves] = []
    seen = {chosen}
    failed = 0
    while len(swaps) < trials and failed < PATIENCE:
        moves = next(_pairs(search, chosen, spent, seen), None)
        if moves is None:
            break
        trial = tuple(dict(moves).get(item, at) for item, at in enumerate(chosen))
        tried = _told(search, mix, trial)
        outcome = run(tried)
        swap = _swap(mix, tried, *difference(last, outcome))
        swaps.append(swap)
        spent.append(moves)
        seen.add(trial)
        failed = 0 if swap.kept else failed + 1
        if swap.kept:
            chosen, mix, last = trial, tried, outcome
    return Verified(mix, first, last, tuple(swaps))


def _by_class(outcome: Outcome) -> dict[TokenClass, tuple[float, int]]:
    """Divergence and tokens of a sample by class; placeholders are of its pictures or clips."""
    placeholder: TokenClass = "video" if outcome.kind == "video" else "image"
    names: dict[str, TokenClass] = {"answer": "answer", "text": "text", "vision": placeholder}
    return {names[n]: (one.kl, one.tokens) for n, one in outcome.deviations.items()}


def _mean(sums: Sequence[tuple[float, int]]) -> tuple[float, float | None]:
    """Mean of a token, and its standard error as that of a ratio of sums over samples."""
    tokens = sum(count for _, count in sums)
    mean = math.fsum(kl for kl, _ in sums) / tokens
    if len(sums) < 2:
        return mean, None
    return mean, _error([(kl - mean * count) / tokens for kl, count in sums])


def _error(parts: Sequence[float]) -> float:
    """Standard error of a sum of independent parts."""
    mean = math.fsum(parts) / len(parts)
    spread = math.fsum((part - mean) ** 2 for part in parts)
    return math.sqrt(spread * len(parts) / (len(parts) - 1))


def _chosen(search: Allocation, mix: Mix) -> tuple[int, ...]:
    return tuple(
        [option.format for option in unit.options].index(mix.formats[unit.name])
        for unit in search.units
    )


def _told(search: Allocation, mix: Mix, trial: Sequence[int]) -> Mix:
    """The mix of an answer that was not solved for; what it is predicted to lose is its gap."""
    tried = search.mix(Solved(tuple(trial), 0.0, mix.gap), mix.minimised)
    worse = tried.loss - mix.loss if mix.minimised == "loss" else 0.0
    return replace(tried, gap=max(mix.gap + worse, 0.0), notes=mix.notes)


def _swap(before: Mix, after: Mix, change: float, error: float) -> Swap:
    names = [name for name, was in before.formats.items() if after.formats[name] != was]
    return Swap(
        before={name: before.formats[name] for name in names},
        after={name: after.formats[name] for name in names},
        predicted=after.loss - before.loss,
        measured=change,
        error=error,
        bytes=after.stored_bytes - before.stored_bytes,
        kept=change < -NOISE * error,
    )


@dataclass(frozen=True)
class _OptionChange:
    """A unit's other option: what it changes of the predicted loss and of the stored bytes."""

    item: int
    option: int
    loss: float
    size: int

    @property
    def at(self) -> tuple[int, int]:
        """The unit and its option."""
        return (self.item, self.option)

    @property
    def rate(self) -> float:
        """Predicted loss that a byte takes away."""
        return -self.loss / self.size


def _pairs(
    search: Allocation,
    chosen: Sequence[int],
    spent: Sequence[Moves],
    seen: Collection[tuple[int, ...]],
) -> Iterator[Moves]:
    """Pairs of changes that keep to the limits, and lead to no mix that was seen.

    Those of which neither half was tried come first, and among them the most promising.
    """
    changes = list(_changes(search, chosen))
    better = sorted((m for m in changes if m.size > 0 > m.loss), key=lambda m: -m.rate)[:_PAIRED]
    smaller = sorted((m for m in changes if m.size < 0), key=lambda m: m.rate)[:_PAIRED]
    halves = Counter(half for moves in spent for half in moves)
    pairs = [
        (halves[up.at] + halves[down.at], -_promise(up, down), (up.at, down.at))
        for up in better
        for down in smaller
        if up.item != down.item
    ]
    for _, _, moves in sorted(pairs):
        trial = tuple(dict(moves).get(item, at) for item, at in enumerate(chosen))
        if trial not in seen and all(limit.holds(trial) for limit in search.limits):
            yield moves


def _promise(up: _OptionChange, down: _OptionChange) -> float:
    """Gain of a pair that is within reach if its scores are off by their usual share."""
    return -up.loss - down.loss + _DOUBT * math.hypot(up.loss, down.loss)


def _changes(search: Allocation, chosen: Sequence[int]) -> Iterator[_OptionChange]:
    for item, (at, losses, sizes) in enumerate(
        zip(chosen, search.losses, search.sizes, strict=True)
    ):
        for option in range(len(losses)):
            if option != at:
                size = int(sizes[option] - sizes[at])
                yield _OptionChange(item, option, losses[option] - losses[at], size)


def told(verified: Verified) -> dict[str, Any]:
    """A verification as JSON types, without the shares of single samples."""
    content = asdict(verified)
    del content["mix"]
    for side in ("first", "last"):
        del content[side]["parts"]
    return content


def verified_lines(verified: Verified, data: str) -> list[str]:
    """Lines of a recipe's comment on what was measured, and what was changed for it."""
    kept = [swap for swap in verified.swaps if swap.kept]
    lines = [
        f"measured on {data}, {len(verified.first.parts)} samples: {_loss(verified.first)}",
        f"swaps tried: {len(verified.swaps)}, kept: {len(kept)}",
    ]
    for swap in kept:
        units = ", ".join(
            f"{name} {was} -> {swap.after[name]}" for name, was in swap.before.items()
        )
        lines.append(
            f"  {units}: measured {swap.measured:+.4g} ± {swap.error:.2g}, "
            f"predicted {swap.predicted:+.4g}, {swap.bytes:+,} bytes"
        )
    return [*lines, *([f"measured with them: {_loss(verified.last)}"] if kept else [])]


def _loss(found: Measured) -> str:
    parts = ", ".join(
        f"{kind} {score.loss:.4g}" + (f" ± {score.error:.2g}" if score.error is not None else "")
        for kind, score in found.losses.items()
    )
    return f"loss {found.loss:.6g} ± {found.error:.2g} ({parts}; KL divergence a token)"
