"""Weight: the squared error that an option makes in its own layers' weights.

It knows nothing of inputs and outputs, nor of what comes after a layer; it is here to compare with.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from prismquant.search.analysis import Analysis, UnitScores
from prismquant.search.option_errors import Option, solve_step
from prismquant.search.sensitivity import TOKEN_CLASSES, Score, TokenClass


@dataclass(frozen=True)
class WeightError:
    """Scores by squared errors of weights.

    Attributes:
        relative: Divide by the sum of squares of the weights.
    """

    needs_samples: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = False
    losses_back: ClassVar[int] = 0

    relative: bool = False

    def scores(self, analysis: Analysis) -> Iterator[UnitScores]:
        """See :class:`~prismquant.search.analysis.AnalysisMethod`.

        All classes of tokens get the same score. The key-value cache has no weights, and none.
        """
        wanted = [one for one in analysis.wanted if one.rows]
        walk = analysis.walk(caches=False)
        with contextlib.closing(walk.units()) as units, torch.no_grad():
            for unit in units:
                sums: defaultdict[Option, float] = defaultdict(float)
                wholes: defaultdict[Option, float] = defaultdict(float)
                with unit.loaded():
                    for errors in solve_step(unit, analysis).by_layer.values():
                        weight = unit.weight(errors[0].row.site)
                        whole = float(weight.float().square().sum(dtype=torch.float64))
                        for error in errors:
                            square = error.weight_error(weight).square().sum(dtype=torch.float64)
                            sums[error.option] += float(square)
                            wholes[error.option] += whole
                    unit.advance()
                for one in wanted:
                    scores = {
                        option: sum_ / (wholes[name, option] if self.relative else 1.0)
                        for (name, option), sum_ in sums.items()
                        if name == one.unit.name
                    }
                    if scores:
                        yield UnitScores(one.unit.name, _for_all_classes(scores))


def _for_all_classes(losses: Mapping[str, float]) -> dict[str, dict[TokenClass, Score]]:
    return {name: dict.fromkeys(TOKEN_CLASSES, Score(loss)) for name, loss in losses.items()}
