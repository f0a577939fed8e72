"""Dequantized weights under the names that they have in a float checkpoint, for any loader at all.

The weights are what the quantized checkpoint stands for; columns that were split off are put back,
and rotations of inputs are undone, so that an ordinary linear layer computes the same function.
Inputs, outputs and caches are not quantized any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from prismquant.errors import NumericsError
from prismquant.export.compressed_tensors.reader import StoredLayer
from prismquant.export.compressed_tensors.stored import StoredCheckpoint
from prismquant.export.exporter import Progress, Refusal, write_checkpoint
from prismquant.numerics.hadamard import block_hadamard

_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Dense:
    """Write dequantized weights.

    Attributes:
        dtype: Of all floating-point tensors; None: of the dequantized weights that of the
            embeddings, and everything else as it is. The product of a code and its scale is
            computed in float32 and rounded once: float32 keeps it exactly.
    """

    dtype: torch.dtype | None = None

    name: ClassVar[str] = "dense"
    drops_inputs: ClassVar[str] = "always"
    needs_quantized: ClassVar[bool] = True

    def refusals(self, source: StoredCheckpoint) -> list[Refusal]:
        """There are none: every weight has a value."""
        return []

    def remarks(self, source: StoredCheckpoint) -> list[str]:
        """That a rotation was undone changes the rounding."""
        rotated = len(source.rotated)
        if not rotated:
            return []
        return [
            f"the rotation of {rotated} layers' inputs was undone in their weights: the same "
            "function, but no longer points of a quantization grid"
        ]

    def write(self, source: StoredCheckpoint, out: Path, progress: Progress) -> None:
        """Write the checkpoint."""
        dtype = self.dtype or source.dtype

        def convert(layer: StoredLayer) -> dict[str, Tensor]:
            values = _float_weight(source, layer).to(dtype)
            if not bool(values.isfinite().all()):
                raise NumericsError(
                    f"a weight is too large for {dtype}",
                    where=layer.name,
                    remedy="export with --dtype float32",
                )
            return {"weight": values}

        def keep(_: str, tensor: Tensor) -> Tensor:
            return tensor.to(self.dtype) if self.dtype and tensor.is_floating_point() else tensor

        config = _retyped(source.plain_config, self.dtype)
        write_checkpoint(source, out, progress, convert=convert, config=config, keep=keep)


def _float_weight(source: StoredCheckpoint, layer: StoredLayer) -> Tensor:
    """The weight that gives a layer's output from its input as the model has it.

    Returns:
        float32 ``[out, in]``: dequantized, columns that were split off put back, and a rotation
        of the input undone.
    """
    values = source.reader.read(f"{layer.prefix}.weight").float().reshape(layer.shape)
    if layer.rotation is None:
        return values
    # y = W' H S x, with H symmetric: W = W' H S.
    values = block_hadamard(values, layer.rotation)
    signs = source.signs(layer)
    return values if signs is None else values * signs.float()


def _retyped(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The configuration with another dtype wherever it names one."""
    if dtype is None:
        return dict(config)
    name = str(dtype).removeprefix("torch.")
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in _DTYPE_KEYS and isinstance(value, str):
            changed[key] = name
        else:
            changed[key] = _retyped(value, dtype) if isinstance(value, dict) else value
    return changed
