"""Recipes of ours as those of MI-optimize: one algorithm with its arguments, in YAML.

The tool knows language models, and has one setting for all of their layers: that of most is
written, and the other layers are left in floating point, so that none gets fewer bits than asked.
"""

from __future__ import annotations

import json
from typing import Any

from prismquant.algorithms.methods import build_solver
from prismquant.errors import RecipeError
from prismquant.models.arch import Modality
from prismquant.numerics.rules import RangeRule
from prismquant.recipe.exporters.export_ledger import ExportLedger, WorkNotes, note_fallback
from prismquant.recipe.exporters.export_task import ExportTask, note_alike, note_calibration
from prismquant.recipe.exporters.layer_work import LayerWork
from prismquant.recipe.exporters.written_gptq import damping, refined
from prismquant.recipe.exporters.written_integers import input_arguments, weight_arguments
from prismquant.recipe.exporters.written_names import endings, expressions
from prismquant.recipe.exporters.written_scope import WrittenLayer
from prismquant.recipe.match import Match
from prismquant.recipe.plain_yaml import write_yaml
from prismquant.recipe.transform_rule import TransformRule

Fields = dict[str, Any]

_LLM = Match(modality=(Modality.LLM,))
_FIRST = {"awq": "awq", "smoothquant": "smoothquant", "rotation": "spinquant"}
# The search of clips there: to one half, in ten steps, by squared errors.
_CLIP = RangeRule("mse", max_shrink=0.5, steps=10, norm=2.0, signed_scale=False)
_DATA = {"name": "wikitext2", "split": "train"}


def write(task: ExportTask) -> str:
    """A recipe as YAML that MI-optimize takes.

    Raises:
        RecipeError: Nothing of it can be said there.
    """
    first, transform = _transforms(task)
    arguments: dict[LayerWork, str] = {}
    for work, _ in task.counted(_is_language):
        # Notes of a work count only once it is known which one is written.
        notes = WorkNotes(ExportLedger(task.ledger.places), work)
        made = _arguments(notes, work, first)
        if made is not None:
            arguments[work] = json.dumps(made)
    counts: dict[str, int] = {}
    for work, count in task.counted(_is_language):
        if work in arguments:
            counts[arguments[work]] = counts.get(arguments[work], 0) + count
    if not counts:
        raise RecipeError(
            "nothing of the recipe can be said in the words of mi-optimize",
            where=task.recipe.name,
            remedy="it quantizes language models, to integers of 2 to 8 bits",
        )
    chosen = max(counts, key=counts.__getitem__)
    for work, _ in task.counted(lambda _: True):
        _note(task, work, first, arguments.get(work) == chosen)
    algo, kwargs = json.loads(chosen)
    kwargs |= transform
    kwargs["skip_layers"] = _skipped(task, {w for w, one in arguments.items() if one == chosen})
    calibration = task.recipe.calibration
    for name in ("block_sequential", "layer_sequential"):
        kwargs[name] = getattr(calibration, name)
    if task.recipe.kv_cache is not None:
        spec, _ = task.recipe.kv_cache_settings
        task.ledger.dropped("kv_cache", spec.name, "no cache is quantized there")
    note_alike(task)
    _note_calibration(task)
    data = _DATA | {"nsamples": calibration.samples, "seed": calibration.seed}
    task.ledger.guessed("calibrate_config names wikitext2: put your own set there")
    body = {"algo": algo, "kwargs": kwargs, "calibrate_config": data}
    return write_yaml({"quant_config": body})


def _is_language(layer: WrittenLayer) -> bool:
    return layer.modality == Modality.LLM


def _arguments(notes: WorkNotes, work: LayerWork, first: str) -> tuple[str, Fields] | None:
    """Algorithm and arguments of a layer; None where its weights cannot be said."""
    config = work.config
    assert config.weights is not None
    options: Any = build_solver(config.solver, config.options)
    clipped = options.scale_weighting == "group" and config.weight_range == _CLIP
    algo = first if config.solver == "rtn" else f"{first}+gptq" if first else "gptq"
    if config.solver == "rtn" and not first:
        algo = "awq" if clipped else "rtn"
    weights = weight_arguments(notes, config.weights, algo)
    if weights is None:
        return None
    inputs = input_arguments(notes, config.activations, algo)
    fields = weights | inputs | _outputs(notes, work, algo, inputs)
    told = f"algo: {algo}"
    notes.written("solver", config.solver, told)
    if config.solver == "gptq":
        fields |= _gptq(notes, options)
    elif algo == "awq":
        fields |= {"auto_scale": bool(first), "auto_clip": clipped}
    _note_range(notes, work, algo, clipped)
    note_fallback(notes, "a group that does not fit is an error there")
    return algo, fields


def _outputs(notes: WorkNotes, work: LayerWork, algo: str, inputs: Fields) -> Fields:
    outputs, smooth = work.config.outputs, algo.startswith("smoothquant")
    if outputs is None:
        if notes.said("outputs"):
            notes.written("outputs", "none", "quant_out: false")
        return {"quant_out": False} if smooth else {}
    if smooth and outputs == work.config.activations and inputs["a_dtype"] != "float16":
        notes.written("outputs", outputs.name, "quant_out: true")
        return {"quant_out": True}
    why = "outputs are quantized like inputs there" if smooth else f"{algo} quantizes none there"
    notes.dropped("outputs", outputs.name, why, "algo: smoothquant, quant_out: true")
    return {"quant_out": False} if smooth else {}


def _gptq(notes: WorkNotes, options: Any) -> Fields:
    fields: Fields = {
        "blocksize": options.block_size,
        "percdamp": damping(notes, options, "percdamp"),
    }
    fields["actorder"] = options.order != "original"
    notes.written("options.block_size", options.block_size, f"blocksize: {options.block_size}")
    why = "sorted by the diagonal alone there" if options.order == "pivot" else ""
    notes.either("options.order", options.order, f"actorder: {fields['actorder']}", why)
    refined(notes, options)
    return fields


def _note_range(notes: WorkNotes, work: LayerWork, algo: str, clipped: bool) -> None:
    """Note how ranges are chosen."""
    rule, weighting = work.config.weight_range, "options.scale_weighting"
    value = rule.kind if rule.kind != "mse" else {"kind": "mse", "max_shrink": rule.max_shrink}
    done = clipped and algo == "awq"
    told = "auto_clip: true" if done else f"algo: {algo}"
    why = "" if done or rule.kind == "minmax" else "ranges hold every value there"
    notes.either("weight_range", value, told, why)
    if notes.said(weighting):
        given = build_solver(work.config.solver, work.config.options).scale_weighting  # type: ignore[attr-defined]
        notes.either(weighting, given, told, why)
    if work.config.static_input or work.config.static_output:
        kind = work.config.activation_range.kind
        why = "" if kind == "minmax" else "the range holds every value there"
        notes.either("activation_range", kind, "quantization_type: static", why)


def _note(task: ExportTask, work: LayerWork, first: str, chosen: bool) -> None:
    """Note one kind of work: as it is written, or that its layers stay in floating point."""
    notes = task.notes(work)
    layers = [layer for layer, one in task.work.items() if one == work]
    if chosen and any(_is_language(layer) for layer in layers):
        _arguments(notes, work, first)
    others = [layer for layer in layers if not _is_language(layer)]
    spec = work.config.weights
    assert spec is not None
    if others:
        told = ", ".join(dict.fromkeys(layer.modality for layer in others))
        why = f"language models alone are known there, {told} is left in floating point"
        notes.dropped("weights", spec.name, why)
    elif not chosen:
        why = "all layers have one setting there, that of most; these are left in floating point"
        notes.dropped("weights", spec.name, why, "skip_layers")


def _skipped(task: ExportTask, chosen: set[LayerWork]) -> list[str]:
    """Expressions of the language model's layers that do not get the setting."""
    settings = {layer: work in chosen for layer, work in task.work.items() if _is_language(layer)}
    return expressions(endings(settings).get(False, []))


def _transforms(task: ExportTask) -> tuple[str, Fields]:
    """First part of the algorithm's name, and the arguments of the transform."""
    name, fields = "", {}
    for index, rule in enumerate(task.recipe.transforms):
        place = task.ledger.places.of_transform(index)
        if rule.name not in _FIRST:
            task.ledger.dropped(place, rule.name, "no column is kept in floating point there")
        elif name:
            task.ledger.dropped(place, rule.name, "there is one transform, the first")
        elif not any(_is_language(layer) for layer in _meant(task, rule)):
            task.ledger.dropped(place, rule.name, "language models alone are known there")
        else:
            name, fields = _FIRST[rule.name], _note_transform(task, place, rule)
    return name, fields


def _meant(task: ExportTask, rule: TransformRule) -> list[WrittenLayer]:
    return [layer for layer in task.work if rule.match.means(layer)]


def _note_transform(task: ExportTask, place: str, rule: TransformRule) -> Fields:
    options: Any = rule.build()
    fields: Fields = {}
    known = {"alpha", "search"} if rule.name == "smoothquant" else {"grid", "duo"}
    why = "of each layer there; one for all layers of one input here"
    told = f"algo: {_FIRST[rule.name]}"
    if rule.name == "smoothquant":
        fields = {"alpha": 0.5 if options.alpha is None else options.alpha}
        told += f", alpha: {fields['alpha']:.15g}"
        why = "no strength is searched there" if options.searches else why
    elif rule.name == "awq" and (options.grid != 20 or not options.duo):
        why += "; 20 steps of the exponent there"
    elif rule.name == "rotation":
        known, why = set(), "its matrices are learned there"
    task.ledger.changed(place, rule.name, told, why)
    for key, value in rule.options.items():
        if key not in known:
            task.ledger.dropped(f"{place}.options.{key}", value, "the algorithm has no such key")
    said = rule.match.model_dump(mode="json", exclude_unset=True)
    alike = task.edges(rule.match) == task.edges(_LLM) or rule.name == "rotation"
    if not alike:
        why = "inputs of every layer of the language model are scaled there"
        task.ledger.changed(f"{place}.match", said, "all layers", why)
    elif said:
        task.ledger.written(f"{place}.match", said, "the language model")
    return fields


def _note_calibration(task: ExportTask) -> None:
    calibration = task.recipe.calibration
    theirs = {
        name: getattr(calibration, name)
        for name in ("samples", "seed", "block_sequential", "layer_sequential")
    } | {"quantized_inputs": True}
    told = {name: f"{name}: {value}" for name, value in theirs.items()}
    told |= {"samples": f"nsamples: {calibration.samples}", "quantized_inputs": ""}
    note_calibration(task, theirs, told)
