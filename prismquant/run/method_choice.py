"""The choice among a recipe's alternatives, as the record of a run keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prismquant.arguments import EXACT


@dataclass(frozen=True)
class MethodTrial:
    """One alternative that was tried in one round, and what it lost on samples held out.

    Attributes:
        name: Of the alternative.
        round: In which it was tried, from 0; each has more calibration samples than the one before.
        samples: Calibration samples that its statistics saw.
        loss: Weighted sum of the KL divergences from the unquantized model, in nats a token; None
            where it failed.
        error: Its standard error over samples.
        kl: Mean divergence by class of token: ``answer``, ``text``, ``vision``.
        parts: Share of each held-out sample in the loss.
        seconds: Wall time of the trial.
        failure: Why it could not be tried; empty if it could.
    """

    __pydantic_config__ = EXACT

    name: str
    round: int
    samples: int
    loss: float | None = None
    error: float | None = None
    kl: Mapping[str, float] | None = None
    parts: Mapping[str, float] | None = None
    seconds: float = 0.0
    failure: str = ""


@dataclass(frozen=True)
class MethodChoice:
    """Choice of one alternative, and what it rests on.

    Attributes:
        recipe: Name of the recipe that left the choice.
        chosen: Name of the alternative.
        why: In words.
        weights: Weight of each class of token in the loss.
        held_out: Ids of the samples that losses are of; no statistic of a trial saw them.
        seen: Ids of the samples that the last round's statistics saw.
        trials: All trials, round by round.
    """

    __pydantic_config__ = EXACT

    recipe: str
    chosen: str
    why: str
    weights: Mapping[str, float]
    held_out: tuple[str, ...]
    seen: tuple[str, ...]
    trials: tuple[MethodTrial, ...]
