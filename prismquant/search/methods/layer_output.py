"""Output: the squared error that an option makes at its own layers' outputs.

It knows nothing of what comes after a layer; it is here to compare with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prismquant.engine.walk import Unit
from prismquant.search.analysis import Analysis, UnitScores
from prismquant.search.option_errors import StepErrors, solve_step
from prismquant.search.sample_sums import SampleSums, mean_score
from prismquant.search.sensitivity import TOKEN_CLASSES
from prismquant.search.token_places import count_places
from prismquant.search.watched_step import watched


@dataclass(frozen=True)
class OutputError:
    """Scores by squared errors of layers' outputs, and of keys and values.

    Attributes:
        relative: Divide by the sum of squares of these outputs; else by the number of samples.
    """

    needs_samples: ClassVar[bool] = True
    one_by_one: ClassVar[bool] = True
    losses_back: ClassVar[int] = 0

    relative: bool = True

    def scores(self, analysis: Analysis) -> Iterator[UnitScores]:
        """See :class:`~prismquant.search.analysis.AnalysisMethod`.

        All classes of tokens that the samples have get the same score: it is about no prediction.
        """
        counts = analysis.ranks.gather_json(count_places(analysis.batches, analysis.bound))
        classes = [name for name in TOKEN_CLASSES if any(name in own for own in counts)]
        for sums in _summed(analysis):
            scores = {}
            for option, (errors, outputs) in sums.by_option().items():
                score = mean_score(errors, outputs if self.relative else torch.ones_like(outputs))
                scores[option] = dict.fromkeys(classes, score)
            yield UnitScores(sums.unit.unit.name, scores)


def _summed(analysis: Analysis) -> Iterator[SampleSums]:
    """Sums of squares of errors and of outputs for each sample, unit by unit."""
    wanted = analysis.wanted
    cached, walk = analysis.cached_steps, analysis.walk()
    caches = {one.unit.name: SampleSums(one, analysis, 2) for one in wanted if one.caches}
    with contextlib.closing(walk.units()) as units, torch.no_grad():
        for unit in units:
            if not unit.flows:
                continue
            own = {
                one.unit.name: SampleSums(one, analysis, 2)
                for one in wanted
                if one.rows and one.sites[0].step == unit.step.index
            }
            with unit.loaded():
                errors = solve_step(unit, analysis)
                analysis.stage(unit.name, "outputs")
                _add_squares(unit, errors, own | caches)
                unit.advance()
            yield from own.values()
            cached.discard(unit.step.index)
            if not cached:
                yield from caches.values()
                caches = {}


def _add_squares(unit: Unit, errors: StepErrors, sums: Mapping[str, SampleSums]) -> None:
    """Add the squares of all calls of a step."""
    for call in unit.calls():
        with unit.as_served(), watched(unit, errors) as watch:
            unit.module(*call.args, **call.kwargs)
        outputs = [_squared(x) for x in watch.tensors]
        for number, (name, option), error in watch.changes():
            squares = torch.stack([_squared(error), outputs[number]])
            sums[name].add(option, call.batch, [0, 1], squares)


def _squared(x: Tensor) -> Tensor:
    """Sum of squares, in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum()
