"""Solvers, range rules and transforms as algorithms of ModelOpt's calibration.

The tool has one list of algorithms for all layers: what most layers ask for is written. The inverse
of :mod:`prismquant.recipe.importers.calibration_algorithms`.
"""

from __future__ import annotations

from typing import Any

from prismquant.algorithms.methods import build_solver
from prismquant.numerics.kinds import Granularity
from prismquant.numerics.rules import RangeRule
from prismquant.recipe.exporters.export_ledger import WorkNotes
from prismquant.recipe.exporters.export_task import ExportTask
from prismquant.recipe.exporters.layer_work import LayerWork
from prismquant.recipe.exporters.written_gptq import damping, refined
from prismquant.recipe.match import Match
from prismquant.recipe.transform_rule import TransformRule

Fields = dict[str, Any]

_SHARED = "all layers have one algorithm there: that of most"
_CLIP = RangeRule("mse", max_shrink=0.5, steps=10, norm=2.0, signed_scale=False)


def algorithms_of(task: ExportTask) -> tuple[Any, bool]:
    """The value of ``algorithm``, and whether scales are chosen by a search."""
    kinds = task.counted(lambda _: True)
    if not kinds:
        for index, rule in enumerate(task.recipe.transforms):
            task.ledger.dropped(
                task.ledger.places.of_transform(index), rule.name, "no layer is quantized"
            )
        return "max", False
    usual = kinds[0][0]
    method, searched = _method(task.notes(usual), usual, quiet=False)
    for work, _ in kinds[1:]:
        own, _ = _method(task.notes(work), work, quiet=True)
        if own == method:
            _method(task.notes(work), work, quiet=False)
        else:
            _note_other(task.notes(work), work, method)
    before = [
        one
        for index, rule in enumerate(task.recipe.transforms)
        if (one := _transform(task, task.ledger.places.of_transform(index), rule)) is not None
    ]
    return _joined(before, method), searched


def _joined(before: list[Fields], method: Fields) -> Any:
    """One algorithm, or a list of them; a search of scales and one of clips are one there."""
    if before and before[-1]["method"] == "awq_lite" and method["method"] == "awq_clip":
        both = before[-1] | method | {"method": "awq_full"}
        return [*before[:-1], both] if before[:-1] else both
    if before and method == {"method": "max"}:
        return before if len(before) > 1 else before[0]
    return [*before, method] if before else method


def _method(notes: WorkNotes, work: LayerWork, quiet: bool) -> tuple[Fields, bool]:
    """The algorithm of a layer, and whether it searches scales; with notes, unless quiet."""
    config, rule = work.config, work.config.weight_range
    options: Any = build_solver(config.solver, config.options)
    if config.solver == "gptq":
        return _gptq(notes, options, rule, quiet), False
    found, why = _range_algorithm(options.scale_weighting, rule)
    if config.weights is not None and config.weights.scale.startswith("e8m0"):
        # Powers of two are taken from each block while the model runs.
        why = "" if rule.kind == "minmax" else "scales hold every value there"
        found = {"method": "max"}
    if not quiet:
        notes.written("solver", "rtn", f"algorithm: {found['method']}")
        notes.either("weight_range", _range_value(rule), f"algorithm: {_told(found)}", why)
        if notes.said("options.scale_weighting"):
            same = rule.kind == "minmax" or (
                (options.scale_weighting == "group") == (found["method"] in _WEIGHED)
                and options.scale_weighting != "diagonal"
            )
            other = "" if same else "no search there weighs columns so"
            told = f"algorithm: {found['method']}"
            notes.either("options.scale_weighting", options.scale_weighting, told, other)
    return found, found["method"] in ("mse", "local_hessian")


_WEIGHED = ("awq_clip", "local_hessian")


def _range_algorithm(weighting: str, rule: RangeRule) -> tuple[Fields, str]:
    """The algorithm of a range rule, and how it differs."""
    weighed = weighting != "none"
    signed = "scales have no sign there" if rule.signed_scale else ""
    if rule.kind == "minmax":
        return {"method": "max"}, ""
    if rule.kind == "four_over_six":
        multipliers = {"start_multiplier": 1.0, "stop_multiplier": 1.5, "step_size": 0.5}
        return {"method": "mse", "fp8_scale_sweep": False} | multipliers, ""
    if rule.kind == "sweep":
        name = "local_hessian" if weighed else "mse"
        return {"method": name, "fp8_scale_sweep": True}, signed
    why = signed
    if rule.kind != "mse":
        rule, why = _CLIP, f"there is no {rule.kind}; errors are searched"
    elif rule.norm != 2:
        why = "; ".join(filter(None, (why, "errors are squared there")))
    if weighed:
        shrink = min(rule.max_shrink, 0.99)
        step = shrink / rule.steps
        clip = {"min_clip_ratio": _tidy(1 - shrink), "shrink_step": _tidy(step)}
        return {"method": "awq_clip"} | clip, why
    shrink = min(rule.max_shrink, 0.99)
    step = shrink / (rule.steps - 1)
    bounds = {"start_multiplier": _tidy(1 - shrink), "stop_multiplier": 1.0}
    return {"method": "mse"} | bounds | {"step_size": _tidy(step)}, why


def _tidy(value: float) -> float:
    """A number without the dust of its last digits."""
    return round(value, 12)


def _range_value(rule: RangeRule) -> Any:
    if rule.kind != "mse":
        return rule.kind
    return {key: getattr(rule, key) for key in ("kind", "max_shrink", "steps", "norm")}


def _told(found: Fields) -> str:
    return ", ".join(f"{key}: {value}" for key, value in found.items())


def _gptq(notes: WorkNotes, options: Any, rule: RangeRule, quiet: bool) -> Fields:
    found: Fields = {"method": "gptq", "block_size": options.block_size}
    if quiet:
        mean = options.damping_basis == "mean" or not options.damping
        return found | {"perc_damp": float(options.damping) if mean else 0.01}
    notes.written("solver", "gptq", "algorithm: gptq")
    notes.written("options.block_size", options.block_size, f"block_size: {options.block_size}")
    found["perc_damp"] = damping(notes, options, "perc_damp")
    why = "" if options.order == "original" else "columns are taken in their own order there"
    notes.either("options.order", options.order, "algorithm: gptq", why)
    refined(notes, options)
    searched = "" if rule.kind == "minmax" else "ranges hold every value there"
    notes.either("weight_range", _range_value(rule), "algorithm: gptq", searched)
    if notes.said("options.scale_weighting"):
        notes.written("options.scale_weighting", options.scale_weighting, "no range is searched")
    return found


def _note_other(notes: WorkNotes, work: LayerWork, method: Fields) -> None:
    """Note a layer that asks for another algorithm than most."""
    told = f"algorithm: {method['method']}"
    notes.changed("solver", work.config.solver, told, _SHARED)
    notes.changed("weight_range", _range_value(work.config.weight_range), told, _SHARED)
    for name in sorted({"scale_weighting", *work.config.options}):
        if notes.said(f"options.{name}"):
            value = work.config.options.get(name)
            notes.changed(f"options.{name}", value, told, _SHARED)


def _transform(task: ExportTask, place: str, rule: TransformRule) -> Fields | None:
    """An algorithm that scales inputs; None for other transforms, which are dropped."""
    if rule.name in ("rotation", "split"):
        nearest = "rotate: true, of an input quantizer" if rule.name == "rotation" else ""
        task.ledger.dropped(place, rule.name, "no model is changed there", nearest)
        return None
    options: Any = rule.build()
    if rule.name == "smoothquant" and not _smoothed_there(task):
        why = "layers there must have int8 weights, and static int8 inputs of the tensor or none"
        task.ledger.dropped(place, rule.name, why, "algorithm: awq_lite")
        return None
    if rule.name == "awq" and _by_token(task):
        why = "no layer there may have inputs with a scale for each token"
        task.ledger.dropped(place, rule.name, why, "activations: int8-tensor")
        return None
    if rule.name == "smoothquant":
        alpha = 0.5 if options.alpha is None else options.alpha
        found: Fields = {"method": "smoothquant", "alpha": alpha}
        known = {"alpha", "search"}
        why = "no strength is searched there" if options.searches else _OF_EACH
    else:
        found = {"method": "awq_lite", "alpha_step": _tidy(1 / options.grid)}
        known = {"grid", "duo"}
        why = _OF_EACH if options.duo else f"{_OF_EACH}; the weight term counts always there"
    task.ledger.changed(place, rule.name, f"algorithm: {_told(found)}", why)
    for key, value in rule.options.items():
        if key not in known:
            task.ledger.dropped(f"{place}.options.{key}", value, "the algorithm has no such key")
    said = rule.match.model_dump(mode="json", exclude_unset=True)
    if task.edges(rule.match) != task.edges(Match()):
        why = "inputs of every quantized layer are scaled there"
        task.ledger.changed(f"{place}.match", said, "all layers", why)
    elif said:
        task.ledger.written(f"{place}.match", said, "all layers")
    return found


def _by_token(task: ExportTask) -> bool:
    """Whether any layer's input is written with a scale for each token."""
    inputs = [work.config.activations for work, _ in task.counted(lambda _: True)]
    return any(one is not None and one.dynamic and one.scale == "float" for one in inputs)


def _smoothed_there(task: ExportTask) -> bool:
    """Whether every layer has formats that the tool's SmoothQuant does not stumble over."""
    configs = [work.config for work, _ in task.counted(lambda _: True)]
    with_inputs = [one for one in configs if one.activations is not None]
    return bool(with_inputs) and all(
        one.weights is not None
        and one.activations is not None
        and one.weights.kind == one.activations.kind == "int"
        and one.weights.bits == one.activations.bits == 8
        and one.activations.granularity == Granularity.TENSOR
        for one in with_inputs
    )


_OF_EACH = "of each layer there; one for all layers of one input here"
