"""Weights of samples in a score: none decides by itself in which order units stand.

A score is a sum of losses over samples, and these have long tails: of 64 questions one with a long
and uncertain answer may make a third of the sum, in every unit, and units are then ranked by what
they do to that one question. How large the losses of a sample are is told by all units of a tower
together; how a unit does beside the others is told by all samples.

Let ``x[u, i]`` be the loss that a format in unit ``u`` adds on sample ``i``, and ``a[i]`` the mean
over the tower's units of the sample's share of a unit's loss, so that all ``a`` sum to 1. If units
differed by a factor alone, ``x[u, i] = X[u] a[i]``, any weights ``w`` would find it:

    X[u] = sum_i(w[i] x[u, i]) / sum_i(w[i] a[i])

What is left of ``x`` has a standard deviation about proportional to its mean: the square of a
random projection has, and so has what makes one sample another than the next. Then the best weights
are ``1 / a``, as in a generalized linear model with errors of a constant relative size (McCullagh
and Nelder, *Generalized Linear Models*, ch. 8), and with ``n`` samples

    X[u] = mean_i(x[u, i] / a[i])

No loss is cut off for being large, and scores stay divergences: the mean over the tower's units of
the weighted over the plain score is exactly 1. Losses must not be divided by a size that each unit
has of its own for a sample, for then nothing would be left of what tells units apart. Towers are
apart: samples without pictures say nothing of the vision tower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prismquant.search.analysis import SampleLosses, UnitScores
from prismquant.search.sample_sums import mean_score
from prismquant.search.sensitivity import Score, TokenClass


def with_sample_weights(
    found: Sequence[UnitScores], towers: Mapping[str, str]
) -> tuple[UnitScores, ...]:
    """Scores in which samples are weighted, in the same order.

    Args:
        found: Scores of all units; those that know no losses of samples stay as they are.
        towers: Name of the tower of each unit.
    """
    together: dict[tuple[str, str, TokenClass], list[tuple[str, Tensor, Tensor]]] = {}
    for one in found:
        for option, kind, own in _losses_of(one):
            losses, tokens = torch.tensor(own.losses), torch.tensor(own.tokens)
            key = towers[one.unit], option, kind
            together.setdefault(key, []).append((one.unit, losses.double(), tokens.double()))
    weighted: dict[tuple[str, str, TokenClass], Score] = {}
    for (_, option, kind), rows in together.items():
        scores = weighted_scores(torch.stack([losses for _, losses, _ in rows]), rows[0][2])
        for (unit, _, _), score in zip(rows, scores, strict=True):
            weighted[unit, option, kind] = score
    return tuple(
        replace(
            one,
            scores={
                option: {
                    kind: weighted.get((one.unit, option, kind), score)
                    for kind, score in scores.items()
                }
                for option, scores in one.scores.items()
            },
        )
        for one in found
    )


def weighted_scores(losses: Tensor, tokens: Tensor) -> list[Score]:
    """Loss per token of each unit of a tower, with its standard error over the samples.

    The error is that of the unit beside the others, with the weights for given, and that of the
    mean of them all.

    Args:
        losses: Float64 [units, samples], none negative: the loss of each sample.
        tokens: Float64 [samples]: its tokens of the class.
    """
    totals = losses.sum(dim=1)
    lossy = totals > 0
    if not lossy.any():
        return [mean_score(own, tokens) for own in losses]
    shares = (losses[lossy] / totals[lossy, None]).mean(dim=0)
    seen = shares > 0
    count = int(seen.sum())
    sizes = losses[:, seen] / shares[seen]
    found = sizes.mean(dim=1)
    spread = sizes.var(dim=1) / count if count > 1 else torch.zeros_like(found)
    # Of the sum of all tokens' losses, in parts of it: the same for all units of the tower.
    common = mean_score(shares, tokens)
    every = float(tokens.sum())
    scores = []
    for value, own in zip(found.tolist(), spread.tolist(), strict=True):
        error = None
        if common.error is not None:
            error = math.hypot(math.sqrt(own) / every, value * common.error)
        scores.append(Score(value / every, error))
    return scores


def _losses_of(one: UnitScores) -> list[tuple[str, TokenClass, SampleLosses]]:
    return [
        (option, kind, own)
        for option, classes in one.samples.items()
        for kind, own in classes.items()
    ]
