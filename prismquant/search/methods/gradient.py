"""Gradient: squares of error times gradient at every output, with the answer as the loss.

This is the score of ModelOpt's ``auto_quantize(method="gradient")``: the loss is the mean
cross-entropy of a sample's answer, ``g`` its gradient at a layer's output, ``dY`` the error that an
option makes there for the float model's inputs, and the score is the sum of ``(g dY)^2`` over all
tokens and channels of the unit's layers. What errors at different places do together is left out,
and samples need answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prismquant.errors import DataError
from prismquant.search.analysis import Analysis, UnitScores
from prismquant.search.backward_scores import backward_sums
from prismquant.search.place_losses import PlaceLosses
from prismquant.search.sample_sums import gathered, mean_score
from prismquant.search.sensitivity import TOKEN_CLASSES
from prismquant.search.token_places import token_places

_ANSWER = TOKEN_CLASSES.index("answer")


@dataclass(frozen=True)
class SquaredGradients:
    """Scores by squared gradients of the answers' cross-entropy; has no options."""

    needs_samples: ClassVar[bool] = True
    one_by_one: ClassVar[bool] = True
    losses_back: ClassVar[int] = 1

    def scores(self, analysis: Analysis) -> Iterator[UnitScores]:
        """See :class:`~prismquant.search.analysis.AnalysisMethod`.

        Scores are of class ``answer``, the mean over samples that have one.

        Raises:
            DataError: No sample has an answer.
        """
        losses = _AnswerLosses(analysis)
        for sums in backward_sums(analysis, losses):
            scores = {
                option: {TOKEN_CLASSES[_ANSWER]: mean_score(values[0], losses.answered)}
                for option, values in sums.by_option().items()
            }
            yield UnitScores(sums.unit.unit.name, scores)


class _AnswerLosses:
    """Mean cross-entropy of each answer; see :class:`~prismquant.search.backward_scores.Objective`.

    Attributes:
        answered: 1 for every sample that has an answer, else 0, over all ranks.
    """

    losses = 1

    def __init__(self, analysis: Analysis) -> None:
        self._places, self._targets = [], []
        for batch in analysis.batches:
            places = (token_places(batch, analysis.bound)[0] == _ANSWER).nonzero().flatten()
            self._places.append(places)
            self._targets.append(batch.inputs["input_ids"][0, places + 1])
        own = torch.tensor([float(len(p) > 0) for p in self._places], dtype=torch.float64)
        self.answered = gathered({"answered": own}, analysis)["answered"]
        if not self.answered.any():
            raise DataError(
                "the method gradient needs answers, and no sample has one",
                remedy="use samples that end with an assistant message, or the method fisher",
            )

    def of_sample(self, number: int) -> Sequence[PlaceLosses]:
        """See :class:`~prismquant.search.backward_scores.Objective`."""
        places, targets = self._places[number], self._targets[number]
        if not len(places):
            return []

        def slope(logits: Tensor, part: slice) -> Tensor:
            wide = torch.promote_types(logits.dtype, torch.float32)
            found = torch.softmax(logits.to(wide), dim=-1)
            own = targets[part].to(logits.device)[:, None]
            found.scatter_add_(1, own, -torch.ones_like(own, dtype=wide))
            return found[None] / len(places)

        return [PlaceLosses(places, range(1), slope)]

    def change(self, error: Tensor, gradients: Tensor) -> Tensor:
        """Sum of squared products of each loss."""
        wide = torch.promote_types(gradients.dtype, torch.float32)
        return (gradients * error).to(wide).square().flatten(1).sum(dim=1)
