"""Telling a person how far an analysis is: unit, what is done to it, its scores, time left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismquant.memory import peak_memory_bytes
from prismquant.report.progress import ProgressReporter
from prismquant.report.tables import as_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from prismquant.search.analysis import UnitScores
    from prismquant.search.sensitivity import Score, TokenClass


class AnalysisProgress(ProgressReporter):
    """A progress bar on a console; use it as a context manager around an analysis.

    Args:
        console: Where to draw.
        weights: Weight of each class of token in the losses that are told.

    Attributes:
        remarks: What a user should know, as it was told.
    """

    def __init__(self, console: Console, weights: Mapping[TokenClass, float]) -> None:
        super().__init__(console)
        self._weights = weights
        self.remarks: list[str] = []

    def remark(self, line: str) -> None:
        """Something that a user should know, on a line of its own."""
        self.remarks.append(line)
        super().remark(line)

    def scored(self, scores: UnitScores, seconds: float) -> None:
        """A unit has its scores: one line with the weighted loss of each format."""
        self._progress.advance(self._task)
        losses = {name: self._weighted(found) for name, found in scores.scores.items()}
        told = [f"{name} {loss:.3g}" for name, loss in losses.items() if loss is not None]
        said = f"loss: {', '.join(told)}" if told else "no score that counts"
        memory = f"{peak_memory_bytes() / 2**20:.0f} MiB peak"
        self._console.print(as_text(f"{scores.unit}: {said} ({seconds:.1f} s, {memory})"))

    def _weighted(self, found: Mapping[TokenClass, Score]) -> float | None:
        """Weighted sum of scores by class; None where no class that has one counts."""
        counted = [kind for kind in found if self._weights.get(kind, 0.0)]
        return sum(self._weights[kind] * found[kind].loss for kind in counted) if counted else None
