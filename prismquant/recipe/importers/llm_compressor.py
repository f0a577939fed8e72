"""Recipes of llm-compressor: stages of modifiers, in YAML, JSON or Python, or oneshot's arguments.

    quant_stage:
      quant_modifiers:
        GPTQModifier: {scheme: W4A16, targets: [Linear], ignore: [lm_head, "re:.*visual.*"]}

The calibration is theirs, too: all layers of a block see the same inputs, and quantized inputs are
not simulated. Where a factorization fails the run stops; there the layer is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prismquant.arguments import MAX_BATCH, MAX_SAMPLES
from prismquant.errors import suggest
from prismquant.recipe.importers.imported import Imported
from prismquant.recipe.importers.ledger import Ledger, joined, shown
from prismquant.recipe.importers.quantization_modifiers import (
    QUANTIZATION,
    QuantizationStep,
    quantization_step,
    rules_of,
)
from prismquant.recipe.importers.scheme_arguments import (
    ARGUMENTS,
    OBSERVER_ARGUMENTS,
    column_order,
)
from prismquant.recipe.importers.source_section import Setting, SourceSection, Table, idle
from prismquant.recipe.importers.transform_modifiers import (
    AWQ,
    SMOOTHQUANT,
    SPINQUANT,
    awq,
    smoothquant,
    spinquant,
)

Fields = dict[str, Any]

NAME = "llm-compressor"

_ANY: Table = tuple(
    idle(name, "modifiers take their turn in the order of the file")
    for name in ("index", "group", "start", "end", "update")
) + tuple(
    idle(name, "a state of the tool's own")
    for name in ("initialized_", "finalized_", "started_", "ended_", "requires_calibration_data")
)
_SEQUENTIAL = idle("sequential_targets", "a model is always walked through block by block")

GPTQ: Table = (
    Setting("block_size", "128", "options.block_size"),
    Setting("dampening_frac", "0.01", "options.damping", "of the mean of the diagonal"),
    Setting("actorder", "static", "options.order", "static is activation, null is original"),
    idle("batched_quantization", "layers that share an input are solved together"),
    idle("offload_hessians", "--memory-budget decides what waits where", "--memory-budget"),
    _SEQUENTIAL,
    idle("sequential_update", "each block sees the quantized weights of those before it"),
)
AUTOROUND: Table = (
    Setting("iters", "200", "tuner_options.iterations"),
    Setting("batch_size", "8", "tuner_options.batch", "calls of up to calibration.batch_size"),
    Setting("lr", "1 / iters", "tuner_options.learning_rate", "in steps of the grid"),
    idle("enable_torch_compile", "kernels are chosen by what runs"),
    idle("device_ids", "--device names one", "--device"),
    idle("disable_opt_rtn", "the start is rounded to nearest"),
    _SEQUENTIAL,
)
IMATRIX: Table = (
    idle("targets", "second moments are gathered for every layer that asks for them"),
    idle("ignore", "second moments are gathered for every layer that asks for them"),
    idle("weight_observer", "the observer of the modifier that quantizes counts"),
)
ONESHOT: Table = (
    Setting("recipe", "", "", "the recipe itself, as a mapping or a list"),
    Setting("num_calibration_samples", "512", "calibration.samples"),
    Setting("batch_size", "1", "calibration.batch_size"),
    Setting("propagate_error", "true", "calibration.block_sequential"),
    *(idle(name, "named on the command line", "MODEL") for name in ("model", "model_revision")),
    idle("output_dir", "named on the command line", "--out"),
    *(
        idle(name, "named on the command line", "--calib")
        for name in ("dataset", "dataset_path", "dataset_config_name", "splits", "text_column")
    ),
    idle("max_seq_length", "named on the command line", "--max-length"),
    idle("precision", "named on the command line", "--dtype"),
    idle("trust_remote_code_model", "named on the command line", "--trust-remote-code"),
    *(
        idle(name, "calibration.seed chooses the samples", "calibration.seed")
        for name in ("shuffle_calibration_samples",)
    ),
    *(
        idle(name, "samples are padded to the longest of a batch, and padding never counts")
        for name in ("pad_to_max_length", "data_collator", "concatenate_data")
    ),
    *(
        idle(name, "a model is always walked through block by block")
        for name in (
            *("pipeline", "sequential_targets", "sequential_targets_per_subgraph"),
            *("tracing_ignore", "sequential_offload_device", "sequential_prefetch"),
        )
    ),
    *(
        idle(name, "nothing here is like it")
        for name in (
            *("config_name", "tokenizer", "processor", "tie_word_embeddings", "save_compressed"),
            *("recipe_args", "clear_sparse_session", "stage", "streaming", "overwrite_cache"),
            *("preprocessing_num_workers", "dataloader_num_workers", "min_tokens_per_module"),
            *("moe_calibrate_all_experts", "quantization_aware_calibration", "log_dir"),
            *("enable_compile", "use_loss_mask", "preprocessing_func", "remove_columns"),
        )
    ),
)
"""Arguments of ``oneshot``, in a file beside the recipe."""

MODIFIERS: Mapping[str, Table] = {
    "GPTQModifier": (*GPTQ, *QUANTIZATION, *_ANY),
    "QuantizationModifier": (*QUANTIZATION, *_ANY),
    "AutoRoundModifier": (*AUTOROUND, *QUANTIZATION, *_ANY),
    "AWQModifier": (*AWQ, *QUANTIZATION, *_ANY),
    "SmoothQuantModifier": (*SMOOTHQUANT, *_ANY),
    "SpinQuantModifier": (*SPINQUANT, *_ANY),
    "IMatrixGatherer": (*IMATRIX, *_ANY),
}
"""Keys of every modifier that is read."""

TABLES: Mapping[str, Table] = {
    "All modifiers that quantize": QUANTIZATION,
    "GPTQModifier": GPTQ,
    "AutoRoundModifier": AUTOROUND,
    "AWQModifier": AWQ,
    "SmoothQuantModifier": SMOOTHQUANT,
    "SpinQuantModifier": SPINQUANT,
    "IMatrixGatherer": IMATRIX,
    "Number formats: weights, input_activations, output_activations, kv_cache_scheme": ARGUMENTS,
    "observer_kwargs": OBSERVER_ARGUMENTS,
    "Arguments of oneshot, in a file beside `recipe`": ONESHOT,
    "Every modifier": _ANY,
}
NOTES = (
    "A number or a truth value in quotes, which the tool turns into one, is an error that says so.",
    "Schemes by name (`W4A16`, `W8A8`, `FP8_DYNAMIC`, `NVFP4` ..) are the same formats here; note "
    "that `W4A8` is in groups of 128 there, and `w4a8` by channel here.",
    "Calibration is theirs: layers of a block see the same inputs, and quantized inputs are not "
    "simulated (`calibration: {layer_sequential: false, quantized_inputs: false}`, where our "
    "default is true). Modifiers that round to nearest do not see rounded weights either.",
    "GPTQ is theirs, too: damping of the mean, sorted by the diagonal, scales by absmax, no "
    "refinement. A row that ends worse than rounding to nearest takes the nearest codes. Where a "
    "factorization fails, more damping is tried, and then the run stops; there the layer is "
    "rounded to nearest.",
    "Targets: a name counts more than an expression (`re:`), and that more than a class; of two of "
    "a kind the first in the alphabet; a later modifier more than an earlier one. `Linear` is "
    "every layer but the patch embedding; other classes have no weight to quantize.",
    "A name without `re:` means the module of that name and all below it, wherever it stands; "
    "there it is a whole path. So `vpm`, `visual` and `resampler.*` mean what they look like. What "
    "means no layer of the model is a note of the plan.",
    "The patch embedding is quantized only where `Conv2d`, `Conv3d` or its name is a target.",
    "A modifier that transforms takes its turn before all that quantize: where it stands after "
    "one, that is told.",
    "`QuIPModifier`, pruning and distillation are errors.",
)

_PRUNED = "nothing here prunes: take the modifier out, or prune before"
_REFUSED = {
    "QuIPModifier": "no transform rotates every layer's input at run time; nearest: "
    "SpinQuantModifier with R1, R2, R4, or transforms: [{name: rotation, options: {online: true}}]",
    "LogarithmicEqualizationModifier": "nearest: SmoothQuantModifier",
    **dict.fromkeys(
        (
            *("SparseGPTModifier", "WandaPruningModifier", "MagnitudePruningModifier"),
            *("ConstantPruningModifier", "REAPPruningModifier"),
        ),
        _PRUNED,
    ),
    **dict.fromkeys(
        ("OutputDistillationModifier", "LayerwiseQADModifier", "QADModifier"),
        "nothing here trains the whole model; nearest: tuner: zeroquant, block by block",
    ),
}


# Wherever a modifier may stand.
_KNOWN = (*MODIFIERS, *_REFUSED, *(setting.name for setting in ONESHOT))
# Arguments, a list, a stage, its modifiers.
_DEEPEST = 4


@dataclass
class _Gathered:
    """Modifiers of a recipe, as far as it was read."""

    steps: list[QuantizationStep] = field(default_factory=list)
    transforms: list[Fields] = field(default_factory=list)
    quantizes: list[str] = field(default_factory=list)
    awaits: str = ""
    cache: str = ""
    calibration: Fields = field(default_factory=dict)
    solved: bool = False
    rotated: bool = False


def recognizes(content: Any) -> bool:
    """Whether a content is a recipe of this dialect: stages, modifiers, or oneshot's arguments."""
    if isinstance(content, list):
        mappings = all(isinstance(one, Mapping) for one in content)
        return bool(content) and mappings and all(recognizes(one) for one in content)
    if not isinstance(content, Mapping):
        return False
    keys = [key for key in content if isinstance(key, str)]
    if any(key in MODIFIERS or key in _REFUSED or key.endswith("Modifier") for key in keys):
        return True
    if any(key.endswith("_modifiers") for key in keys) or "recipe" in keys:
        return True
    return any(key.endswith("_stage") and isinstance(content[key], Mapping) for key in keys)


def read(content: Any, source: str) -> Imported:
    """A recipe of llm-compressor in our grammar.

    Args:
        content: As recognized.
        source: Name of the file, or the beginning of the text.

    Raises:
        RecipeError: It is not valid, or has no counterpart; lists all that is wrong.
    """
    ledger = Ledger(NAME, source)
    gathered = _Gathered()
    for place, name, keys in _modifiers(ledger, "", content, gathered):
        _read_modifier(SourceSection(ledger, place, keys, MODIFIERS[name]), name, gathered)
    steps = gathered.steps
    if gathered.awaits:
        ledger.wrong(gathered.awaits, "no modifier after it quantizes")
    caches = [step.kv_cache for step in steps if step.kv_cache is not None]
    if not any(step.groups for step in steps) and not caches and not ledger.faults:
        ledger.wrong("", "nothing is quantized: no modifier has a scheme, config_groups or a cache")
    body: Fields = {"name": Path(source).stem or NAME, "rules": rules_of(steps, ledger)}
    body |= {"transforms": gathered.transforms} if gathered.transforms else {}
    body |= {"kv_cache": _cache(caches[-1], gathered.rotated)} if caches else {}
    theirs = {"layer_sequential": False, "quantized_inputs": False}
    if steps and not gathered.solved:
        theirs["block_sequential"] = False
    return ledger.finish(body | {"calibration": theirs | gathered.calibration})


def _cache(cache: Fields, rotated: bool) -> Fields:
    return cache | {"rotated": True} if rotated and cache["format"] != "fp8" else cache


def _modifiers(
    ledger: Ledger, place: str, content: Any, gathered: _Gathered
) -> list[tuple[str, str, Any]]:
    """Modifiers in their order: the place, the name, and the keys of each."""
    if place.count(".") + place.count("[") > _DEEPEST:
        ledger.wrong(place, "it is nested too deeply")
        return []
    if isinstance(content, list | tuple):
        parts = [
            _modifiers(ledger, f"{place}[{number}]", one, gathered)
            for number, one in enumerate(content)
        ]
        return [one for part in parts for one in part]
    found: list[tuple[str, str, Any]] = []
    mapping = ledger.mapping(place, content)
    if "recipe" in mapping:
        _oneshot(SourceSection(ledger, place, mapping, ONESHOT), gathered)
        return _modifiers(ledger, joined(place, "recipe"), mapping["recipe"], gathered)
    for key, value in mapping.items():
        within = joined(place, key)
        if key in MODIFIERS:
            found.append((within, key, {} if value is None else value))
        elif key in _REFUSED:
            ledger.wrong(within, _REFUSED[key])
        elif key.endswith(("_stage", "_modifiers")) or key == "modifiers":
            found += _modifiers(ledger, within, value, gathered)
        elif key == "args":
            if value:
                ledger.wrong(within, "write the values into the recipe")
        elif key == "run_type":
            ledger.dropped(within, value, "a recipe is always for one run of calibration")
        else:
            ledger.wrong(within, f"unknown key; {suggest(key, _KNOWN)}")
    return found


def _oneshot(section: SourceSection, gathered: _Gathered) -> None:
    counts = {
        "num_calibration_samples": ("samples", MAX_SAMPLES),
        "batch_size": ("batch_size", MAX_BATCH),
    }
    for key, (ours, most) in counts.items():
        if key in section:
            _calibrate(section, key, ours, section.integer(key, 1, 1, most), gathered)
    if "propagate_error" in section:
        value = section.flag("propagate_error", True)
        _calibrate(section, "propagate_error", "block_sequential", value, gathered)


def _calibrate(
    section: SourceSection, key: str, ours: str, value: int | bool, gathered: _Gathered
) -> None:
    if gathered.calibration.get(ours, value) != value:
        section.wrong(key, "it is given twice, with two values")
    gathered.calibration[ours] = value
    section.honoured(key, f"calibration.{ours}: {shown(value)}")


def _read_modifier(section: SourceSection, name: str, gathered: _Gathered) -> None:
    if gathered.quantizes and (name == "AWQModifier" or name not in _METHODS):
        section.ledger.changed(
            section.place,
            dict(section.content),
            "before all that is quantized",
            f"there its turn comes after {' and '.join(gathered.quantizes)}, when weights are "
            "quantized already: put it first in the file",
        )
    if name == "IMatrixGatherer":
        return
    if name == "SpinQuantModifier":
        rotation, gathered.rotated = spinquant(section)
        gathered.transforms += rotation
        return
    if name == "SmoothQuantModifier":
        gathered.transforms.append(smoothquant(section))
        return
    if name == "AWQModifier":
        gathered.transforms.append(awq(section))
        if not any(setting.name in section for setting in QUANTIZATION):
            gathered.awaits = section.place
            return
        # Older releases: the modifier rounds to nearest itself.
    gathered.quantizes.append(name)
    method, order = _METHODS[name](section)
    step = quantization_step(section, method, order)
    if not any(key in section for key in ("scheme", "config_groups", "kv_cache_scheme")):
        section.ledger.wrong(section.place, "it names neither a scheme nor config_groups")
    if step.kv_cache is not None:
        if gathered.cache:
            section.ledger.overruled(gathered.cache, "that of a later modifier counts")
        gathered.cache = section.at("kv_cache_scheme")
    gathered.steps.append(step)
    gathered.awaits = ""
    gathered.solved |= name in ("GPTQModifier", "AutoRoundModifier")


def _rounded(section: SourceSection) -> tuple[Fields, str]:
    return {"solver": "rtn", "options": {}, "tuner": "none"}, ""


def _gptq(section: SourceSection) -> tuple[Fields, str]:
    if "dampening_frac" in section.content and "dampening_frac" not in section:
        section.wrong("dampening_frac", "a number, not null")
    options: Fields = {
        "block_size": section.integer("block_size", 128, 1, 65536),
        "refine_passes": 0,
    }
    options |= section.damping("dampening_frac")
    section.honoured("block_size", f"options.block_size: {options['block_size']}")
    given = "actorder" in section.content
    order = column_order(section, "actorder") if given else "activation"
    return {"solver": "gptq", "options": options, "tuner": "none"}, order


def _autoround(section: SourceSection) -> tuple[Fields, str]:
    options: Fields = {
        "iterations": section.integer("iters", 200, 1, 100_000),
        "batch": section.integer("batch_size", 8, 1, 4096),
    }
    if "lr" in section:
        options["learning_rate"] = section.number("lr", 0.005, 1e-6, 1)
    section.honoured("iters", f"tuner_options.iterations: {options['iterations']}")
    section.changed(
        "batch_size",
        f"tuner_options.batch: {options['batch']}",
        "counts recorded calls, each of up to calibration.batch_size samples",
    )
    section.honoured("lr", f"tuner_options.learning_rate: {shown(options.get('learning_rate'))}")
    method = {"solver": "rtn", "options": {}, "tuner": "autoround", "tuner_options": options}
    return method, ""


_METHODS: Mapping[str, Callable[[SourceSection], tuple[Fields, str]]] = {
    "GPTQModifier": _gptq,
    "QuantizationModifier": _rounded,
    "AWQModifier": _rounded,
    "AutoRoundModifier": _autoround,
}
