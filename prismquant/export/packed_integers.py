"""Parts common to the GPTQ and AWQ layouts: integer codes with float16 scales, input first.

Both store a weight ``[out, in]`` transposed, unsigned codes ``u = code + 2^(b-1)`` beside unsigned
zero points ``z``, and mean ``(u - z) * scale``. A symmetric format is one whose every zero point is
``2^(b-1)``. Neither can say anything of a layer's input. Tensors are named by module paths, which
all readers know.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from prismquant.export.compressed_tensors.reader import StoredLayer
from prismquant.export.compressed_tensors.stored import StoredCheckpoint
from prismquant.export.exporter import Refusal
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.formats.spec import NumberSpec
from prismquant.numerics.kinds import Granularity

SCALE_DTYPE = torch.float16
_UNITS = (Granularity.TENSOR, Granularity.CHANNEL, Granularity.GROUP)
CHANNEL = -1
"""The group size by which both configurations mean one scale for a whole row."""


def group_size(spec: NumberSpec) -> int:
    """Input features to a scale, as both configurations count them."""
    if spec.granularity == Granularity.GROUP and spec.group_size is not None:
        return spec.group_size
    return CHANNEL


def module_names(source: StoredCheckpoint) -> Callable[[str], str] | None:
    """From names on disk to module paths.

    GPTQModel looks for quantized layers under their module paths only; transformers and vLLM know
    these as well. Of the original VideoLLaMA3 layout, the code beside it knows only its own names.
    """
    if source.arch.config_map is not None:
        return None
    names = source.names
    return lambda name: names.to_module(name) if names.knows(name) else name


def scales_by_group(q: QuantizedTensor) -> Tensor:
    """float16 ``[G, out]``; one scale of a whole tensor is repeated for every row."""
    scale = q.scale if q.scale.ndim == 2 else q.scale.expand(q.shape[0], 1)
    return scale.to(SCALE_DTYPE).T.contiguous()


def zero_points_by_group(q: QuantizedTensor) -> Tensor:
    """int8 ``[G, out]``, in the signed range of the codes; zeros where the format is symmetric."""
    if q.zero_point is None:
        groups = q.scale.shape[-1] if q.scale.ndim == 2 else 1
        return torch.zeros(groups, q.shape[0], dtype=torch.int8)
    zero = q.zero_point if q.zero_point.ndim == 2 else q.zero_point.expand(q.shape[0], 1)
    return zero.T.contiguous()


def refusal(
    source: StoredCheckpoint,
    layer: StoredLayer,
    bits: Collection[int],
    packed_out: int,
    *,
    indexed: bool = False,
) -> Refusal | None:
    """The reason why a layer cannot be held by either format, if it cannot.

    Args:
        source: The checkpoint.
        layer: One of its layers that is quantized or rotated.
        bits: Widths of a code that the format defines.
        packed_out: A number that must divide the output features.
        indexed: Whether the format says the group of each input feature.
    """
    if layer.rotation is not None:
        return Refusal(layer.name, "its input is rotated at run time, which the format cannot say")
    if layer.scheme is None:
        return None
    spec = layer.scheme.weights
    if spec.kind != "int" or spec.scale != "float":
        return Refusal(layer.name, f"the format holds integers, not {spec.describe()}")
    if spec.bits not in bits:
        known = ", ".join(str(width) for width in sorted(bits))
        return Refusal(layer.name, f"the format holds integers of {known} bits, not {spec.bits}")
    if spec.granularity not in _UNITS:
        return Refusal(layer.name, f"the format has no {spec.granularity} scales")
    if layer.shape[0] % packed_out:
        return Refusal(
            layer.name,
            f"the output features must divide by {packed_out} to pack zero points of "
            f"{spec.bits} bits",
            f"{layer.shape[0]}",
        )
    if source.splits(layer):
        return Refusal(
            layer.name, "single columns of it stay in floating point, which the format cannot say"
        )
    if not indexed and source.reorders(layer):
        return Refusal(layer.name, "its groups are of columns that are no neighbours")
    return scale_refusal(source, layer)


def scale_refusal(source: StoredCheckpoint, layer: StoredLayer) -> Refusal | None:
    """The reason why a layer's scales cannot be stored in float16 as they are, if they cannot."""
    scale = source.scale(layer).float()
    differ = scale.to(SCALE_DTYPE).float() != scale
    if not bool(differ.any()):
        return None
    stored = str(source.scale(layer).dtype).removeprefix("torch.")
    return Refusal(
        layer.name,
        f"scales are float16 there, and not all of its {stored} scales are float16 numbers "
        "(a source model in bfloat16 or float16 has scales that mostly are)",
        f"{int(differ.sum())} of {scale.numel()}, e.g. {float(scale[differ][0]):.6g}",
    )
