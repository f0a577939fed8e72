"""Tables of the bench: rank correlations with the truth, and what mixes lose."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import spearmanr

from prismquant.search.sensitivity import Sensitivity

CLASSES = ("answer", "text")

Result = dict[str, Any]


@dataclass(frozen=True)
class Measures:
    """Everything that was measured of one model.

    Attributes:
        name: The model's.
        done: Finished cells by their place.
        sensitivity: Gives what an analysis has written: by method, solver and draw.
        methods, solvers, formats: What was compared.
        draws: Calibration sets.
    """

    name: str
    done: Mapping[tuple[Any, ...], Result]
    sensitivity: Callable[[str, str, int], Sensitivity]
    methods: Sequence[str]
    solvers: Sequence[str]
    formats: Sequence[str]
    draws: range

    def peers(self) -> list[tuple[str, int]]:
        """Other tools' modes that have been run, each with its draw."""
        return [(key[2], key[3]) for key in self.done if key[:2] == (self.name, "peer")]


RANKS = ["model", "solver", "method", "class", "format", "Spearman", "lowest", "CPU s", "peak MiB"]
MIXES = ["model", "solver", "budget", "mix", "KL answer", "KL text", "sets"]


def peer_rows(found: Measures, kind: str) -> list[list[str]]:
    """Rank correlations of other tools' scores with the truth."""
    rows = []
    modes = dict.fromkeys(mode for mode, _ in found.peers())
    for solver in found.solvers:
        for mode in modes:
            runs = [found.done[found.name, "peer", m, d] for m, d in found.peers() if m == mode]
            cost = [
                f"{statistics.fmean(run['cpu'] for run in runs):.1f}",
                f"{max(run['peak'] for run in runs) / 2**20:.0f}",
            ]
            for place, fmt in enumerate(found.formats):
                rhos = [_peer_spearman(found, run, solver, kind, place, fmt) for run in runs]
                rho = [f"{statistics.fmean(rhos):.3f}", f"{min(rhos):.3f}"]
                rows.append([found.name, solver, mode, kind, fmt, *rho, *cost])
    return rows


def _peer_spearman(
    found: Measures, run: Result, solver: str, kind: str, place: int, fmt: str
) -> float:
    scores, truths = [], []
    units = found.sensitivity(found.methods[0], solver, 0).units
    names = {unit.layers[0].name: unit.name for unit in units if unit.layers}
    for group in run["groups"].values():
        if len(group["scores"]) > place + 1:
            scores.append(group["scores"][place])
            unit = next(names[m] for m in group["modules"] if m in names)
            truths.append(found.done[found.name, "truth", solver, unit, fmt][kind])
    return float(spearmanr(scores, truths).statistic)


def rank_rows(found: Measures) -> list[list[str]]:
    """Rank correlations, the mean and the lowest over draws."""
    rows = []
    done, name = found.done, found.name
    for solver in found.solvers:
        for method in found.methods:
            runs = [done[name, "score", method, solver, draw] for draw in found.draws]
            cost = [
                f"{statistics.fmean(run['cpu'] for run in runs):.1f}",
                f"{max(run['peak'] for run in runs) / 2**20:.0f}",
            ]
            for kind in CLASSES:
                for fmt in found.formats:
                    rhos = [_spearman(found, method, solver, d, kind, fmt) for d in found.draws]
                    known = [rho for rho in rhos if rho is not None]
                    if known:
                        rho = [f"{statistics.fmean(known):.3f}", f"{min(known):.3f}"]
                        rows.append([name, solver, method, kind, fmt, *rho, *cost])
    return rows + [row for kind in CLASSES for row in peer_rows(found, kind)]


def _spearman(
    found: Measures, method: str, solver: str, draw: int, kind: str, fmt: str
) -> float | None:
    """Rank correlation of scores with the truth; None where the method scores no such class."""
    scores, truths = [], []
    for unit in found.sensitivity(method, solver, draw).units:
        for option in unit.options:
            if option.format == fmt:
                # Methods without classes of their own have one score for all.
                score = option.scores.get(kind) or next(iter(option.scores.values()), None)
                if score is None:
                    return None
                scores.append(score.loss)
                truths.append(found.done[found.name, "truth", solver, unit.name, fmt][kind])
    return float(spearmanr(scores, truths).statistic)


def mix_rows(found: Measures) -> list[list[str]]:
    """What mixes lose, beside uniform and random ones."""
    rows: list[list[str]] = []
    kinds: dict[tuple[str, str, str], list[Result]] = {}
    for (name, what, *rest), result in found.done.items():
        if name == found.name and what in ("uniform", "mix", "random"):
            solver, label = rest[0], rest[1]
            mix = rest[2] if what == "mix" else what
            kinds.setdefault((solver, label, mix), []).append(result)
    for (solver, label, mix), results in sorted(kinds.items()):
        means = [statistics.fmean(r[kind] for r in results) for kind in CLASSES]
        rows.append(
            [found.name, solver, label, mix, *(f"{v:.5f}" for v in means), str(len(results))]
        )
        if mix == "random":
            best = [min(r[kind] for r in results) for kind in CLASSES]
            told = [*(f"{v:.5f}" for v in best), str(len(results))]
            rows.append([found.name, solver, label, "best of random", *told])
    return rows
