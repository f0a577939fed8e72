"""Transforms of ours as modifiers of llm-compressor: SpinQuant, SmoothQuant, AWQ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prismquant.models.arch import EdgeKind, Modality
from prismquant.recipe.exporters.export_task import ExportTask
from prismquant.recipe.exporters.written_names import NameEnding, endings, expressions
from prismquant.recipe.exporters.written_scope import WrittenEdge, WrittenLayer
from prismquant.recipe.match import Match
from prismquant.recipe.transform_rule import TransformRule

Fields = dict[str, Any]

# What the tool finds by itself, as our criteria.
_FOUND = {
    "smoothquant": Match(modality=(Modality.LLM,), role=("attn.qkv", "mlp.gate", "mlp.up")),
    "awq": Match(modality=(Modality.LLM,), role=("attn", "mlp")),
}


# Its own mappings know the embedding, and no projector.
_BLIND = (
    "of a model that sees, the embeddings are rotated there and what a projector adds to them is "
    "not, which breaks it: give `mappings` that know it, or use it on text alone"
)


def transform_modifiers(task: ExportTask) -> list[tuple[str, Fields]]:
    """Modifiers of all transforms, rotations first, with notes on them."""
    found: list[tuple[str, Fields]] = []
    keys = task.recipe.kv_cache is not None and task.recipe.kv_cache_settings[0].rotated
    rotations = [
        (index, rule)
        for index, rule in enumerate(task.recipe.transforms)
        if rule.name == "rotation"
    ]
    for index, rule in rotations:
        found += _rotation(task, task.ledger.places.of_transform(index), rule, keys)
        keys = False
    if keys:
        found.append(("SpinQuantModifier", {"rotations": ["R3"]}))
    for index, rule in enumerate(task.recipe.transforms):
        place = task.ledger.places.of_transform(index)
        if rule.name == "split":
            why = "no column is kept in floating point there"
            task.ledger.dropped(place, rule.name, why, "SpinQuantModifier: random-hadamard")
        elif rule.name != "rotation":
            found += _scaled(task, place, rule)
    return found


def _rotation(
    task: ExportTask, place: str, rule: TransformRule, keys: bool
) -> list[tuple[str, Fields]]:
    options: Any = rule.build()
    ledger = task.ledger
    towers = rule.match.modality or tuple(
        Modality(one) for one in dict.fromkeys(layer.modality for layer in task.scope.layers)
    )
    others = [one.value for one in towers if one == Modality.VISION]
    if others:
        ledger.dropped(f"{place}.match", others, "only language models are rotated there")
    if Modality.LLM not in towers:
        return []
    parts = {"R1": options.residual, "R2": options.values, "R3": keys, "R4": options.online}
    rotations = [name for name, wanted in parts.items() if wanted]
    kind = "random-matrix" if options.kind == "random" else "random-hadamard"
    if options.kind == "hadamard" and not options.signs:
        kind = "hadamard"
    body: Fields = {"rotations": rotations, "transform_type": kind}
    told = f"SpinQuantModifier: {', '.join(rotations)}, {kind}"
    if options.residual and any(one.modality != Modality.LLM for one in task.scope.layers):
        ledger.changed(place, rule.name, told, _BLIND)
    else:
        ledger.written(place, rule.name, told)
    if options.kind == "random" and options.online and not options.signs:
        ledger.changed(f"{place}.options.signs", False, kind, "R4 is drawn like R1 there")
    if options.online_block is not None:
        block = options.online_block
        if options.residual or options.values:
            why = "R1 and R2 would be in blocks as well there"
            ledger.dropped(f"{place}.options.online_block", block, why, "transform_block_size")
        else:
            body["transform_block_size"] = block
            told = f"transform_block_size: {block}"
            ledger.written(f"{place}.options.online_block", block, told)
    elif options.online:
        why = "of the whole width there, in blocks of up to 1024 here"
        ledger.changed(f"{place}.options.online", True, "rotations: R4", why)
    if options.seed:
        ledger.dropped(f"{place}.options.seed", options.seed, "the modifier has no seed")
    return [("SpinQuantModifier", body)]


def _scaled(task: ExportTask, place: str, rule: TransformRule) -> list[tuple[str, Fields]]:
    """A modifier that moves scale along edges."""
    edges = _kept(task, place, rule)
    if not edges:
        task.ledger.dropped(place, rule.name, "no edge that it means is known there")
        return []
    options: Any = rule.build()
    body: Fields
    if rule.name == "smoothquant":
        name, body, known = "SmoothQuantModifier", _strength(task, place, options), {"alpha"}
        known |= {"search"}
    else:
        name = "AWQModifier"
        body = {"n_grid": options.grid, "duo_scaling": "both" if options.duo else False}
        known = {"grid", "duo"}
        told = f"n_grid: {options.grid}, duo_scaling: {body['duo_scaling']}"
        task.ledger.written(place, rule.name, f"{name}: {told}")
    for key, value in rule.options.items():
        if key not in known:
            task.ledger.dropped(f"{place}.options.{key}", value, "the modifier has no such key")
    if edges != task.edges(_FOUND[rule.name]):
        body["mappings"] = _mappings(task, edges, rule.name)
        task.ledger.written(f"{place}.match", _said(rule), f"mappings: {len(body['mappings'])}")
    elif "match" in rule.model_fields_set:
        task.ledger.written(f"{place}.match", _said(rule), "mappings by the architecture")
    return [(name, body)]


def _said(rule: TransformRule) -> Fields:
    return rule.match.model_dump(mode="json", exclude_unset=True)


def _strength(task: ExportTask, place: str, options: Any) -> Fields:
    alpha = 0.5 if options.alpha is None else options.alpha
    told = f"SmoothQuantModifier: smoothing_strength: {alpha:.15g}"
    if options.searches:
        why = "no strength is searched there"
        task.ledger.changed(place, "smoothquant, its strength searched", told, why)
    else:
        why = "of the largest less the smallest value of a channel there"
        task.ledger.changed(place, f"smoothquant, alpha {alpha:.15g}", told, why)
    return {"smoothing_strength": alpha}


def _kept(task: ExportTask, place: str, rule: TransformRule) -> list[WrittenEdge]:
    """Edges that a transform means and the tool can name, with notes on the others."""
    kept = []
    for edge in task.edges(rule.match):
        why = ""
        if edge.modality == Modality.PROJECTOR:
            why = "channels of the norm feed several columns, which is not known there"
        elif edge.fused:
            why = "a part of a fused layer cannot be named there"
        elif edge.kind == EdgeKind.VALUE and rule.name == "smoothquant":
            why = "values that several heads share are not known there"
        if why:
            ends = f"{edge.source} -> {', '.join(edge.consumers)}"
            task.ledger.dropped(f"{place}.match", ends, why)
        else:
            kept.append(edge)
    return kept


def _mappings(task: ExportTask, edges: Iterable[WrittenEdge], name: str) -> list[Any]:
    """Edges in the words of the tool, those that read alike written once."""
    found: dict[str, list[Any] | Fields] = {}
    for consumers, source in _named(task, list(edges)):
        if name == "smoothquant":
            found.setdefault(str((consumers, source)), [consumers, source])
        else:
            body = {"smooth_layer": source, "balance_layers": consumers}
            found.setdefault(str((consumers, source)), body)
    return list(found.values())


def _named(task: ExportTask, edges: list[WrittenEdge]) -> Iterable[tuple[list[str], str]]:
    """Expressions of both ends of each edge: the shortest that mean no other end or layer."""
    ends: dict[str, str] = {layer.path: layer.path for layer in task.scope.layers}
    for edge in task.scope.edges:
        ends |= {path: path for path in (edge.source, *edge.consumers)}
    kinds: dict[str, set[str]] = {}
    for edge in edges:
        tail = ".".join(edge.source.rsplit(".", 1)[-1:])
        for path in (edge.source, *edge.consumers):
            kinds.setdefault(path, set()).add(f"{edge.modality} {tail}")
    settings = {
        WrittenLayer(path, "", "", path): ", ".join(sorted(kinds.get(path, ()))) for path in ends
    }
    by_path: dict[str, NameEnding] = {}
    for setting, found in endings(settings).items():
        own = [layer.path for layer, one in settings.items() if one == setting]
        for path in own:
            fitting = [one for one in found if path.split(".")[-len(one.parts) :] == [*one.parts]]
            by_path[path] = fitting[0]
    for edge in edges:
        consumers = [f"re:{one}$" for one in expressions(by_path[end] for end in edge.consumers)]
        [source] = expressions([by_path[edge.source]])
        yield consumers, f"re:{source}$"
