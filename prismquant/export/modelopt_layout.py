"""ModelOpt's unified checkpoint: FP8, NVFP4 and MXFP8, as vLLM and SGLang read them.

=============================  =============================  ======================================
algorithm                      weights, inputs                tensors
=============================  =============================  ======================================
``FP8``                        fp8-tensor, fp8-tensor         ``weight`` E4M3, ``weight_scale`` [],
                                                              ``input_scale`` []
``FP8_PER_CHANNEL_PER_TOKEN``  fp8-channel, fp8-token         ``weight_scale`` [N]
``FP8_PB_WO``                  fp8-b128, fp8-g128-dyn         ``weight_scale`` [N/128, 1, K/128, 1]
``NVFP4``                      nvfp4, nvfp4-dyn               ``weight`` uint8 [N, K/2], low nibble
                                                              first; ``weight_scale`` E4M3
                                                              [N, K/16]; ``weight_scale_2`` [] and
                                                              ``input_scale`` []
``W4A16_NVFP4``                nvfp4, floating point          the same without ``input_scale``
``MXFP8``                      mxfp8, mxfp8-dyn               ``weight_scale`` uint8 [N, K/32]
=============================  =============================  ======================================

All scales are float32 but those of blocks. ``weight_scale_2`` and the ``input_scale`` of NVFP4
multiply, where the global scales of compressed-tensors divide: they are reciprocals, exact for the
powers of two that PrismQuant chooses. Layers that differ in algorithm make a ``MIXED_PRECISION``
checkpoint, which names each of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from prismquant.export.compressed_tensors.kv_section import read_kv_cache_scheme
from prismquant.export.compressed_tensors.reader import StoredLayer
from prismquant.export.compressed_tensors.stored import StoredCheckpoint
from prismquant.export.exporter import Progress, Refusal, write_checkpoint
from prismquant.formats.packed import FLOAT_QUANTIZED, MXFP8_QUANTIZED, NVFP4_PACK_QUANTIZED, pack
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.formats.spec import NumberSpec, spec
from prismquant.version import __version__

METHOD, FILE = "modelopt", "hf_quant_config.json"
MIXED = "MIXED_PRECISION"

_Pair = tuple[str, str | None]
_ALGORITHMS: Mapping[_Pair, str] = MappingProxyType(
    {
        ("fp8-tensor", "fp8-tensor"): "FP8",
        ("fp8-channel", "fp8-token"): "FP8_PER_CHANNEL_PER_TOKEN",
        ("fp8-b128", "fp8-g128-dyn"): "FP8_PB_WO",
        ("nvfp4", "nvfp4-dyn"): "NVFP4",
        ("nvfp4", None): "W4A16_NVFP4",
        ("mxfp8", "mxfp8-dyn"): "MXFP8",
    }
)
_PAIRS = {algorithm: pair for pair, algorithm in _ALGORITHMS.items()}
_CACHES = {"k_proj": "k_scale", "v_proj": "v_scale"}


@dataclass(frozen=True)
class ModelOpt:
    """Write ModelOpt's unified checkpoint."""

    name: ClassVar[str] = "modelopt"
    drops_inputs: ClassVar[str] = "never"
    needs_quantized: ClassVar[bool] = True

    def refusals(self, source: StoredCheckpoint) -> list[Refusal]:
        """Layers in formats that no algorithm has, rotated inputs, split columns; caches that are
        not FP8 of one scale."""
        found = [_refusal(source, layer) for layer in source.layers]
        cache = read_kv_cache_scheme(source.section)
        if cache is not None and (cache.format, cache.granularity) != ("fp8", "tensor"):
            why = f"the key-value cache is {cache.format} with a scale a {cache.granularity}"
            found.append(Refusal("kv_cache_scheme", f"{why}: only fp8 with one scale is known"))
        return [item for item in found if item is not None]

    def remarks(self, source: StoredCheckpoint) -> list[str]:
        """Values that differ in the last bit, and what servers add of their own."""
        remarks = []
        odd = [layer for layer in source.quantized if not _exact(source, layer)]
        if odd:
            remarks.append(
                f"global scales of {len(odd)} layers are no powers of two, so their reciprocals "
                "are rounded: values may differ in the last bit"
            )
        return remarks

    def write(self, source: StoredCheckpoint, out: Path, progress: Progress) -> None:
        """Write the checkpoint and both of its configurations."""
        section = quantization_section(source)
        write_checkpoint(
            source,
            out,
            progress,
            convert=lambda layer: _tensors(source, layer),
            config=source.plain_config | {"quantization_config": config_section(source, section)},
            files={FILE: {"producer": _producer(), "quantization": section}},
            extra=_cache_scales(source),
        )


def algorithm(layer: StoredLayer) -> str | None:
    """ModelOpt's name for what a quantized layer is; None where it has none."""
    scheme = layer.scheme
    if scheme is None or scheme.outputs is not None:
        return None
    return _ALGORITHMS.get((scheme.weights.name, _name(scheme.activations)))


def tensors(q: QuantizedTensor, input_scale: Tensor | None) -> dict[str, Tensor]:
    """One layer as ModelOpt stores it.

    Args:
        q: Codes and scales in one of the formats of the module's table.
        input_scale: The static scale of its input as compressed-tensors stores it (of NVFP4 the
            global scale, a divisor), one element; None: there is none.

    Returns:
        By the suffix of the name on disk.
    """
    if q.global_scale is not None:
        stored = pack(q, NVFP4_PACK_QUANTIZED)
        found = {
            "weight": stored["weight_packed"],
            "weight_scale": stored["weight_scale"],
            "weight_scale_2": _reciprocal(q.global_scale),
        }
        return found if input_scale is None else found | {"input_scale": _reciprocal(input_scale)}
    if q.spec.scale != "float":
        stored = pack(q, MXFP8_QUANTIZED)
        return {name: stored[name] for name in ("weight", "weight_scale")}
    stored = pack(q, FLOAT_QUANTIZED)
    found = {"weight": stored["weight"], "weight_scale": _float_scale(q)}
    if input_scale is not None:
        found["input_scale"] = input_scale.to(torch.float32).reshape(())
    return found


def quantization_section(source: StoredCheckpoint) -> dict[str, Any]:
    """The ``quantization`` part of ``hf_quant_config.json``."""
    algorithms = {layer.called: str(algorithm(layer)) for layer in source.quantized}
    left = sorted(layer.called for layer in source.layers if layer.called not in algorithms)
    cache = "FP8" if source.has_cache_scales else None
    common = {"kv_cache_quant_algo": cache, "exclude_modules": left}
    if len(set(algorithms.values())) == 1:
        only = next(iter(algorithms.values()))
        return {"quant_algo": only, "group_size": _group(only), **common}
    listed = {
        name: {"quant_algo": algo} | ({"group_size": size} if (size := _group(algo)) else {})
        for name, algo in algorithms.items()
    }
    return {"quant_algo": MIXED, **common, "quantized_layers": listed}


def config_section(source: StoredCheckpoint, section: Mapping[str, Any]) -> dict[str, Any]:
    """The same as ``quantization_config`` of ``config.json``."""
    groups: dict[str, list[str]] = {}
    for layer in source.quantized:
        groups.setdefault(str(algorithm(layer)), []).append(layer.called)
    most = Counter({algo: len(names) for algo, names in groups.items()}).most_common(1)[0][0]
    config_groups = {
        f"group_{number}": _group_words(algo) | {"targets": sorted(names)}
        for number, (algo, names) in enumerate(groups.items())
    }
    body: dict[str, Any] = {
        "quant_method": METHOD,
        "quant_algo": section["quant_algo"],
        "group_size": section.get("group_size", _group(most)),
        "config_groups": config_groups,
        "ignore": section["exclude_modules"],
        "producer": _producer(),
    }
    if section["kv_cache_quant_algo"] is not None:
        body["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    if "quantized_layers" in section:
        body["quantized_layers"] = section["quantized_layers"]
    return body


def _refusal(source: StoredCheckpoint, layer: StoredLayer) -> Refusal | None:
    if layer.rotation is not None:
        why = "its input is rotated at run time, which the format cannot say"
        return Refusal(layer.name, why)
    if layer.outputs is not None:
        return Refusal(layer.name, "its output is quantized, which the format cannot say")
    # Some inputs are declared in our own section only, which an algorithm's name would pass over.
    undeclared = layer.inputs is not None and (not layer.scheme or not layer.scheme.activations)
    if layer.scheme is None and not undeclared:
        return None
    if undeclared or algorithm(layer) is None:
        weights = _name(layer.scheme.weights if layer.scheme else None) or "float"
        inputs = _name(layer.inputs) or "float"
        why = f"no algorithm has {weights} weights with {inputs} inputs"
        return Refusal(layer.name, why)
    if source.splits(layer):
        return Refusal(layer.name, "single columns stay in floating point, which it cannot say")
    return None


def _tensors(source: StoredCheckpoint, layer: StoredLayer) -> dict[str, Tensor]:
    static = source.static_scale(layer, "input")
    return tensors(source.codes(layer), None if static is None else static.scale)


def _float_scale(q: QuantizedTensor) -> Tensor:
    """The scale of FP8 weights in float32, in the shape that ModelOpt gives it."""
    scale = q.scale.to(torch.float32)
    if q.spec.block_structure is not None:
        return scale[:, None, :, None].contiguous()
    return scale.reshape(()) if scale.numel() == 1 and scale.ndim == 1 else scale.reshape(-1)


def _reciprocal(divisor: Tensor) -> Tensor:
    return divisor.to(torch.float32).reciprocal().reshape(())


def _exact(source: StoredCheckpoint, layer: StoredLayer) -> bool:
    name = f"{layer.prefix}.weight_global_scale"
    if name not in source.shards.names:
        return True
    return math.frexp(float(source.shards.read(name)))[0] == 0.5


def _cache_scales(source: StoredCheckpoint) -> dict[str, Tensor]:
    """Scales of keys and values, under the projections, where ModelOpt has them."""
    if not source.has_cache_scales:
        return {}
    found = {}
    for layer in source.layers:
        parent, _, leaf = layer.prefix.rpartition(".")
        scale = f"{parent}.{_CACHES.get(leaf)}"
        if leaf in _CACHES and scale in source.shards.names:
            value = source.shards.read(scale).to(torch.float32).reshape(())
            found[f"{layer.prefix}.{_CACHES[leaf]}"] = value
    return found


def _group(algo: str) -> int | None:
    """Number of weights that share a scale, along the input."""
    return spec(_PAIRS[algo][0]).group_size


def _group_words(algo: str) -> dict[str, Any]:
    weights, inputs = _PAIRS[algo]
    sides = {"weights": spec(weights), "input_activations": spec(inputs) if inputs else None}
    return {key: _words(number) if number else None for key, number in sides.items()}


def _words(number: NumberSpec) -> dict[str, Any]:
    size = {} if number.group_size is None else {"group_size": number.group_size}
    dynamic = number.dynamic and number.scale != "e4m3"
    return {"dynamic": dynamic, "num_bits": number.bits, "type": "float"} | size


def _producer() -> dict[str, str]:
    return {"name": "prismquant", "version": __version__}


def _name(number: NumberSpec | None) -> str | None:
    return None if number is None else number.name
