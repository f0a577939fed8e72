"""The GPTQ layout: ``qweight``, ``qzeros``, ``scales`` and ``g_idx``, as AutoGPTQ defined it.

For a weight of N outputs and K inputs in groups of g, with codes of b bits:

``qweight`` int32 ``[K b / 32, N]``
    Down each column a little-endian bit stream of unsigned codes, dense: three-bit codes straddle
    words.
``qzeros`` int32 ``[K / g, N b / 32]``
    Unsigned zero points, packed alike along each row. ``checkpoint_format: gptq`` stores them less
    one. That cannot express a zero point of 0 (readers add one to whole words, and it would carry
    into its neighbour), so checkpoints with an asymmetric layer are ``gptq_v2``, which stores them
    as they are.
``scales`` float16 ``[K / g, N]``
``g_idx`` int32 ``[K]``
    The group of each input feature: in order, unless the checkpoint says otherwise (``desc_act``).

Which layers are quantized is said twice, because readers look in different places: vLLM and optimum
in ``modules_in_block_to_quantize``, GPTQModel in ``dynamic``, where a pattern that begins with
``-:`` excludes layers and one with ``+:`` gives others their own width or group size. Patterns are
compared with a reader's own paths, which differ in what precedes a tower's blocks, and with the
names of fused layers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from prismquant.export.compressed_tensors.reader import StoredLayer
from prismquant.export.compressed_tensors.stored import StoredCheckpoint
from prismquant.export.exporter import Progress, Refusal, write_checkpoint
from prismquant.export.packed_integers import (
    group_size,
    module_names,
    refusal,
    scales_by_group,
    zero_points_by_group,
)
from prismquant.formats.bit_streams import pack_bits
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.models.arch import ArchSpec, Modality
from prismquant.version import __version__

BITS = (2, 3, 4, 8)
# What vLLM has kernels for; it reads symmetric layers only.
_VLLM_BITS = (4, 8)
_VLLM_GROUPS = (-1, 32, 64, 128)
_WORD = 32


@dataclass(frozen=True)
class GPTQExporter:
    """Write the GPTQ layout."""

    name: ClassVar[str] = "gptq"
    drops_inputs: ClassVar[str] = "asked"
    needs_quantized: ClassVar[bool] = True

    def refusals(self, source: StoredCheckpoint) -> list[Refusal]:
        """Layers that are no integers of 2, 3, 4 or 8 bits, or do not fill whole words."""
        found = [_refusal(source, layer) for layer in source.layers]
        return [item for item in found if item is not None]

    def remarks(self, source: StoredCheckpoint) -> list[str]:
        """Programs that do not read such a checkpoint."""
        specs = [layer.scheme.weights for layer in source.quantized if layer.scheme]
        remarks = []
        if not all(spec.symmetric for spec in specs):
            remarks.append(
                "asymmetric layers: checkpoint_format is gptq_v2, which GPTQModel reads; vLLM "
                "reads symmetric GPTQ layers only"
            )
        elif not all(
            spec.bits in _VLLM_BITS and group_size(spec) in _VLLM_GROUPS for spec in specs
        ):
            remarks.append(
                "vLLM reads GPTQ layers of 4 and 8 bits in groups of 32, 64, 128 or whole rows; "
                "others need GPTQModel"
            )
        llm = next(t.root for t in source.arch.towers if t.modality is Modality.LLM)
        outside = [x for x in source.quantized if not x.name.startswith(f"{llm}.")]
        if outside:
            remarks.append(
                f"{len(outside)} quantized layers lie outside the language model: GPTQModel loads "
                "quantized layers of the language model only, vLLM loads both"
            )
        return remarks

    def write(self, source: StoredCheckpoint, out: Path, progress: Progress) -> None:
        """Write the checkpoint and both of its configurations."""
        section = quantization_config(source)
        less_one = section["checkpoint_format"] == "gptq"
        write_checkpoint(
            source,
            out,
            progress,
            convert=lambda layer: tensors(source.codes(layer), less_one=less_one),
            config=source.plain_config | {"quantization_config": section},
            files={"quantize_config.json": section},
            rename=module_names(source),
        )


def tensors(q: QuantizedTensor, *, less_one: bool) -> dict[str, Tensor]:
    """One layer in the GPTQ layout.

    Args:
        q: Integer codes of 2, 3, 4 or 8 bits, whose shape fills whole words.
        less_one: Store zero points less one (``checkpoint_format: gptq``).

    Returns:
        By the suffix of the name on disk.
    """
    columns = q.shape[1]
    zero = zero_points_by_group(q)
    size = q.spec.group_size or columns
    index = torch.arange(columns) // size if q.group_index is None else q.group_index
    return {
        # Offset binary along the input is what both layouts mean: only the axes differ.
        "qweight": pack_bits(q.codes, q.spec.bits).T.contiguous(),
        "qzeros": pack_bits(zero - 1 if less_one else zero, q.spec.bits),
        "scales": scales_by_group(q),
        "g_idx": index.to(torch.int32),
    }


def quantization_config(source: StoredCheckpoint) -> dict[str, Any]:
    """``quantization_config`` of ``config.json``, which is also ``quantize_config.json``."""
    schemes = {layer.called: _scheme(layer) for layer in source.quantized}
    common = Counter(schemes.values()).most_common(1)[0][0]
    symmetric = all(sym for _, _, sym in schemes.values())
    left = [layer.called for layer in source.layers if layer.called not in schemes]
    dynamic: dict[str, dict[str, Any]] = {f"-:{p}": {} for p in _patterns(source.arch, left)}
    for scheme in dict.fromkeys(schemes.values()):
        if scheme != common:
            bits, size, sym = scheme
            alike = [name for name, own in schemes.items() if own == scheme]
            rule = {"bits": bits, "group_size": size, "sym": sym}
            dynamic |= {f"+:{pattern}": rule for pattern in _patterns(source.arch, alike)}
    bits, size, sym = common
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "sym": sym,
        "desc_act": any(source.reorders(layer) for layer in source.quantized),
        "lm_head": any(name.rpartition(".")[2] == "lm_head" for name in schemes),
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "modules_in_block_to_quantize": [sorted(schemes)],
        "dynamic": dynamic,
        "meta": {"quantizer": [f"prismquant:{__version__}"]},
    }


def _scheme(layer: StoredLayer) -> tuple[int, int, bool]:
    spec = layer.scheme.weights if layer.scheme else None
    return (spec.bits, group_size(spec), spec.symmetric) if spec else (0, 0, True)


def _refusal(source: StoredCheckpoint, layer: StoredLayer) -> Refusal | None:
    if layer.scheme is None:
        return refusal(source, layer, BITS, 1, indexed=True)
    bits = layer.scheme.weights.bits
    # So many codes fill whole words: 32 of three bits, 8 of four.
    filling = _WORD // math.gcd(_WORD, bits)
    found = refusal(source, layer, BITS, filling, indexed=True)
    if found is None and layer.shape[1] % filling:
        why = f"the input features must divide by {filling} to pack codes of {bits} bits"
        found = Refusal(layer.name, why, f"{layer.shape[1]}")
    return found


def _patterns(arch: ArchSpec, names: Sequence[str]) -> list[str]:
    """Regular expressions that match exactly these layers, whatever reader looks at them.

    Layers of one parent that differ in the last part only share a pattern.
    """
    parents: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        parents.setdefault(parent, []).append(leaf)
    return [_pattern(arch, parent, leaves) for parent, leaves in parents.items()]


def _pattern(arch: ArchSpec, parent: str, leaves: Sequence[str]) -> str:
    fused = [
        layer.name for label, layer in arch.fused.items() if _parts(arch, label) <= set(leaves)
    ]
    ending = "|".join(re.escape(leaf) for leaf in (*leaves, *fused))
    path = f"{parent}." if parent else ""
    prefixes = (pair for pair in arch.gptq.prefixes if path.startswith(pair[0]))
    known, before = next(prefixes, ("", ""))
    return rf"^{before}{re.escape(path.removeprefix(known))}(?:{ending})$"


def _parts(arch: ArchSpec, label: str) -> set[str]:
    """Last parts of the paths of the sites that servers fuse under a label."""
    sites = (site for tower in arch.towers for site in tower.sites)
    return {site.path.rpartition(".")[2] for site in sites if site.fuse == label}
