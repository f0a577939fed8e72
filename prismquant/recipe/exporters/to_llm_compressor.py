"""Recipes of ours as recipes of llm-compressor: one stage of modifiers, in YAML.

Layers are told apart by what is done to them: a modifier for each method, and within it a group for
each format. Targets are expressions of whole paths, and no two of them mean one layer, because the
tool's own order of targets is another than ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prismquant.algorithms.methods import build_solver, build_tuner
from prismquant.errors import RecipeError
from prismquant.formats.spec import NumberSpec
from prismquant.numerics.kinds import Granularity
from prismquant.recipe.exporters.export_ledger import WorkNotes
from prismquant.recipe.exporters.export_task import ExportTask, note_alike, note_calibration
from prismquant.recipe.exporters.layer_work import LayerWork
from prismquant.recipe.exporters.written_gptq import damping, refined
from prismquant.recipe.exporters.written_names import endings, expressions
from prismquant.recipe.exporters.written_schemes import arguments_of, observer_of
from prismquant.recipe.exporters.written_transforms import transform_modifiers
from prismquant.recipe.plain_yaml import write_yaml

Fields = dict[str, Any]

_OBSERVED = ("activations", "outputs")
_KEYS = {"weights": "weights", "activations": "input_activations", "outputs": "output_activations"}


@dataclass(frozen=True)
class _Written:
    """A layer's work in the tool's words, which can be compared.

    Attributes:
        modifier: Its name and keys, as JSON.
        scheme: Of its group, as JSON.
    """

    modifier: str
    scheme: str


@dataclass
class _Modifier:
    """A modifier that quantizes, and the targets of each of its schemes."""

    name: str
    keys: Fields
    groups: list[tuple[Fields, list[str]]] = field(default_factory=list)

    def body(self) -> Fields:
        """All of its keys."""
        groups = {
            f"group_{number}": {"targets": targets} | scheme
            for number, (scheme, targets) in enumerate(self.groups)
        }
        return self.keys | ({"config_groups": groups} if groups else {})


def write(task: ExportTask) -> str:
    """A recipe as YAML that llm-compressor loads.

    Raises:
        RecipeError: Nothing of it can be said there.
    """
    written = {
        work: _written(task.notes(work), work)
        for work in dict.fromkeys(work for work in task.work.values() if work.quantized)
    }
    settings = {layer: written.get(work) for layer, work in task.work.items()}
    modifiers: dict[str, _Modifier] = {}
    for setting, found in endings(settings).items():
        if setting is None:
            continue
        name, keys = json.loads(setting.modifier)
        modifier = modifiers.setdefault(setting.modifier, _Modifier(name, keys))
        targets = [f"re:{one}$" for one in expressions(found)]
        modifier.groups.append((json.loads(setting.scheme), targets))
    transforms = transform_modifiers(task)
    _add_cache(task, modifiers)
    if not modifiers:
        raise RecipeError(
            "nothing of the recipe can be said in the words of llm-compressor",
            where=task.recipe.name,
            remedy="formats there are integers, E4M3, E2M3 and E2M1",
        )
    note_alike(task, tuners=("autoround",))
    _note_calibration(task, list(modifiers.values()))
    listed = [*transforms, *((one.name, one.body()) for one in modifiers.values())]
    return write_yaml({"quant_stage": _in_groups(listed)})


def _in_groups(listed: Iterable[tuple[str, Fields]]) -> Fields:
    """Modifiers in their order, in so many mappings that no name comes twice in one."""
    groups: list[Fields] = [{}]
    for name, keys in listed:
        if name in groups[-1]:
            groups.append({})
        groups[-1][name] = keys
    numbers = ["", *(f"{number}_" for number in range(2, len(groups) + 1))]
    return {
        f"quant_{number}modifiers": group for number, group in zip(numbers, groups, strict=True)
    }


def _written(notes: WorkNotes, work: LayerWork) -> _Written | None:
    """A layer's work in the tool's words; None where its weights cannot be said."""
    config = work.config
    assert config.weights is not None
    weights = arguments_of(notes, "weights", config.weights)
    if weights is None:
        return None
    name, keys, weighting = _method(notes, work, config.weights)
    order = keys.pop("order", None)
    if order is not None:
        keys["actorder"] = {"activation": "static", "original": None}[order]
    rule = config.weight_range
    weights |= _without_default(observer_of(notes, "weights", rule, weighting))
    scheme: Fields = {"weights": weights}
    for side in _OBSERVED:
        spec: NumberSpec | None = getattr(config, side)
        if spec is None:
            if notes.said(side):
                notes.written(side, "none", f"{_KEYS[side]}: null")
            continue
        given = arguments_of(notes, side, spec)
        if given is not None and spec.calibrated:
            given |= observer_of(notes, side, config.activation_range)
        elif notes.said("activation_range") and not spec.calibrated:
            notes.written("activation_range", "", "", "dynamic scales need none, here neither")
        if given is not None:
            scheme[_KEYS[side]] = given
    _fallback(notes, work, keys)
    return _Written(json.dumps([name, keys]), json.dumps(scheme))


def _without_default(observer: Fields) -> Fields:
    return {} if observer == {"observer": "memoryless_minmax"} else observer


def _fallback(notes: WorkNotes, work: LayerWork, keys: Fields) -> None:
    told = "bypass_divisibility_checks: true"
    grouped = work.config.weights is not None and work.config.weights.granularity.grouped
    if work.fallback != "error":
        keys["bypass_divisibility_checks"] = True
        why = "" if not grouped else "the last group is cut off there, no other format is taken"
        if work.fallback == "channel" and grouped:
            why = "the last group is cut off there, where one scale a row is taken here"
        notes.either("fallback", work.fallback, told, why)
    elif notes.said("fallback"):
        notes.written("fallback", "error", told.replace("true", "false"))


def _method(notes: WorkNotes, work: LayerWork, spec: NumberSpec) -> tuple[str, Fields, str]:
    """The modifier's name, its keys, and the importance of columns in the search of a range."""
    config = work.config
    if config.tuner == "autoround":
        return "AutoRoundModifier", _autoround(notes, work), "none"
    weighting = _weighting(notes, work, spec)
    if config.solver == "rtn":
        notes.written("solver", "rtn", "QuantizationModifier")
        return "QuantizationModifier", {}, weighting
    notes.written("solver", "gptq", "GPTQModifier")
    options: Any = build_solver(config.solver, config.options)
    keys: Fields = {"block_size": options.block_size}
    notes.written("options.block_size", options.block_size, f"block_size: {options.block_size}")
    keys["dampening_frac"] = damping(notes, options, "dampening_frac")
    keys["order"] = "original" if options.order == "original" else "activation"
    told = f"actorder: {'static' if keys['order'] == 'activation' else 'null'}"
    why = "sorted by the diagonal alone there" if options.order == "pivot" else ""
    notes.either("options.order", options.order, told, why)
    refined(notes, options)
    return "GPTQModifier", keys, weighting


def _weighting(notes: WorkNotes, work: LayerWork, spec: NumberSpec) -> str:
    config = work.config
    wanted = build_solver(config.solver, config.options).scale_weighting  # type: ignore[attr-defined]
    if config.weight_range.kind == "minmax" or wanted == "none":
        if notes.said("options.scale_weighting"):
            notes.written("options.scale_weighting", wanted, "observer: of equal weights")
        return "none"
    if config.weight_range.kind == "sweep" or spec.granularity in (
        Granularity.TENSOR,
        Granularity.BLOCK,
    ):
        why = "columns count alike in that search there"
        notes.dropped("options.scale_weighting", wanted, why, "observer: imatrix_mse")
        return "none"
    why = "" if wanted == "diagonal" else "columns count by their second moment there"
    notes.either("options.scale_weighting", wanted, "observer: imatrix_mse", why)
    return "diagonal"


def _autoround(notes: WorkNotes, work: LayerWork) -> Fields:
    options: Any = build_tuner("autoround", work.config.tuner_options)
    notes.written("tuner", "autoround", "AutoRoundModifier")
    keys: Fields = {"iters": options.iterations, "batch_size": options.batch}
    notes.written("tuner_options.iterations", options.iterations, f"iters: {options.iterations}")
    why = "samples there, recorded calls of up to calibration.batch_size samples here"
    notes.changed("tuner_options.batch", options.batch, f"batch_size: {options.batch}", why)
    if options.learning_rate is not None:
        keys["lr"] = options.learning_rate
        notes.written("tuner_options.learning_rate", keys["lr"], f"lr: {keys['lr']}")
    for name in ("range_learning_rate", "learn_range", "settle", "momentum", "seed"):
        if notes.said(f"tuner_options.{name}"):
            value = getattr(options, name)
            notes.dropped(f"tuner_options.{name}", value, "the modifier has no such key")
    if work.config.solver != "rtn":
        notes.dropped("solver", work.config.solver, "the start is rounded to nearest there")
    elif notes.said("solver"):
        notes.written("solver", "rtn", "AutoRoundModifier")
    return keys


def _add_cache(task: ExportTask, modifiers: dict[str, _Modifier]) -> None:
    """Put the cache of keys and values into the last modifier that quantizes, or into one alone."""
    if task.recipe.kv_cache is None:
        return
    spec, rule = task.recipe.kv_cache_settings
    scheme: Fields = {
        "num_bits": spec.number.bits,
        "type": "float" if spec.format == "fp8" else "int",
        "symmetric": True,
        "strategy": "attn_head" if spec.per_head else "tensor",
        "dynamic": False,
    }
    observer = {"minmax": "static_minmax", "ema": "minmax"}.get(rule.kind)
    place = "kv_cache"
    if observer is None:
        observer = "static_minmax"
        task.ledger.changed(f"{place}.range", rule.kind, f"observer: {observer}", "no clip there")
    scheme["observer"] = observer
    if observer == "minmax":
        scheme["observer_kwargs"] = {"averaging_constant": rule.momentum}
    task.ledger.written(place, spec.name, f"kv_cache_scheme: {json.dumps(scheme)}")
    last = next(reversed(modifiers), "")
    if not last:
        modifiers[last] = _Modifier("QuantizationModifier", {})
    modifiers[last].keys["kv_cache_scheme"] = scheme


def _note_calibration(task: ExportTask, modifiers: list[_Modifier]) -> None:
    solved = any(one.name in ("GPTQModifier", "AutoRoundModifier") for one in modifiers)
    theirs: Mapping[str, bool] = {
        "layer_sequential": False,
        "block_sequential": solved,
        "quantized_inputs": False,
    }
    calibration = task.recipe.calibration
    told = {
        "samples": f"oneshot(num_calibration_samples={calibration.samples})",
        "batch_size": f"oneshot(batch_size={calibration.batch_size})",
        "seed": "oneshot(shuffle_calibration_samples=..)",
    }
    note_calibration(task, theirs, told)
