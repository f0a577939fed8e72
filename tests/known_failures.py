"""Failures of other libraries, in versions that are allowed, which tests expect by name."""

from __future__ import annotations

import contextlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from packaging.version import Version

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@contextlib.contextmanager
def decompressed_by_transformers() -> Iterator[None]:
    """Within the block, transformers may fail to decompress as its older versions do."""
    try:
        yield
    except RuntimeError as error:
        if Version(version("transformers")) >= Version("5.21") or "same dtype" not in str(error):
            raise
        pytest.xfail("transformers before 5.21 decompresses to bfloat16 in a model of float32")


@contextlib.contextmanager
def inputs_scaled_per_token() -> Iterator[None]:
    """Within the block, compressed-tensors scales a dynamic input of two dimensions per token.

    It keeps the first two axes whatever the rank, and so takes one scale for the whole matrix that
    a vision tower passes. Given a leading axis it does what it says.
    """
    from compressed_tensors.quantization.lifecycle import forward as lifecycle

    original = lifecycle.compute_dynamic_scales_and_zp

    def per_token(value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if value.ndim != 2:
            return original(value, *args, **kwargs)
        scale, zero_point = original(value[None], *args, **kwargs)
        return scale[0], zero_point[0]

    with mock.patch.object(lifecycle, "compute_dynamic_scales_and_zp", per_token):
        yield


@contextlib.contextmanager
def packed_towers_loaded() -> Iterator[None]:
    """Within the block, transformers loads a SigLIP tower whose weights are packed.

    It draws weights anew for what it takes for missing, by names that packed layers do not have.
    """
    from transformers.models.siglip.modeling_siglip import SiglipPreTrainedModel

    original = SiglipPreTrainedModel._init_weights

    def draw(self: Any, module: Any) -> None:
        with contextlib.suppress(AttributeError):
            original(self, module)

    with mock.patch.object(SiglipPreTrainedModel, "_init_weights", draw):
        yield
