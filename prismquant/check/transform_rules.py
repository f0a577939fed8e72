"""Rules about transforms at run time, such as the rotation of a layer's input."""

from __future__ import annotations

from collections.abc import Iterator

from prismquant.check.checkpoint import CheckedLayer, Checkpoint
from prismquant.check.findings import Problem, gathered
from prismquant.formats.section import DeclaredTransform

_OF_ATTENTION = ("k_cache", "q_attn")
_ONLINE = ("input", "output", "k_cache", "q_attn")
_LARGEST = 1 << 15


def sizes(checkpoint: Checkpoint) -> list[Problem]:
    """Widths that do not fit the layer."""
    found = []
    for transform, layer in _rotated(checkpoint):
        size = transform.head_dim or layer.in_features
        if layer.in_features % size:
            what = f"blocks of {size} do not divide {layer.in_features} input features"
            remedy = "choose a head_dim that divides it"
            found.append((f"{transform.name}: {what}", layer.called, remedy))
    return gathered(found)


def kernel_sizes(checkpoint: Checkpoint) -> list[Problem]:
    """Widths that vLLM's kernel does not have."""
    remedy = "use a power of two up to 32768, or fold the rotation into the weights"
    return gathered(
        (f"vLLM rotates blocks of a power of two only, not of {size}", layer.called, remedy)
        for transform, layer in _rotated(checkpoint)
        if (size := transform.head_dim or layer.in_features) & (size - 1) or size > _LARGEST
    )


def biased(checkpoint: Checkpoint) -> list[Problem]:
    """Layers with a bias, before which vLLM cannot rotate."""
    remedy = "serve it with prismquant.load, or rotate offline only"
    return gathered(
        ("vLLM cannot rotate the input of a layer with a bias", layer.called, remedy)
        for _, layer in _rotated(checkpoint)
        if layer.site is not None and layer.site.has_bias
    )


def unmatched(checkpoint: Checkpoint) -> list[Problem]:
    """Targets that match no layer, or no attention where it is about keys and queries."""
    linears = [one.name for one in checkpoint.layers]
    attentions = {name.rpartition(".")[0] for name in linears if name.endswith(".k_proj")}
    remedy = "write a pattern that ends like the layer's path, e.g. re:(.*[.])?mlp[.]down_proj$"
    return gathered(
        (f"targets of transform {transform.name} match no layer", target, remedy)
        for transform in checkpoint.read.transforms
        for apply in transform.applies
        for target in apply.targets
        for names in (attentions if apply.location in _OF_ATTENTION else linears,)
        if target != "Linear"
        and not any(checkpoint.matcher.matches(name, target) for name in names)
    )


def one_gpu(checkpoint: Checkpoint) -> list[Problem]:
    """Rotations over several GPUs."""
    remedy = "serve it on one GPU, or fold the rotation into the weights"
    return gathered(
        ("vLLM rotates inputs without tensor parallelism only", layer.called, remedy)
        for _, layer in _rotated(checkpoint)
    )


def in_transformers(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Transforms, of which transformers makes nothing."""
    names = tuple(
        transform.name
        for transform in checkpoint.read.transforms
        if any(apply.location in _ONLINE for apply in transform.applies)
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
    for transform, layer in _rotated(checkpoint):
        size = transform.head_dim or layer.in_features
        places, name = (layer, *together.get(layer.name, ())), transform.name
        stored = (checkpoint.tensors.get(f"{one.disk}.{name}_input.weight") for one in places)
        info = next((one for one in stored if one is not None), None)
        if info is None:
            what = f"the matrix of transform {name} is missing"
            found.append((what, layer.disk, f"store it as {name}_input.weight beside the layer"))
        elif info.shape != (size, size):
            what = f"the matrix of transform {name} is {list(info.shape)}, not {[size, size]}"
            found.append((what, layer.disk, "write the matrix of head_dim rows and columns"))
    return gathered(found)


def _rotated(checkpoint: Checkpoint) -> Iterator[tuple[DeclaredTransform, CheckedLayer]]:
    """Transforms of inputs, with the layers that they match."""
    for transform in checkpoint.read.transforms:
        for apply in transform.applies:
            if apply.location != "input":
                continue
            for layer in checkpoint.layers:
                names = (layer.name,)
                hit = apply.targets.hit(names, checkpoint.matcher)
                if hit and not apply.ignore.meets(layer.name, checkpoint.matcher):
                    yield transform, layer
