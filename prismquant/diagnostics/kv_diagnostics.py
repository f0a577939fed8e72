"""Diagnostics of keys and values whose cache is quantized."""

from __future__ import annotations

from dataclasses import dataclass

from prismquant.arguments import EXACT
from prismquant.statistics.tokens import Tokens


@dataclass(frozen=True)
class KeyBias:
    """Share of the keys that the rotated bias of their projection is.

    Attributes:
        energy: Its sum of squares relative to the keys'; 1: the keys are little else.
        range: Its largest magnitude relative to theirs.
        key_amax_without: The largest magnitude of the keys when it is subtracted.
    """

    __pydantic_config__ = EXACT

    energy: float
    range: float
    key_amax_without: float


@dataclass(frozen=True)
class KVDiagnostics:
    """Keys and values of one layer as calibration saw them.

    Attributes:
        tokens: Tokens that were looked at.
        key_amax: Largest magnitude of the keys that are rounded.
        value_amax: Largest magnitude of the values.
        bias: How much of the keys a bias is; None where their projection has none.
    """

    __pydantic_config__ = EXACT

    tokens: Tokens
    key_amax: float
    value_amax: float
    bias: KeyBias | None = None
