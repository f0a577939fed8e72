"""Several samples' tensors as those of one batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def joined_rows(rows: Sequence[dict[str, Tensor]], padding: int) -> dict[str, Tensor]:
    """Rows as one batch: what has a value for each token is padded, the rest put one after another.

    Sounds, and pictures cut into crops, may differ in length: they are padded with zeros.
    """
    if len(rows) == 1:
        return dict(rows[0])
    length = max(row["input_ids"].shape[1] for row in rows)
    joined = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        parts = [row[name] for row in rows if name in row]
        if all(row[name].shape == row["input_ids"].shape for row in rows if name in row):
            fill = padding if name == "input_ids" else 0
            parts = [_padded(part, length, fill) for part in parts]
        joined[name] = torch.cat(_of_one_shape(parts))
    return joined


def _padded(row: Tensor, length: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, length - row.shape[1]), value=fill)


def _of_one_shape(parts: list[Tensor]) -> list[Tensor]:
    """Tensors with zeros behind what they hold, as processors pad sounds and crops of a batch."""
    if len({part.shape[1:] for part in parts}) == 1 or len({part.dim() for part in parts}) > 1:
        return parts
    most = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]

    def missing(part: Tensor) -> list[int]:
        """Zeros before and behind, from the last dimension to the second."""
        gaps = [size - own for size, own in zip(most, part.shape[1:], strict=True)]
        return list(itertools.chain(*((0, gap) for gap in reversed(gaps))))

    return [torch.nn.functional.pad(part, missing(part)) for part in parts]
