"""Tables of the bench: rank correlations with the truth, and what mixes lose."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import spearmanr

from prismquant.search.analysis_request import DEFAULT_WEIGHTS
from prismquant.search.sensitivity import Sensitivity, TokenClass

CLASSES: tuple[TokenClass, ...] = ("answer", "text")

Result = dict[str, Any]
Loss = tuple[float, float]


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


@dataclass(frozen=True)
class Table:
    """A table with its title."""

    title: str
    headers: list[str]
    rows: list[list[str]]


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
                known = [rho for rho in rhos if rho is not None]
                if known:
                    rho = [f"{statistics.fmean(known):.3f}", f"{min(known):.3f}"]
                    rows.append([found.name, solver, mode, kind, fmt, *rho, *cost])
    return rows


def _peer_spearman(
    found: Measures, run: Result, solver: str, kind: str, place: int, fmt: str
) -> float | None:
    scores, truths = [], []
    units = found.sensitivity(found.methods[0], solver, 0).units
    names = {unit.layers[0].name: unit.name for unit in units if unit.layers}
    for group in run["groups"].values():
        if len(group["scores"]) > place + 1:
            unit = next(names[m] for m in group["modules"] if m in names)
            truth = found.done.get((found.name, "truth", solver, unit, fmt))
            if truth is not None:
                scores.append(group["scores"][place])
                truths.append(truth[kind])
    return float(spearmanr(scores, truths).statistic) if len(truths) > 2 else None


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
    found: Measures, method: str, solver: str, draw: int, kind: TokenClass, fmt: str
) -> float | None:
    """Rank correlation of scores with the truth; None where the method scores no such class, or
    fewer than three truths are known.
    """
    scores, truths = [], []
    for unit in found.sensitivity(method, solver, draw).units:
        for option in unit.options:
            if option.format == fmt:
                # Methods without classes of their own have one score for all.
                score = option.scores.get(kind) or next(iter(option.scores.values()), None)
                if score is None:
                    return None
                truth = found.done.get((found.name, "truth", solver, unit.name, fmt))
                if truth is not None:
                    scores.append(score.loss)
                    truths.append(truth[kind])
    return float(spearmanr(scores, truths).statistic) if len(truths) > 2 else None


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


def tables_of(found: Measures) -> list[Table]:
    """The essence of ranks and mixes, then all of both."""
    ranks, name = rank_rows(found), found.name
    return [
        Table(f"{name}: ranks, mean of formats and draws (lowest)", *rank_essence(found, ranks)),
        Table(f"{name}: KL of mixes, answers / text", *mix_essence(found)),
        Table(f"{name}: all ranks", RANKS, ranks),
        Table(f"{name}: all mixes", MIXES, mix_rows(found)),
    ]


def rank_essence(
    found: Measures, rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: a line for each method, a column for each solver and class of token."""
    places = [(solver, kind) for solver in found.solvers for kind in CLASSES]
    headers = ["scores", *(f"{solver}, {kind}" for solver, kind in places), "CPU s"]
    lines = []
    for method in dict.fromkeys(row[2] for row in rows):
        cells = []
        for place in places:
            own = [row for row in rows if row[2] == method and (row[1], row[3]) == place]
            if not own:
                cells.append("")
                continue
            mean = statistics.fmean(float(row[5]) for row in own)
            cells.append(f"{mean:.2f} ({min(float(row[6]) for row in own):.2f})")
        seconds = dict.fromkeys(row[7] for row in rows if row[2] == method)
        lines.append([method, *cells, " / ".join(seconds)])
    return headers, lines


def mix_essence(found: Measures) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: a line for each solver and budget, a column for each mix.

    The lowest loss by the default weights, answers and a fifth of text, is bold. Of random mixes
    the one with the lowest such loss is shown, and how many there were.
    """
    losses: dict[tuple[str, str], dict[str, list[Loss]]] = {}
    for (name, what, *rest), result in found.done.items():
        if name == found.name and what in ("uniform", "mix", "random"):
            mix = rest[2] if what == "mix" else what
            row = losses.setdefault((rest[0], rest[1]), {})
            row.setdefault(mix, []).append((result["answer"], result["text"]))
    mixes = list(dict.fromkeys(mix for row in losses.values() for mix in row if mix != "uniform"))
    lines = []
    for (solver, label), row in sorted(losses.items()):
        if row.keys() == {"uniform"}:
            continue
        shown = {mix: _shown(mix, several) for mix, several in row.items()}
        best = min(map(weighted, shown.values()))
        line = [f"{solver}, {label}"]
        for mix in (*mixes, "uniform"):
            cell = "{:.4f} / {:.3f}".format(*shown[mix]) if mix in shown else ""
            if mix in shown and weighted(shown[mix]) == best:
                cell = f"**{cell}**"
            line.append(cell + (f" of {len(row[mix])}" if mix == "random" and cell else ""))
        lines.append(line)
    return ["solver, budget", *mixes, "uniform"], lines


def _shown(mix: str, several: Sequence[Loss]) -> Loss:
    """The best of random mixes; the mean over calibration sets of others."""
    if mix == "random":
        return min(several, key=weighted)
    answers, texts = zip(*several, strict=True)
    return statistics.fmean(answers), statistics.fmean(texts)


def weighted(loss: Loss) -> float:
    """Loss by the default weights of an analysis: answers, and a fifth of text."""
    return sum(DEFAULT_WEIGHTS[kind] * part for kind, part in zip(CLASSES, loss, strict=True))
