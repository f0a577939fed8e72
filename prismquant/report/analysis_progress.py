"""Telling a person how far an analysis is: unit, what is done to it, its scores, time left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismquant.memory import peak_memory_bytes
from prismquant.report.progress import ProgressReporter
from prismquant.report.tables import as_text

if TYPE_CHECKING:
    from prismquant.search.analysis import UnitScores


class AnalysisProgress(ProgressReporter):
    """A progress bar on a console; use it as a context manager around an analysis."""

    def scored(self, scores: UnitScores, seconds: float) -> None:
        """A unit has its scores: one line with the loss of each format."""
        self._progress.advance(self._task)
        losses = [
            f"{name} {', '.join(f'{kind} {score.loss:.3g}' for kind, score in found.items())}"
            for name, found in scores.scores.items()
        ]
        memory = f"{peak_memory_bytes() / 2**20:.0f} MiB peak"
        line = f"{scores.unit}: {'; '.join(losses)} ({seconds:.1f} s, {memory})"
        self._console.print(as_text(line))
