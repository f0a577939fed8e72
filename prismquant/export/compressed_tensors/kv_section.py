"""A quantized cache of keys and values, as a checkpoint of compressed-tensors declares it.

``kv_cache_scheme`` of the configuration says in what numbers; every attention module of the
language model has tensors ``k_scale`` and ``v_scale``, [1] or [kv_heads, 1, 1]. A stored number is
``x / scale``. A rotation of queries and keys is a transform at ``q_attn`` and ``k_cache``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from prismquant.errors import FormatError
from prismquant.formats.kv_formats import KVCacheSpec
from prismquant.formats.quantized_layer import KVScales, scale_fault
from prismquant.formats.section import Section
from prismquant.models.arch import ArchSpec, Cached, Modality
from prismquant.models.attention import quantize_cache
from prismquant.models.config import config_value
from prismquant.models.names import NameMap
from prismquant.shards import ShardReader

_STRATEGIES = {"tensor": "tensor", "head": "attn_head"}
_TYPES = {"fp8": ("float", 8), "int8": ("int", 8), "int4": ("int", 4)}
_CALIBRATE = "quantize again with kv_cache in the recipe, or drop kv_cache_scheme from config.json"


def kv_cache_scheme(spec: KVCacheSpec | None) -> dict[str, Any] | None:
    """The configuration's entry for a format."""
    if spec is None:
        return None
    kind, bits = _TYPES[spec.format]
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": _STRATEGIES[spec.granularity],
        "group_size": None,
        "dynamic": False,
    }


def read_kv_cache_scheme(section: Section) -> KVCacheSpec | None:
    """The format that a configuration declares.

    Raises:
        FormatError: It is one that PrismQuant does not have.
    """
    section.require()
    said = section.cache
    if said is None:
        return None
    formats = {value: key for key, value in _TYPES.items()}
    units = {value: key for key, value in _STRATEGIES.items()}
    number, unit = formats.get((said.type, said.bits)), units.get(said.strategy)
    if number is None or unit is None or not said.symmetric or said.dynamic:
        raise FormatError(
            f"a key-value cache of {said.describe()} cannot be read",
            where="kv_cache_scheme",
            remedy="float of 8 or int of 8 or 4 bits, symmetric, static, of strategy tensor or "
            "attn_head can",
        )
    rotates = any(
        apply.location == "k_cache"
        for transform in section.transforms
        for apply in transform.applies
    )
    return KVCacheSpec.from_dict({"format": number, "granularity": unit, "rotated": rotates})


def read_kv_scales(
    reader: ShardReader, prefix: str, spec: KVCacheSpec, kv_heads: int
) -> KVScales | None:
    """The scales of the attention module whose tensors begin with ``prefix``; None: it has none.

    Raises:
        FormatError: Only one of the two is there, it has another number of elements, or is no
            positive number.
        NumericsError: It is NaN or infinite.
    """
    names = [f"{prefix}.k_scale", f"{prefix}.v_scale"]
    present = [name for name in names if name in reader.names]
    if not present:
        return None
    if len(present) == 1:
        raise FormatError(f"{present[0]} is there without its fellow", where=prefix)
    key, value = (reader.read(name) for name in names)
    shape = spec.scale_shape(kv_heads)
    if not key.numel() == value.numel() == math.prod(shape):
        raise FormatError(
            f"scales of keys and values of shapes {list(key.shape)} and {list(value.shape)} do "
            f"not fit a cache of {spec.describe()} with {kv_heads} key-value heads",
            where=prefix,
        )
    for name, scale in zip(names, (key, value), strict=True):
        require_cache_scale(name, scale)
    return KVScales(key.reshape(shape), value.reshape(shape))


def require_cache_scale(name: str, scale: torch.Tensor) -> None:
    """Refuse a scale of keys or values that is no positive number.

    Raises:
        FormatError: It is none.
    """
    if fault := scale_fault(scale, signed=False):
        raise FormatError(f"a scale of the cache {fault}", where=name, remedy=_CALIBRATE)


def quantize_kv_cache(
    model: nn.Module, arch: ArchSpec, names: NameMap, reader: ShardReader, spec: KVCacheSpec
) -> None:
    """Let a loaded model see keys and values as its checkpoint's server would cache them.

    Without scales in the checkpoint servers take 1, and so does this, except where that computes
    nonsense: a key projection's bias can push keys far out of the range of FP8.

    Raises:
        FormatError: The scales do not fit the format, or the cache is uncalibrated where it must
            not be.
    """
    tower = arch.tower(Modality.LLM)
    blocks: Any = model.get_submodule(tower.blocks or "")
    kv_heads = int(config_value(model.config, tower.kv_heads or tower.heads or ""))
    modules = dict(model.named_modules())
    keys = [site for site in tower.sites if site.cache is Cached.KEYS]
    paths = [f"{tower.blocks}.{index}" for index in range(len(blocks))]
    for projection in (f"{b}.{s.path}" for b in paths for s in keys if s.is_in(b, modules)):
        attention = projection.rpartition(".")[0]
        prefix = names.to_disk(f"{attention}.k_scale").removesuffix(".k_scale")
        linear: Any = model.get_submodule(projection)
        scales = read_kv_scales(reader, prefix, spec, kv_heads)
        if scales is None:
            if linear.bias is not None:
                raise _uncalibrated(attention, spec)
            one = torch.ones(spec.scale_shape(kv_heads))
            scales = KVScales(one, one.clone())
        quantize_cache(model, attention, spec, scales.to(linear.weight.device))


def _uncalibrated(attention: str, spec: KVCacheSpec) -> FormatError:
    return FormatError(
        f"the key-value cache of {spec.name} has no scales, and the key projection has a bias: "
        "with the scale 1 that servers assume, keys may be clipped beyond use",
        where=attention,
        remedy=_CALIBRATE,
    )
