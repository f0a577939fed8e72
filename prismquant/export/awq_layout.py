"""The AWQ layout (GEMM version): four-bit ``qweight``, ``qzeros`` and ``scales``.

For a weight of N outputs and K inputs in groups of g:

``qweight`` int32 ``[K, N / 8]``
    Each word holds eight neighbouring outputs of one input; nibble t of word j is the unsigned code
    of output ``8 j + (0, 2, 4, 6, 1, 3, 5, 7)[t]``.
``qzeros`` int32 ``[K / g, N / 8]``
    Unsigned zero points in the same order, as they are.
``scales`` float16 ``[K / g, N]``

The configuration knows one group size for all layers. Zero points are always stored and declared:
those of a symmetric layer are all 8, and readers that insist on zero points read both.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from prismquant.export.compressed_tensors.stored import StoredCheckpoint
from prismquant.export.exporter import Progress, Refusal, write_checkpoint
from prismquant.export.packed_integers import (
    CHANNEL,
    group_size,
    module_names,
    refusal,
    scales_by_group,
    zero_points_by_group,
)
from prismquant.formats.bit_streams import pack_bits
from prismquant.formats.quantized_layer import QuantizedTensor

BITS = 4
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_VLLM_GROUPS = (-1, 32, 64, 128)


@dataclass(frozen=True)
class AWQExporter:
    """Write the AWQ layout."""

    name: ClassVar[str] = "awq"
    drops_inputs: ClassVar[str] = "asked"
    needs_quantized: ClassVar[bool] = True

    def refusals(self, source: StoredCheckpoint) -> list[Refusal]:
        """Layers that are no four-bit integers, or of another group size than the others."""
        found = [refusal(source, layer, (BITS,), len(_ORDER)) for layer in source.layers]
        refused = [item for item in found if item is not None]
        names = {item.layer for item in refused}
        sizes = {
            layer.name: group_size(layer.scheme.weights)
            for layer in source.quantized
            if layer.scheme is not None and layer.name not in names
        }
        common = _common(sizes)
        why = f"the format has one group size for all layers, and most have {_told(common)}"
        refused += [
            Refusal(name, why, _told(size)) for name, size in sizes.items() if size != common
        ]
        return refused

    def remarks(self, source: StoredCheckpoint) -> list[str]:
        """Programs that do not read such a checkpoint."""
        size = _size(source)
        if size in _VLLM_GROUPS:
            return []
        return [f"vLLM's kernels read AWQ groups of 32, 64, 128 or whole rows, not of {size}"]

    def write(self, source: StoredCheckpoint, out: Path, progress: Progress) -> None:
        """Write the checkpoint."""
        section = quantization_config(source)
        write_checkpoint(
            source,
            out,
            progress,
            convert=lambda layer: tensors(source.codes(layer)),
            config=source.plain_config | {"quantization_config": section},
            rename=module_names(source),
        )


def tensors(q: QuantizedTensor) -> dict[str, Tensor]:
    """One layer in the AWQ layout.

    Args:
        q: Integer codes of 4 bits; the outputs divide by 8.

    Returns:
        By the suffix of the name on disk.
    """
    return {
        "qweight": _pack(q.codes.T.contiguous()),
        "qzeros": _pack(zero_points_by_group(q)),
        "scales": scales_by_group(q),
    }


def quantization_config(source: StoredCheckpoint) -> dict[str, Any]:
    """``quantization_config`` of ``config.json``."""
    left = [layer.called for layer in source.layers if layer.scheme is None]
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": _size(source),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": sorted(left),
    }


def _pack(codes: Tensor) -> Tensor:
    """int8 codes [rows, N] -> int32 [rows, N / 8], each word's eight in the layout's order."""
    rows = codes.shape[0]
    ordered = codes.reshape(rows, -1, len(_ORDER))[..., torch.tensor(_ORDER)]
    return pack_bits(ordered.reshape(rows, -1), BITS)


def _size(source: StoredCheckpoint) -> int:
    schemes = {layer.name: layer.scheme for layer in source.quantized}
    return _common({n: group_size(s.weights) for n, s in schemes.items() if s is not None})


def _common(sizes: dict[str, int]) -> int:
    return Counter(sizes.values()).most_common(1)[0][0] if sizes else CHANNEL


def _told(size: int) -> str:
    return "one scale a row" if size == CHANNEL else f"groups of {size}"
