"""Fisher: the divergence that an option causes, in second order, from the model alone.

To second order the divergence of a model from itself, after a small change, is half the change's
square in the metric of its Fisher information. That square is the mean of the squared changes of
random losses at the logits (:mod:`prismquant.search.probes`), and to first order a loss changes by
the sum over a unit's layers of gradient times error of the output. So one forward and some backward
passes score any number of formats, in nats per token, and no sample needs an answer.

Samples are weighted by what all units of a tower lose on them, when the scores of all are known
(:mod:`prismquant.search.sample_weights`): what this method gives for a unit are plain means.

What layers of a unit do together is counted as it is, for the changes are added up before they are
squared; so are the error of the weight and that of the input. Errors are those of the codes that
the recipe's own solver chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prismquant.errors import ArgumentError, DataError
from prismquant.search.analysis import Analysis, SampleLosses, UnitScores
from prismquant.search.backward_scores import backward_sums
from prismquant.search.place_losses import PlaceLosses
from prismquant.search.probes import generator_of, probes
from prismquant.search.sample_sums import SampleSums, gathered, mean_score
from prismquant.search.sensitivity import TOKEN_CLASSES, Score, TokenClass
from prismquant.search.token_places import token_places


@dataclass(frozen=True)
class Fisher:
    """Scores by the Fisher information of the model's own distribution.

    Attributes:
        draws: Random losses for each class of tokens and sample.
        classes: Classes of tokens that are scored; each costs as much as any other.

    Raises:
        ArgumentError: There are no draws, or no classes.
    """

    needs_samples: ClassVar[bool] = True
    one_by_one: ClassVar[bool] = True

    draws: int = 2
    classes: tuple[TokenClass, ...] = TOKEN_CLASSES

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ArgumentError(f"draws must be 1 or more, not {self.draws}", where="method fisher")
        if not self.classes:
            raise ArgumentError("no class of tokens is left to score", where="method fisher")

    @property
    def losses_back(self) -> int:
        """Each class of tokens has its draws."""
        return len(self.classes) * self.draws

    def scores(self, analysis: Analysis) -> Iterator[UnitScores]:
        """See :class:`~prismquant.search.analysis.AnalysisMethod`.

        Units that no sample reaches are left out.

        Raises:
            DataError: No sample has a token of the classes.
        """
        losses = _Draws(self, analysis)
        for sums in backward_sums(analysis, losses):
            yield losses.scores(sums)


class _Draws:
    """The random losses of all samples; see :class:`~prismquant.search.backward_scores.Objective`.

    Args:
        method: The method's options.
        analysis: The samples.
    """

    def __init__(self, method: Fisher, analysis: Analysis) -> None:
        self._method, self._analysis = method, analysis
        self._places = [token_places(batch, analysis.bound) for batch in analysis.batches]
        self._ids = [batch.ids for batch in analysis.batches]
        counts = torch.tensor(
            [[int((own == n).sum()) for own in self._places] for n in range(len(TOKEN_CLASSES))],
            dtype=torch.float64,
        ).reshape(len(TOKEN_CLASSES), -1)
        self._tokens = gathered({"tokens": counts}, analysis)["tokens"]
        self._classes = [
            (name, number)
            for number, name in enumerate(TOKEN_CLASSES)
            if name in method.classes and self._tokens[number].any()
        ]
        if not self._classes:
            raise DataError(
                f"no sample has a token of the class {' or '.join(method.classes)}",
                remedy="add samples that have, or score other classes",
            )

    @property
    def losses(self) -> int:
        """See :class:`~prismquant.search.backward_scores.Objective`."""
        return len(self._classes) * self._method.draws

    def of_sample(self, number: int) -> Sequence[PlaceLosses]:
        """See :class:`~prismquant.search.backward_scores.Objective`."""
        found = []
        for index, (_, own) in enumerate(self._classes):
            places = (self._places[number][0] == own).nonzero().flatten()
            if len(places):
                numbers = range(index * self._method.draws, (index + 1) * self._method.draws)
                found.append(PlaceLosses(places, numbers, self._drawing(number, index)))
        return found

    def change(self, error: Tensor, gradients: Tensor) -> Tensor:
        """Change of each loss in first order."""
        wide = torch.promote_types(gradients.dtype, torch.float32)
        return gradients.flatten(1).to(wide) @ error.flatten().to(wide)

    def scores(self, sums: SampleSums) -> UnitScores:
        """Divergence in nats per token of each class, for each option of a unit."""
        scores: dict[str, dict[TokenClass, Score]] = {}
        samples: dict[str, dict[TokenClass, SampleLosses]] = {}
        for option, changes in sums.by_option().items():
            squares = changes.square().reshape(len(self._classes), self._method.draws, -1)
            halves = squares.mean(dim=1) / 2
            for index, (name, number) in enumerate(self._classes):
                own, tokens = halves[index], self._tokens[number]
                scores.setdefault(option, {})[name] = mean_score(own, tokens)
                samples.setdefault(option, {})[name] = SampleLosses(
                    tuple(own.tolist()), tuple(tokens.tolist())
                )
        return UnitScores(sums.unit.unit.name, scores, samples=samples)

    def _drawing(self, sample: int, index: int) -> Callable[[Tensor, slice], Tensor]:
        generators: list[torch.Generator] = []

        def draw(logits: Tensor, _: slice) -> Tensor:
            if not generators:
                of = (*self._ids[sample], self._classes[index][0])
                seed, device = self._analysis.seed, logits.device
                generators.extend(
                    generator_of(seed, *of, number, device=device)
                    for number in range(self._method.draws)
                )
            return probes(logits, generators)

        return draw
