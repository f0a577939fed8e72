"""A reference model that is asked the same questions again and again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

MOST_LOGITS = 1 << 30
"""Bytes of logits that are kept."""


class KnownLogits(nn.Module):
    """A model that keeps its logits of inputs that come again, as far as there is room.

    Args:
        model: The model.
        most_bytes: Of logits that are kept.
    """

    def __init__(self, model: nn.Module, most_bytes: int = MOST_LOGITS) -> None:
        super().__init__()
        self.model, self.left = model, most_bytes
        self._known: dict[str, Tensor] = {}

    def forward(self, **inputs: Any) -> SimpleNamespace:
        """Logits [B, T, V]."""
        key = _digest(inputs)
        if key in self._known:
            return SimpleNamespace(logits=self._known[key])
        found: Tensor = self.model(**inputs).logits
        size = found.numel() * found.element_size()
        if size <= self.left:
            self.left -= size
            self._known[key] = found
        return SimpleNamespace(logits=found)


def _digest(inputs: Mapping[str, Any]) -> str:
    """SHA-256 over names and values of a call's tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(inputs.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
