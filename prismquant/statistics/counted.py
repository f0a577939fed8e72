"""Tokens that count: what every statistic checks of an input before it takes it in."""

from __future__ import annotations

import torch
from torch import Tensor

from prismquant.errors import DataError, NumericsError
from prismquant.numerics.finite import check_finite


def counted_tokens(
    x: Tensor, weights: Tensor | None, features: int, name: str | None, seen: float
) -> tuple[Tensor, Tensor]:
    """The tokens that count, checked; and the weights of all tokens, float32 ``[n]``.

    ``seen`` is how many came before, for an error.
    """
    if x.ndim != 2 or x.shape[1] != features:
        raise DataError(f"expected tokens [n, {features}], got {list(x.shape)}", where=name)
    if weights is None:
        counts = torch.ones(len(x), device=x.device)
    else:
        counts = _checked_weights(weights, len(x), name).to(x.device)
        x = x[counts != 0]
    try:
        check_finite(x, "the input")
    except NumericsError as error:
        what = f"{error.what}; {seen:g} tokens had come before"
        raise NumericsError(what, where=name, remedy=error.remedy) from error
    return x, counts


def _checked_weights(weights: Tensor, tokens: int, name: str | None) -> Tensor:
    if tuple(weights.shape) != (tokens,):
        raise DataError(
            f"{tokens} tokens need as many weights, not {list(weights.shape)}", where=name
        )
    weights = weights.to(torch.float32)
    if not bool(((weights >= 0) & torch.isfinite(weights)).all()):
        raise NumericsError("a token's weight must be a finite number from 0 on", where=name)
    return weights
