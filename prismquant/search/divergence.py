"""KL divergence of a model from itself with small changes, place by place.

With the change ``d`` of the logits at a place, ``p`` the probabilities of the unchanged model and
``m = sum(p d)``,

    KL(p || q) = log sum(p e^(d - m)) = log1p sum(p (e^x - 1 - x))    with x = d - m

because ``sum(p x) = 0``. No term of the last sum is negative, so nothing cancels, however small the
divergence is, and the unchanged model's probabilities are formed once for any number of changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prismquant.search.sensitivity import TOKEN_CLASSES, Score, TokenClass

# Numbers of logits that are looked at together: they stay in a processor's cache.
_BLOCK = 1 << 19
# Changes beyond which the plain formula in float64 is as good, and no exponential can overflow.
_LARGE = 8.0


class UnchangedLogits:
    """Logits of the unchanged model at some places.

    Args:
        logits: ``[places, vocabulary]``.
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self._p = torch.softmax(self._logits, dim=-1)

    def divergence(self, changed: Tensor) -> Tensor:
        """Divergence at each place, in nats: float64 ``[places]``.

        Args:
            changed: Logits of the changed model, ``[places, vocabulary]``.
        """
        rows = max(1, _BLOCK // changed.shape[-1])
        parts = zip(self._logits.split(rows), self._p.split(rows), changed.split(rows), strict=True)
        return torch.cat([_divergence(*part) for part in parts])


def _divergence(logits: Tensor, p: Tensor, changed: Tensor) -> Tensor:
    """Divergence at some places, from the unchanged logits and their probabilities."""
    x = changed.to(logits.dtype) - logits
    x -= (p * x).sum(dim=-1, keepdim=True)
    large = x.amax(dim=-1) > _LARGE
    terms = torch.expm1(x).sub_(x)
    found = terms.mul_(p).sum(dim=-1).double().log1p()
    if bool(large.any()):
        found[large] = _plain(logits[large], changed[large])
    return found


def _plain(logits: Tensor, changed: Tensor) -> Tensor:
    log_p, log_q = (torch.log_softmax(x.double(), dim=-1) for x in (logits, changed))
    p = log_p.exp()
    # 0 log 0 is 0, also where both rule a word out and the difference is no number.
    return torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(dim=-1)


class ClassSums:
    """Sums of divergences over places, by sample and class of token.

    Args:
        samples: How many there are.
    """

    def __init__(self, samples: int) -> None:
        self.sums = torch.zeros(samples, len(TOKEN_CLASSES), dtype=torch.float64)

    def add(self, divergences: Tensor, samples: Tensor, classes: Tensor) -> None:
        """Take in some places.

        Args:
            divergences: Float64 ``[places]``.
            samples, classes: Int64 ``[places]``: of which sample and class each is.
        """
        self.sums.index_put_((samples, classes), divergences.cpu(), accumulate=True)


def scores_of(
    sums: Sequence[Sequence[float]], counts: Sequence[Sequence[int]]
) -> Mapping[TokenClass, Score]:
    """Mean divergence of each class per token, with its standard error over samples.

    Args:
        sums: Of divergences, sample by sample, class by class.
        counts: Places of each sample and class.
    """
    found: dict[TokenClass, Score] = {}
    for number, name in enumerate(TOKEN_CLASSES):
        rows = [(s[number], c[number]) for s, c in zip(sums, counts, strict=True) if c[number]]
        tokens = sum(count for _, count in rows)
        if not tokens:
            continue
        mean = sum(total for total, _ in rows) / tokens
        error = None
        if len(rows) > 1:
            # Of a ratio of two sums, to first order.
            spread = sum((total - mean * count) ** 2 for total, count in rows)
            error = (spread * len(rows) / (len(rows) - 1)) ** 0.5 / tokens
        found[name] = Score(mean, error)
    return found
