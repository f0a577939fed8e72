"""Rules about checkpoints of ModelOpt, as vLLM and SGLang read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

import torch

from prismquant.check.checkpoint import MODELOPT_FILE, CheckedLayer, Checkpoint
from prismquant.check.findings import Problem, gathered
from prismquant.export.compressed_tensors.expected import REAL, SCALES, Expected
from prismquant.formats.quantization_args import shown

METHODS = ("modelopt", "modelopt_fp4", "modelopt_mixed")
MIXED = "MIXED_PRECISION"
ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8")
_TYPES: Mapping[str, tuple[type, str]] = {
    "quant_algo": (str, "a name"),
    "kv_cache_quant_algo": (str, "a name"),
    "group_size": (int, "a number of columns"),
    "exclude_modules": (list, "a list of names"),
    "ignore": (list, "a list of names"),
    "quantized_layers": (Mapping, "an object"),
}
_FP4 = ("NVFP4", "W4A16_NVFP4")
_FP4_FIELDS = ("group_size", "kv_cache_quant_algo", "exclude_modules")
_DIVISORS = {"NVFP4": 16, "W4A16_NVFP4": 16, "MXFP8": 32, "FP8_PB_WO": 128}
_SHARED = ("weight_scale_2", "input_scale")
_SCALAR: tuple[tuple[int, ...], ...] = ((), (1,))
_E4M3, _BYTES = (torch.float8_e4m3fn,), (torch.uint8,)


def algorithm(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Algorithms that servers do not have under this method."""
    if not _is_modelopt(checkpoint):
        return
    algo = _algo(checkpoint)
    if algo and algo not in (*ALGORITHMS, MIXED):
        yield Problem(f"vLLM has no ModelOpt algorithm {algo!r}", ("quant_algo",), _one_of())
    unknown: dict[str, list[str]] = {}
    for name, entry in _layers_of_mixed(checkpoint).items():
        said = str(entry.get("quant_algo", "")).upper() if isinstance(entry, Mapping) else ""
        if said not in ALGORITHMS:
            unknown.setdefault(said, []).append(name)
    for said, names in unknown.items():
        what = f"layers have the algorithm {said!r}, which vLLM leaves in floating point"
        yield Problem(what, tuple(names), _one_of())


def types(checkpoint: Checkpoint) -> list[Problem]:
    """Values of other types than readers expect."""
    said = _described(checkpoint)
    found = []
    for key, (kinds, kind) in _TYPES.items():
        value = said.get(key)
        wrong = not isinstance(value, kinds) or isinstance(value, bool)
        if value is not None and (wrong or (kinds is list and not _are_names(value))):
            found.append((f"{key} is {shown(value)}, not {kind}", key, f"write {kind}"))
    if not _algo(checkpoint):
        found.append(("there is no quant_algo", "quantization_config", _one_of()))
    return gathered(found)


def fields(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Fields of NVFP4 that hf_quant_config.json must have where config.json has none."""
    own = _own_file(checkpoint)
    if own is None or checkpoint.section.get("quant_algo"):
        return
    if str(own.get("quant_algo", "")).upper() not in _FP4:
        return
    lacking = tuple(field for field in _FP4_FIELDS if field not in own)
    if lacking:
        yield Problem(f"{MODELOPT_FILE} lacks fields that NVFP4 needs", lacking, "write them")


def mixed(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Mixed precision without a list of layers."""
    if _is_modelopt(checkpoint) and _algo(checkpoint) == MIXED and not _layers_of_mixed(checkpoint):
        what = f"{MIXED} has no quantized_layers"
        yield Problem(what, ("quantized_layers",), "list every quantized layer with its quant_algo")


def agreement(checkpoint: Checkpoint) -> Iterator[Problem]:
    """The two places that say the same."""
    own = _own_file(checkpoint)
    if own is None or not checkpoint.section.get("quant_algo"):
        return
    for key, other in (("quant_algo", "quant_algo"), ("exclude_modules", "ignore")):
        ours, theirs = own.get(key), checkpoint.section.get(other)
        if isinstance(ours, list):
            ours, theirs = sorted(map(str, ours)), sorted(map(str, _listed(theirs)))
        # Mixed precision has no use for the list.
        if ours is not None and ours != theirs and not (key != "quant_algo" and theirs == []):
            yield Problem(
                f"{MODELOPT_FILE} and config.json differ in {key}",
                (MODELOPT_FILE, "config.json"),
                "write the same into both: readers look at either",
            )


def divisible(checkpoint: Checkpoint) -> list[Problem]:
    """Blocks that do not divide a layer's input."""
    return gathered(
        (
            f"{algo} needs multiples of {divisor}, not {layer.in_features} input features",
            layer.called,
            "leave the layer in floating point, or quantize it as FP8",
        )
        for layer, algo in _quantized(checkpoint)
        if (divisor := _DIVISORS.get(algo, 1)) and layer.in_features % divisor
    )


def fused(checkpoint: Checkpoint) -> list[Problem]:
    """Fused layers with different algorithms."""
    algorithms = {layer.name: algo for layer, algo in _quantized(checkpoint)}
    found = []
    for members in checkpoint.fused() if _is_modelopt(checkpoint) else ():
        said = {layer.role: algorithms.get(layer.name, "none") for layer in members}
        if len(set(said.values())) > 1:
            listed = "; ".join(f"{role}: {algo}" for role, algo in said.items())
            remedy = "give them one algorithm: servers load them as one matrix"
            found.append((f"fused layers differ: {listed}", members[0].called, remedy))
    return gathered(found)


def global_scales(checkpoint: Checkpoint) -> list[Problem]:
    """Fused layers with different scales of the whole tensor."""
    if not any(algo in _FP4 for _, algo in _quantized(checkpoint)):
        return []
    found = []
    for members in checkpoint.fused():
        for suffix in _SHARED:
            values = {checkpoint.scalar(f"{layer.disk}.{suffix}") for layer in members} - {None}
            if len(values) > 1:
                what = f"fused layers have different {suffix}: servers take the largest for all"
                found.append((what, members[0].disk, "write the largest into all, requantized"))
    return gathered(found)


def tensors(checkpoint: Checkpoint) -> list[Problem]:
    """Tensors that an algorithm's layers must have."""
    remedy = "exclude the layer in exclude_modules and ignore, or export it again"
    return gathered(
        (f"{algo} layers have no {suffix}", layer.disk, remedy)
        for layer, algo, suffix, wanted in _wanted(checkpoint)
        if wanted.required and f"{layer.disk}.{suffix}" not in checkpoint.tensors
    )


def shapes(checkpoint: Checkpoint) -> list[Problem]:
    """Shapes and dtypes of quantized layers."""
    found = []
    for layer, algo, suffix, wanted in _wanted(checkpoint):
        info = checkpoint.tensors.get(f"{layer.disk}.{suffix}")
        if info is None:
            continue
        if info.shape not in wanted.shapes:
            what = f"{suffix} is {list(info.shape)}, {algo} makes it {list(wanted.shapes[0])}"
            found.append((what, layer.disk, "export the layer again"))
        elif info.dtype not in wanted.dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted.dtypes)
            what = f"{suffix} is {str(info.dtype).removeprefix('torch.')}, {algo} has {names}"
            found.append((what, layer.disk, "export the layer again"))
    return gathered(found)


def excluded(checkpoint: Checkpoint) -> list[Problem]:
    """Layers that are stored quantized although they are excluded."""
    if not _is_modelopt(checkpoint):
        return []
    names = {layer.name for layer, _ in _quantized(checkpoint)}
    return gathered(
        (
            "layers are stored quantized, but excluded or not listed",
            layer.disk,
            "take them off exclude_modules, or list them in quantized_layers",
        )
        for layer in checkpoint.layers
        if layer.name not in names and is_stored_quantized(checkpoint, layer)
    )


def is_stored_quantized(checkpoint: Checkpoint, layer: CheckedLayer) -> bool:
    """Whether a layer's weight is of a dtype for codes."""
    info = checkpoint.tensors.get(f"{layer.disk}.weight")
    return info is not None and info.dtype not in REAL


def in_transformers(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Checkpoints of ModelOpt, which transformers does not read."""
    if _is_modelopt(checkpoint):
        yield Problem(
            "transformers has no reader for quant_method modelopt",
            ("quant_method",),
            "export it as compressed-tensors for transformers",
        )


def expected_tensors(algo: str, rows: int, columns: int) -> dict[str, Expected]:
    """The tensors of one layer by suffix."""
    plain = ((rows, columns),)
    scalar = Expected(_SCALAR, SCALES)
    if algo in _FP4:
        found = {
            "weight": Expected(((rows, columns // 2),), _BYTES),
            "weight_scale": Expected(((rows, columns // 16),), _E4M3),
            "weight_scale_2": scalar,
        }
        return found | ({"input_scale": scalar} if algo == "NVFP4" else {})
    scales: tuple[tuple[int, ...], ...] = _SCALAR
    dtypes: tuple[torch.dtype, ...] = SCALES
    if algo == "FP8_PER_CHANNEL_PER_TOKEN":
        scales = ((rows,), (rows, 1))
    elif algo == "FP8_PB_WO":
        high, wide = -(-rows // 128), -(-columns // 128)
        scales = ((high, 1, wide, 1),)
    elif algo == "MXFP8":
        scales, dtypes = ((rows, columns // 32),), (torch.uint8, torch.float8_e8m0fnu)
    found = {"weight": Expected(plain, _E4M3), "weight_scale": Expected(scales, dtypes)}
    return found | ({"input_scale": scalar} if algo == "FP8" else {})


def _wanted(checkpoint: Checkpoint) -> Iterator[tuple[CheckedLayer, str, str, Expected]]:
    for layer, algo in _quantized(checkpoint):
        wanted = expected_tensors(algo, layer.out_features, layer.in_features)
        for suffix, one in wanted.items():
            yield layer, algo, suffix, one


def _quantized(checkpoint: Checkpoint) -> Iterator[tuple[CheckedLayer, str]]:
    """Layers that the configuration calls quantized, with the algorithm of each."""
    if not _is_modelopt(checkpoint):
        return
    algo = _algo(checkpoint)
    listed = _layers_of_mixed(checkpoint)
    for layer in checkpoint.layers:
        if _is_excluded(checkpoint, layer):
            continue
        if algo == MIXED:
            entry = listed.get(layer.called) or listed.get(layer.disk)
            said = str(entry.get("quant_algo", "")).upper() if isinstance(entry, Mapping) else ""
            if said in ALGORITHMS:
                yield layer, said
        elif algo in ALGORITHMS:
            yield layer, algo


def _is_excluded(checkpoint: Checkpoint, layer: CheckedLayer) -> bool:
    patterns = _described(checkpoint).get("exclude_modules")
    if patterns is None:
        patterns = _described(checkpoint).get("ignore")
    return any(
        fnmatch(name, str(pattern)) or str(pattern) in name
        for pattern in _listed(patterns)
        for name in (layer.called, layer.disk)
    )


def _are_names(value: Any) -> bool:
    return all(isinstance(one, str) for one in value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_modelopt(checkpoint: Checkpoint) -> bool:
    return checkpoint.method.startswith("modelopt")


def _described(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """File that tells the scheme: config.json, else ModelOpt's own."""
    if checkpoint.section.get("quant_algo"):
        return checkpoint.section
    return _own_file(checkpoint) or {}


def _own_file(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    content = (checkpoint.modelopt_file or {}).get("quantization")
    return content if isinstance(content, Mapping) else None


def _algo(checkpoint: Checkpoint) -> str:
    return str(_described(checkpoint).get("quant_algo") or "").upper()


def _layers_of_mixed(checkpoint: Checkpoint) -> Mapping[str, Any]:
    layers = _described(checkpoint).get("quantized_layers")
    mixed_up = _algo(checkpoint) == MIXED and isinstance(layers, Mapping)
    return layers if mixed_up and layers is not None else {}


def _one_of() -> str:
    return f"vLLM has {', '.join((*ALGORITHMS, MIXED))}; export integers as compressed-tensors"
