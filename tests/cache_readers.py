"""What the installed transformers makes of a quantized cache of keys and values."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import pytest
import torch
from packaging.version import Version

from prismquant.check.kv_rules import TriedReaders, tried_readers
from prismquant.runtime.kv_cache import cache_in_float

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


def installed_readers() -> TriedReaders:
    """The entry of ``check``'s knowledge that speaks of the installed pair, or of the one before.

    A release that came later is taken to do as the last one that was tried.
    """
    pytest.importorskip("compressed_tensors")
    installed = [Version(version(name)) for name in ("transformers", "compressed-tensors")]
    return [
        tried
        for tried in tried_readers()
        if Version(tried.transformers[0]) <= installed[0]
        and Version(tried.compressed_tensors[0]) <= installed[1]
    ][-1]


def check_logits(
    ours: nn.Module, theirs: Tensor, run: Callable[[nn.Module], Tensor], **close: float
) -> None:
    """Hold transformers' logits against ours: with the cache rounded, or where known, in float.

    Args:
        ours: The model as :mod:`prismquant` loads it, its cache quantized.
        theirs: What transformers computed.
        run: Gives a model's logits for the same inputs.
        close: Tolerances.
    """
    tried = installed_readers()
    rounded = run(ours)
    if tried.rounded:
        torch.testing.assert_close(rounded, theirs, **close)
        return
    with cache_in_float(ours):
        torch.testing.assert_close(run(ours), theirs, **close)
    assert (rounded - theirs).abs().max() > 10 * close["atol"]
    pytest.xfail(f"{tried.describe()} leaves the cache in floating point")
