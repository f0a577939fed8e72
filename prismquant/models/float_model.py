"""A whole unquantized model, for evaluation."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from prismquant.models.bind import bind
from prismquant.models.load import empty_model, materialize


def load_float(
    folder: Path | str,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Load a whole unquantized model for evaluation.

    Args:
        folder: The checkpoint, in any described layout.
        dtype: Floating dtype of the parameters; None keeps the dtypes on disk.
        device: Where it goes.

    Returns:
        The native transformers model in eval mode, without gradients or cache.

    Raises:
        ModelError: The folder does not fit its architecture.
        StorageError: A shard is broken.
    """
    bound = bind(folder)
    model = empty_model(bound.config, bound.arch)
    materialize(model, "", bound.shards(), bound.names, device, dtype)
    return model
