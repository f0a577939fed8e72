"""Rules about checkpoints in the layouts of GPTQ and AWQ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from prismquant.check.checkpoint import CheckedLayer, Checkpoint
from prismquant.check.findings import Problem, gathered
from prismquant.export.compressed_tensors.expected import REAL, Expected
from prismquant.formats.quantization_args import is_count, shown
from prismquant.formats.section import is_broken

GPTQ, AWQ = "gptq", "awq"
METHODS = (GPTQ, AWQ)
_KEYS = {GPTQ: ("bits", "group_size", "desc_act", "sym"), AWQ: ("bits", "group_size", "zero_point")}
_WORD = 32
_TYPES: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "bits": (int, "a number of bits"),
    "group_size": (int, "a number of columns, or -1"),
    "desc_act": (bool, "true or false"),
    "sym": (bool, "true or false"),
    "zero_point": (bool, "true or false"),
    "dynamic": (Mapping, "an object"),
    "modules_to_not_convert": (list, "a list of names"),
    "modules_in_block_to_quantize": (list, "a list of names"),
}


def keys(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Keys that the configuration must have."""
    lacking = tuple(
        key for key in _KEYS.get(checkpoint.method, ()) if key not in checkpoint.section
    )
    if lacking:
        yield Problem("quantization_config lacks keys of its method", lacking, "write them")
    if checkpoint.method not in METHODS:
        return
    for key, (kinds, kind) in _TYPES.items():
        value = checkpoint.section.get(key)
        flag = isinstance(value, bool) != (kinds is bool)
        if value is not None and (not isinstance(value, kinds) or flag):
            yield Problem(f"{key} is {shown(value)}, not {kind}", (key,), f"write {kind}")
    for pattern in _dynamic(checkpoint):
        expression = pattern.removeprefix("-:").removeprefix("+:")
        if is_broken(expression):
            what = f"{shown(expression)} is no regular expression"
            yield Problem(what, ("dynamic",), "correct the pattern")


def widths(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Widths that vLLM has kernels for."""
    if checkpoint.method not in METHODS:
        return
    symmetric = checkpoint.section.get("sym", True)
    odd: dict[str, list[str]] = {}
    for layer in _packed(checkpoint):
        bits = _setting(checkpoint, layer, "bits")
        fits = bits == 4 if checkpoint.method == AWQ else bits in (4, 8) and symmetric
        if not fits:
            odd.setdefault(shown(bits), []).append(layer.called)
    for bits, names in odd.items():
        kind = "" if symmetric or checkpoint.method == AWQ else " asymmetric"
        legal = "4 bits" if checkpoint.method == AWQ else "symmetric 4 and 8 bits"
        yield Problem(
            f"vLLM does not read {checkpoint.method} of {bits}{kind} bits",
            tuple(names),
            f"it reads {legal}; export other widths as compressed-tensors",
        )


def nothing_packed(checkpoint: Checkpoint) -> Iterator[Problem]:
    """A method without a layer of it."""
    if checkpoint.method in METHODS and checkpoint.layers and not any(_packed(checkpoint)):
        what = f"the method is {checkpoint.method}, but no layer has a qweight"
        yield Problem(what, ("quant_method",), "export the checkpoint again")


def tensors(checkpoint: Checkpoint) -> list[Problem]:
    """Tensors that stand beside a qweight."""
    return gathered(
        (f"packed layers have no {suffix}", layer.disk, "export the layer again")
        for layer, suffix, wanted in _wanted(checkpoint)
        if wanted.required and f"{layer.disk}.{suffix}" not in checkpoint.tensors
    )


def shapes(checkpoint: Checkpoint) -> list[Problem]:
    """Shapes and dtypes."""
    found = []
    for layer, suffix, wanted in _wanted(checkpoint):
        info = checkpoint.tensors.get(f"{layer.disk}.{suffix}")
        if info is None:
            continue
        if info.shape not in wanted.shapes:
            what = (
                f"{suffix} is {list(info.shape)}, the configuration makes it "
                f"{list(wanted.shapes[0])}"
            )
            found.append((what, layer.disk, "correct bits and group_size, or export again"))
        elif info.dtype not in wanted.dtypes:
            what = f"{suffix} is {str(info.dtype).removeprefix('torch.')}"
            found.append((what, layer.disk, "codes are int32, scales float16"))
    return gathered(found)


def divisible(checkpoint: Checkpoint) -> list[Problem]:
    """Groups and words that do not divide a layer."""
    found = []
    for layer in _packed(checkpoint):
        size, bits = _size(checkpoint, layer), _setting(checkpoint, layer, "bits")
        if not is_count(bits):
            continue
        if layer.in_features % size:
            what = f"groups of {size} do not divide {layer.in_features} input features"
            found.append((what, layer.called, "leave the layer in floating point"))
        if layer.out_features * bits % _WORD:
            what = f"{layer.out_features} zero points of {bits} bits do not fill whole words"
            found.append((what, layer.called, "leave the layer in floating point"))
    return gathered(found)


def fused(checkpoint: Checkpoint) -> list[Problem]:
    """Fused layers of which only some are packed, or packed otherwise."""
    if checkpoint.method not in METHODS:
        return []
    packed = {layer.name for layer in _packed(checkpoint)}
    found = []
    for members in checkpoint.fused():
        said = {
            (
                layer.name in packed,
                shown(_setting(checkpoint, layer, "bits")),
                _size(checkpoint, layer),
            )
            for layer in members
        }
        if len({entry[0] for entry in said}) > 1 or (members[0].name in packed and len(said) > 1):
            remedy = "give them one scheme: servers load them as one matrix"
            found.append(("fused layers are packed differently", members[0].called, remedy))
    return gathered(found)


def excluded(checkpoint: Checkpoint) -> list[Problem]:
    """Layers in floating point that the configuration does not leave out."""
    if checkpoint.method not in METHODS:
        return []
    where = "modules_to_not_convert" if checkpoint.method == AWQ else "dynamic (a '-:' pattern)"
    packed = {layer.name for layer in _packed(checkpoint)}
    return gathered(
        (
            "layers are in floating point, but the configuration does not leave them out",
            layer.called,
            f"list them in {where}",
        )
        for layer in checkpoint.layers
        if layer.name not in packed and not layer.is_head
        if layer.site is not None and not _left_out(checkpoint, layer)
    )


def is_packed(checkpoint: Checkpoint, layer: CheckedLayer) -> bool:
    """Whether a layer is stored in one of these layouts."""
    return f"{layer.disk}.qweight" in checkpoint.tensors


def _packed(checkpoint: Checkpoint) -> Iterator[CheckedLayer]:
    if checkpoint.method in METHODS:
        yield from (layer for layer in checkpoint.layers if is_packed(checkpoint, layer))


def _wanted(checkpoint: Checkpoint) -> Iterator[tuple[CheckedLayer, str, Expected]]:
    for layer in _packed(checkpoint):
        bits = _setting(checkpoint, layer, "bits")
        if not is_count(bits) or not 1 < bits <= 8:
            continue
        groups = -(-layer.in_features // _size(checkpoint, layer))
        for suffix, one in _expected(checkpoint.method, layer, bits, groups).items():
            yield layer, suffix, one


def _expected(method: str, layer: CheckedLayer, bits: int, groups: int) -> dict[str, Expected]:
    rows, columns, words = layer.out_features, layer.in_features, (torch.int32,)
    packed_rows, packed_columns = rows * bits // _WORD, columns * bits // _WORD
    shape = (packed_columns, rows) if method == GPTQ else (columns, packed_rows)
    found = {
        "qweight": Expected((shape,), words),
        "qzeros": Expected(((groups, packed_rows),), words),
        "scales": Expected(((groups, rows),), REAL),
    }
    if method == GPTQ:
        found["g_idx"] = Expected(((columns,),), words, required=False)
    return found


def _size(checkpoint: Checkpoint, layer: CheckedLayer) -> int:
    size = _setting(checkpoint, layer, "group_size")
    return size if is_count(size) else layer.in_features


def _setting(checkpoint: Checkpoint, layer: CheckedLayer, key: str) -> Any:
    """A setting of one layer: GPTQ configurations may have patterns with others."""
    for pattern, override in _dynamic(checkpoint).items():
        sign, _, rest = pattern.partition(":")
        body = rest if sign in ("+", "-") else pattern
        if sign != "-" and isinstance(override, Mapping) and _fits(checkpoint, body, layer):
            return override.get(key, checkpoint.section.get(key))
    return checkpoint.section.get(key)


def _left_out(checkpoint: Checkpoint, layer: CheckedLayer) -> bool:
    if checkpoint.method == AWQ:
        listed = _listed(checkpoint, "modules_to_not_convert")
        return any(str(one) in name for one in listed for name in (layer.called, layer.disk))
    named = _listed(checkpoint, "modules_in_block_to_quantize")
    if named:
        flat = [one for entry in named for one in (entry if isinstance(entry, list) else [entry])]
        return not any(str(one) in layer.called for one in flat)
    negative = (p.removeprefix("-:") for p in _dynamic(checkpoint) if p.startswith("-:"))
    return any(_fits(checkpoint, pattern, layer) for pattern in negative)


def _listed(checkpoint: Checkpoint, key: str) -> list[Any]:
    value = checkpoint.section.get(key)
    return value if isinstance(value, list) else []


def _dynamic(checkpoint: Checkpoint) -> Mapping[str, Any]:
    dynamic = checkpoint.section.get("dynamic")
    return dynamic if isinstance(dynamic, Mapping) else {}


def _fits(checkpoint: Checkpoint, pattern: str, layer: CheckedLayer) -> bool:
    names = (layer.called, layer.disk)
    return any(checkpoint.matcher.matches(name, f"re:{pattern}") for name in names)
