"""Layers whose tensors lie joined in one on disk, such as queries, keys and values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from prismquant.shards import TensorView

if TYPE_CHECKING:
    from prismquant.headers import TensorInfo
    from prismquant.models.arch import Layout

__all__ = ["fused_views"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def fused_views(layout: Layout, infos: Mapping[str, TensorInfo]) -> dict[str, TensorView]:
    """Parts of joined tensors, by the names that each would have alone.

    Args:
        layout: Says which tensors are joined, and of what; all parts have as many rows.
        infos: Headers of all stored tensors, in floating point.
    """
    joined = dict(layout.joined)
    found: dict[str, TensorView] = {}
    for name, info in infos.items() if joined else ():
        prefix, _, leaf = name.rpartition(".")
        number = _NUMBER.search(name)
        parts = joined.get(_NUMBER.sub("*", prefix, count=1))
        if parts is None or number is None or info.shape[0] % len(parts):
            continue
        rows = info.shape[0] // len(parts)
        for place, part in enumerate(parts):
            own = f"{part.replace('*', number[0])}.{leaf}"
            found[own] = TensorView(name, None, (place * rows, (place + 1) * rows), False)
    return found
