"""Rules about names: which layers a configuration speaks of, and who understands it alike."""

from __future__ import annotations

from collections.abc import Iterator

from prismquant.check.checkpoint import CheckedLayer, Checkpoint
from prismquant.check.findings import Problem, gathered
from prismquant.formats.section import SchemeGroup, Targets, groups_by_name

# Classes that a target may name although no linear layer has one.
_OTHER_CLASSES = ("Attention", "Embedding")


def overlap(checkpoint: Checkpoint) -> list[Problem]:
    """Layers that several groups with different schemes name."""
    found = []
    for layer in checkpoint.layers:
        groups = groups_by_name(layer.called, checkpoint.read)
        if len({group.scheme for group in groups}) > 1:
            names = " and ".join(group.name for group in groups)
            remedy = "name each layer in one group: readers break ties differently"
            found.append((f"{names} both target the same layer", layer.called, remedy))
    return gathered(found)


def unmatched_targets(checkpoint: Checkpoint) -> list[Problem]:
    """Targets that match no layer."""
    remedy = "use the module paths of transformers, e.g. model.language_model.layers.0.mlp.up_proj"
    names = {layer.called for layer in checkpoint.layers}
    return gathered(
        (f"targets of {group.name} match no layer", target, remedy)
        for group in checkpoint.groups
        for target in _unmet(checkpoint, group.targets, names)
    )


def unmatched_ignores(checkpoint: Checkpoint) -> list[Problem]:
    """Ignores that match no layer: often one under a name of another version."""
    return gathered(
        (
            "entries of ignore match nothing in the model",
            pattern,
            "use the module paths of transformers, e.g. model.visual.blocks.0.attn.qkv",
        )
        for pattern in _unmet(checkpoint, checkpoint.ignore, _modules(checkpoint))
    )


def uncovered(checkpoint: Checkpoint) -> list[Problem]:
    """Linear layers of which the configuration does not speak."""
    if not checkpoint.groups:
        return []
    by_class = any("Linear" in group.targets.names for group in checkpoint.groups)
    remedy = "list it in ignore, so that no reader takes it for quantized"
    return gathered(
        ("layers are neither targeted nor ignored", layer.called, remedy)
        for layer in checkpoint.layers
        if not by_class
        and not groups_by_name(layer.called, checkpoint.read)
        and not checkpoint.ignore.meets(layer.called, checkpoint.matcher)
    )


def plain_in_vllm(checkpoint: Checkpoint) -> list[Problem]:
    """Quantized layers of parts that vLLM builds in floating point."""
    names = None if checkpoint.model is None else checkpoint.model.arch.vllm
    return gathered(
        (
            "vLLM builds this part in floating point, and has no place for codes and scales",
            layer.called,
            "skip it in the recipe, as presets for the language model alone do",
        )
        for layer in checkpoint.layers
        if names is not None
        and layer.group is not None
        and layer.site is not None
        and names.builds_plain(layer.site.name)
    )


def misread_by_vllm(checkpoint: Checkpoint) -> list[Problem]:
    """Layers whose group vLLM does not find, or finds another one for."""
    found = []
    for layer in checkpoint.layers:
        if layer.in_vllm is None or layer.in_vllm.torn:
            continue
        ours, theirs = layer.in_transformers, layer.in_vllm.group
        # Where the layer is in floating point indeed, transformers is the one that misreads.
        right = layer.in_vllm.group is None and not _in_codes(checkpoint, layer)
        if _name(ours) != _name(theirs) and not right and not _torn_by_schemes(checkpoint, layer):
            remedy = (
                "vLLM renames plain paths, not patterns: list explicit paths, or write a pattern "
                "that fits both names, e.g. re:.*visual.*"
            )
            found.append(
                (f"{_apart(theirs, ours)}: it knows them by other names", layer.called, remedy)
            )
    return gathered(found)


def misread_by_transformers(checkpoint: Checkpoint) -> list[Problem]:
    """The same, for whom transformers is the one that misreads what is stored."""
    found = []
    for layer in checkpoint.layers:
        if layer.in_transformers is not None and not _in_codes(checkpoint, layer):
            what = "transformers takes layers for quantized that are stored in floating point"
            remedy = "ignore them by the module paths of transformers (model.visual..., lm_head)"
            found.append((what, layer.called, remedy))
    return gathered(found)


def unknown_to_vllm(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Architectures that vLLM does not have."""
    model = checkpoint.model
    if model is not None and all(layer.in_vllm is None for layer in checkpoint.layers):
        yield Problem(
            f"vLLM 0.33 has no model class for {model.arch.title}",
            ("config.json",),
            "serve it with transformers or prismquant.load",
        )


def _in_codes(checkpoint: Checkpoint, layer: CheckedLayer) -> bool:
    """Whether the tensors of a layer are those of a quantized one."""
    suffixes = ("weight_packed", "weight_scale")
    return any(f"{layer.disk}.{suffix}" in checkpoint.tensors for suffix in suffixes)


def _unmet(checkpoint: Checkpoint, targets: Targets, names: set[str]) -> list[str]:
    """Entries that are none of these names, and fit none."""
    return [
        target
        for target in targets
        if target != "Linear" and not target.endswith(_OTHER_CLASSES) and target not in names
        if not target.startswith("re:")
        or not any(checkpoint.matcher.matches(name, target) for name in names)
    ]


def _modules(checkpoint: Checkpoint) -> set[str]:
    """All layers and all modules with a parameter, by both of their names; and what is carried."""
    model = checkpoint.model
    if model is None:
        return set()
    names = {*model.shapes, *(model.names.to_disk(name) for name in model.shapes), *model.carried}
    called = {layer.called for layer in checkpoint.layers}
    return called | {name.rpartition(".")[0] for name in names}


def _name(group: SchemeGroup | None) -> str | None:
    return None if group is None else group.name


def _apart(theirs: SchemeGroup | None, ours: SchemeGroup | None) -> str:
    """Words on layers that vLLM and transformers take for different things."""
    if theirs is None:
        return "vLLM takes layers for floating point that transformers takes for quantized"
    if ours is None:
        return "vLLM takes layers for quantized that transformers takes for floating point"
    return f"vLLM gives layers the scheme of {theirs.name} that have that of {ours.name}"


def _torn_by_schemes(checkpoint: Checkpoint, layer: CheckedLayer) -> bool:
    """Whether the fused neighbours disagree already, which another rule tells."""
    if layer.fuse_key is None:
        return False
    groups = {
        one.in_transformers and one.in_transformers.name
        for one in checkpoint.layers
        if one.fuse_key == layer.fuse_key
    }
    return len(groups) > 1
