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
        """A unit has its scores: one line with the loss of each format, by its first class."""
        self._progress.advance(self._task)
        # All classes are in the file, and their sum in the table at the end.
        firsts = {name: next(iter(found.items()), None) for name, found in scores.scores.items()}
        losses = [f"{name} {one[1].loss:.3g}" for name, one in firsts.items() if one]
        kind = next((one[0] for one in firsts.values() if one), "")
        memory = f"{peak_memory_bytes() / 2**20:.0f} MiB peak"
        said = f"{kind} loss: {', '.join(losses)}" if losses else "no score"
        line = f"{scores.unit}: {said} ({seconds:.1f} s, {memory})"
        self._console.print(as_text(line))
