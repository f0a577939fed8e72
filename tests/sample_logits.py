"""Logits that a model gives for the samples of a file, however it was loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from prismquant.data.batches import make_batches
from prismquant.data.read import read_samples
from prismquant.models.bind import bind
from prismquant.models.processor import load_processor

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn


@torch.no_grad()
def sample_logits(model: nn.Module, folder: Path, data: Path) -> Tensor:
    """Logits of all samples, one after the other, none of them padded.

    Args:
        model: Runs them.
        folder: Checkpoint whose processor makes its inputs.
        data: The samples.
    """
    batches = make_batches(
        read_samples(data),
        load_processor(folder),
        batch_size=1,
        vision_token_ids=bind(folder).vision_token_ids,
    )
    call: Any = model
    return torch.cat([call(**batch.inputs, use_cache=False).logits[0] for batch in batches])
