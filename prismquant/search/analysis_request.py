"""Request to analyze a model, its arguments checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from prismquant.arguments import as_items
from prismquant.data.media import Limits
from prismquant.distributed import Ranks
from prismquant.engine.setup import Reporter, Silent
from prismquant.errors import ArgumentError, suggest
from prismquant.models.arch import Modality
from prismquant.runtime.mixed import Wanted
from prismquant.search.analysis import AnalysisMethod, UnitScores
from prismquant.search.sensitivity import (
    LEAST_WEIGHT,
    MOST_WEIGHT,
    TOKEN_CLASSES,
    Choice,
    TokenClass,
    is_weight,
)

DEFAULT_WEIGHTS: Mapping[TokenClass, float] = {
    "answer": 1.0,
    "text": 0.2,
    "image": 0.0,
    "video": 0.0,
}
"""Weight of each class of token in the sum of scores, where none is given.

A model is asked for its answers; what it predicts at placeholders is never read.
"""


class AnalysisReporter(Reporter, Protocol):
    """Is told how far an analysis is."""

    def scored(self, scores: UnitScores, seconds: float) -> None:
        """A unit has its scores, so many seconds after the one before."""


class SilentAnalysis(Silent):
    """A reporter that says nothing."""

    def scored(self, scores: UnitScores, seconds: float) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class AnalysisRequest:
    """Everything that a caller of :func:`prismquant.search.public.analyze` may say, checked.

    Attributes:
        model: Folder of the checkpoint.
        calibration: A data file or the name of a data set, or None.
        formats: Formats on offer, by name.
        out: File of the result.
        method_name, method: The method of analysis.
        solver: The method that chooses codes.
        samples: At most so many calibration samples.
        batch_size: Samples run together.
        seed: Chooses samples, and all that is drawn.
        weights: Weight of each class of token.
        modalities: Those that are chosen for; none: all.
        disable: Layers that are left alone, with wildcards.
        target: Device of the arithmetic.
        wanted: Dtype of the arithmetic; None: float32 on a CPU, else the checkpoint's.
        memory_budget: Bytes that the process may take; None: what the system can spare.
        limits: Sizes of pictures, clips and samples.
        resume: Go on with an analysis that was cut off.
        of_data: Options that were given and are about calibration data alone.
        trust_remote_code: Allow code in the checkpoint's folder to build the processor.
        reporter: Is told how far the analysis is.
        ranks: The processes that share the work.
    """

    model: Path
    calibration: str | Path | None
    formats: Mapping[str, Choice]
    out: Path
    method_name: str
    method: AnalysisMethod
    solver: str
    samples: int
    batch_size: int
    seed: int
    weights: Mapping[TokenClass, float]
    modalities: Sequence[str]
    disable: Sequence[str]
    target: torch.device
    wanted: Wanted
    memory_budget: int | None
    limits: Limits
    resume: bool
    of_data: Sequence[str]
    trust_remote_code: bool
    reporter: AnalysisReporter
    ranks: Ranks


def as_modalities(value: Any) -> tuple[str, ...]:
    """Names of modalities: a text with commas between them, or a list.

    Raises:
        ArgumentError: One is none, or none is named; says which there are.
    """
    known, words = [modality.value for modality in Modality], _words(value)
    if value is not None and not words:
        raise ArgumentError(
            "no modality is named",
            where="modalities (--modalities)",
            remedy=f"name some of {', '.join(known)}, or leave it out to choose for all",
        )
    for name in words:
        if name not in known:
            raise ArgumentError(
                f"there is no modality {name!r}",
                where="modalities (--modalities)",
                remedy=suggest(str(name), known),
            )
    return tuple(dict.fromkeys(words))


def as_patterns(value: Any) -> tuple[str, ...]:
    """Names of layers with wildcards: a text, or a list of texts.

    Raises:
        ArgumentError: One is no text, or empty.
    """
    patterns = tuple(as_items(value))
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.strip():
            raise ArgumentError(
                f"{pattern!r} is no name of layers",
                where="disable (--disable)",
                remedy="name layers, in which * stands for anything, e.g. --disable '*lm_head*'",
            )
    return patterns


def as_token_weights(value: Any) -> dict[TokenClass, float]:
    """Weight of each class of token, from ``answer=1,text=0.2`` or a mapping.

    Args:
        value: What was given; None: :data:`DEFAULT_WEIGHTS`. Classes that are not named count for
            nothing.

    Raises:
        ArgumentError: A class is unknown or named twice, a weight is neither 0 nor a number from
            1e-6 to 1000, or all are 0.
    """
    if value is None:
        return dict(DEFAULT_WEIGHTS)
    pairs = value.items() if isinstance(value, Mapping) else map(_pair, _words(value))
    found: dict[TokenClass, float] = {}
    for name, number in pairs:
        if name not in TOKEN_CLASSES:
            raise _no_weight(
                f"there is no class of tokens {name!r}", suggest(str(name), TOKEN_CLASSES)
            )
        try:
            weight = math.nan if isinstance(number, bool) else float(number)
        except (TypeError, ValueError):
            weight = math.nan
        if not is_weight(weight):
            raise _no_weight(
                f"{number!r} is no weight: neither 0 nor from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
            )
        if name in found:
            raise _no_weight(f"{name} is given twice", "give it once")
        found[name] = weight
    if not any(found.values()):
        raise _no_weight("no class of tokens has a weight above 0")
    return dict.fromkeys(TOKEN_CLASSES, 0.0) | found


def _pair(word: Any) -> tuple[Any, Any]:
    name, equals, number = word.partition("=") if isinstance(word, str) else (word, "", "")
    if not equals:
        raise _no_weight(f"{word!r} is no class of tokens with its weight")
    return name.strip(), number.strip()


def _no_weight(what: str, remedy: str | None = None) -> ArgumentError:
    remedy = remedy or "give some, e.g. --weight answer=1,text=0.2"
    return ArgumentError(what, where="weight (--weight)", remedy=remedy)


def _words(value: Any) -> list[Any]:
    """Words of a text, or of all texts of a list, that commas keep apart."""
    found: list[Any] = []
    for text in as_items(value):
        found += (
            [w.strip() for w in text.split(",") if w.strip()] if isinstance(text, str) else [text]
        )
    return found
