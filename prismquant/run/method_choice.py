"""The choice among a recipe's alternatives, as the record of a run keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prismquant.arguments import EXACT

WHOLE = "model"
"""The part that a choice is about where one alternative is chosen for the whole model."""


@dataclass(frozen=True)
class MethodTrial:
    """One alternative that was tried in one round, and what it lost on samples held out.

    Attributes:
        name: Of the alternative.
        round: In which it was tried, from 0; each has more calibration samples than the one before.
        samples: Calibration samples that its statistics saw.
        part: Part of the model that was quantized: ``vision`` (tower and projector) or ``llm``, the
            other one in floating point; or ``model``, where one alternative is chosen for all.
        loss: Weighted sum of the KL divergences from the unquantized model, in nats a token; None
            where it failed.
        error: Its standard error over samples.
        kl: Mean divergence by class of token that counts: ``answer``, ``text``.
        parts: Share of each held-out sample in the loss.
        seconds: Wall time of the trial.
        failure: Why it could not be tried, a finding a line; empty if it could.
        remedy: What helps against that, where anything does.
    """

    __pydantic_config__ = EXACT

    name: str
    round: int
    samples: int
    part: str = WHOLE
    loss: float | None = None
    error: float | None = None
    kl: Mapping[str, float] | None = None
    parts: Mapping[str, float] | None = None
    seconds: float = 0.0
    failure: str = ""
    remedy: str = ""

    @property
    def told_failure(self) -> str:
        """The first finding of its failure, and how many more there are."""
        first, *others = self.failure.split("\n")
        if not others:
            return first
        said = {line.partition(": ")[2] for line in (first, *others)}
        return f"{first}; and {len(others)} more{' like it' * (len(said) == 1)}"


@dataclass(frozen=True)
class MethodChoice:
    """Choice of one alternative, or of one for each part of the model, and what it rests on.

    Attributes:
        recipe: Name of the recipe that left the choice.
        chosen: Name of the alternative, by part of the model.
        why: In words, by part; of both parts together under ``model``, where that was tried.
        weights: Weight of each class of token in the loss.
        held_out: Ids of the samples that losses are of; no statistic of a trial saw them.
        seen: Ids of the samples that statistics of trials saw.
        trials: All trials, round by round.
    """

    __pydantic_config__ = EXACT

    recipe: str
    chosen: Mapping[str, str]
    why: Mapping[str, str]
    weights: Mapping[str, float]
    held_out: tuple[str, ...]
    seen: tuple[str, ...]
    trials: tuple[MethodTrial, ...]

    @property
    def told(self) -> str:
        """The choice in words, such as ``rotation``, or ``vision: plain, llm: rotation``."""
        return told_parts(self.chosen)


def told_parts(chosen: Mapping[str, str]) -> str:
    """A choice in words: the alternative of the whole model, or that of each part.

    Args:
        chosen: Name of the alternative, by part of the model.
    """
    if [*chosen] == [WHOLE]:
        return chosen[WHOLE]
    return ", ".join(f"{part}: {name}" for part, name in chosen.items())
