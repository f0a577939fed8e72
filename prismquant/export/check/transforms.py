"""Rules about transforms at run time, such as the rotation of a layer's input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prismquant.export.check.checkpoint import Checkpoint, Layer
from prismquant.export.check.findings import Problem, gathered
from prismquant.export.check.scheme import matches

_SCHEME_KEYS = frozenset({"type", "apply", "randomize", "requires_grad", "head_dim", "precision"})
_OF_ATTENTION = ("k_cache", "q_attn")
_APPLY_KEYS = frozenset({"targets", "location", "inverse", "ignore"})
_LOCATIONS = ("input", "weight_input", "weight_output", "output", "k_cache", "q_attn")
_ONLINE = ("input", "output", "k_cache", "q_attn")
_TYPES = ("hadamard", "random-hadamard", "random-matrix")
_LARGEST = 1 << 15


def grammar(checkpoint: Checkpoint) -> list[Problem]:
    """Keys, types and locations."""
    found = []
    for name, scheme in _schemes(checkpoint).items():
        if not isinstance(scheme, Mapping):
            found.append(("a transform is not an object", name, "write its type and targets out"))
            continue
        keys = set(scheme) - _SCHEME_KEYS
        keys |= {key for apply in _applies(scheme) for key in set(apply) - _APPLY_KEYS}
        found += [
            (f"a transform has the unknown key {k!r}", name, "delete it") for k in sorted(keys)
        ]
        if scheme.get("type") not in _TYPES:
            what = f"a transform has type {scheme.get('type')!r}"
            found.append((what, name, f"known types: {', '.join(_TYPES)}"))
        for apply in _applies(scheme):
            if apply.get("location") not in _LOCATIONS:
                what = f"a transform has location {apply.get('location')!r}"
                found.append((what, name, f"known locations: {', '.join(_LOCATIONS)}"))
    return gathered(found)


def sizes(checkpoint: Checkpoint) -> list[Problem]:
    """Widths that do not fit the layer."""
    found = []
    for name, scheme, layer in _rotated(checkpoint):
        size = scheme.get("head_dim") or layer.in_features
        if layer.in_features % size:
            what = f"blocks of {size} do not divide {layer.in_features} input features"
            found.append((f"{name}: {what}", layer.called, "choose a head_dim that divides it"))
    return gathered(found)


def kernel_sizes(checkpoint: Checkpoint) -> list[Problem]:
    """Widths that vLLM's kernel does not have."""
    remedy = "use a power of two up to 32768, or fold the rotation into the weights"
    return gathered(
        (f"vLLM rotates blocks of a power of two only, not of {size}", layer.called, remedy)
        for _, scheme, layer in _rotated(checkpoint)
        if (size := scheme.get("head_dim") or layer.in_features) & (size - 1) or size > _LARGEST
    )


def biased(checkpoint: Checkpoint) -> list[Problem]:
    """Layers with a bias, before which vLLM cannot rotate."""
    remedy = "serve it with prismquant.load, or rotate offline only"
    return gathered(
        ("vLLM cannot rotate the input of a layer with a bias", layer.called, remedy)
        for _, _, layer in _rotated(checkpoint)
        if layer.site is not None and layer.site.has_bias
    )


def unmatched(checkpoint: Checkpoint) -> list[Problem]:
    """Targets that match no layer, or no attention where it is about keys and queries."""
    linears = [one.name for one in checkpoint.layers]
    attentions = {name.rpartition(".")[0] for name in linears if name.endswith(".k_proj")}
    remedy = "write a pattern that ends like the layer's path, e.g. re:(.*[.])?mlp[.]down_proj$"
    return gathered(
        (f"targets of transform {name} match no layer", target, remedy)
        for name, scheme in _schemes(checkpoint).items()
        if isinstance(scheme, Mapping)
        for apply in _applies(scheme)
        for target in _targets(apply)
        for names in (attentions if apply.get("location") in _OF_ATTENTION else linears,)
        if target != "Linear" and not any(matches(name, target) for name in names)
    )


def one_gpu(checkpoint: Checkpoint) -> list[Problem]:
    """Rotations over several GPUs."""
    remedy = "serve it on one GPU, or fold the rotation into the weights"
    return gathered(
        ("vLLM rotates inputs without tensor parallelism only", layer.called, remedy)
        for _, _, layer in _rotated(checkpoint)
    )


def in_transformers(checkpoint: Checkpoint) -> Iterator[Problem]:
    """What transformers makes of it: nothing."""
    names = tuple(
        name
        for name, scheme in _schemes(checkpoint).items()
        if isinstance(scheme, Mapping)
        and any(apply.get("location") in _ONLINE for apply in _applies(scheme))
    )
    if names:
        yield Problem(
            "transformers 5.24 ignores transform_config and computes nonsense",
            names,
            "load it with prismquant.load or vLLM, or fold the rotation into the weights",
        )


def matrices(checkpoint: Checkpoint) -> list[Problem]:
    """Stored matrices that are missing, or of another shape than the scheme says."""
    found = []
    # Of layers that servers fuse, one may store the matrix for all.
    together = {one.name: members for members in checkpoint.fused() for one in members}
    for name, scheme, layer in _rotated(checkpoint):
        size = scheme.get("head_dim") or layer.in_features
        places = (layer, *together.get(layer.name, ()))
        stored = (checkpoint.tensors.get(f"{one.disk}.{name}_input.weight") for one in places)
        info = next((one for one in stored if one is not None), None)
        if info is None:
            what = f"the matrix of transform {name} is missing"
            found.append((what, layer.disk, f"store it as {name}_input.weight beside the layer"))
        elif info.shape != (size, size):
            what = f"the matrix of transform {name} is {list(info.shape)}, not {[size, size]}"
            found.append((what, layer.disk, "write the matrix of head_dim rows and columns"))
    return gathered(found)


def _schemes(checkpoint: Checkpoint) -> Mapping[str, Any]:
    section = checkpoint.section.get("transform_config")
    groups = section.get("config_groups") if isinstance(section, Mapping) else None
    return groups if isinstance(groups, Mapping) else {}


def _applies(scheme: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    listed = scheme.get("apply") or []
    if not isinstance(listed, list):
        return []
    return [one for one in listed if isinstance(one, Mapping)]


def _targets(apply: Mapping[str, Any]) -> list[str]:
    targets = apply.get("targets") or []
    return [targets] if isinstance(targets, str) else [str(target) for target in targets]


def _rotated(checkpoint: Checkpoint) -> Iterator[tuple[str, Mapping[str, Any], Layer]]:
    """Transforms of inputs, with the layers that they match."""
    for name, scheme in _schemes(checkpoint).items():
        if not isinstance(scheme, Mapping) or not _sound(scheme.get("head_dim")):
            continue
        for apply in _applies(scheme):
            if apply.get("location") != "input":
                continue
            for layer in checkpoint.layers:
                hit = any(t == "Linear" or matches(layer.name, t) for t in _targets(apply))
                left = any(matches(layer.name, str(t)) for t in apply.get("ignore") or [])
                if hit and not left:
                    yield name, scheme, layer


def _sound(size: Any) -> bool:
    return size is None or (isinstance(size, int) and size > 0)
