"""Recipes of ours as command lines of MQuant: one setting for vision, one for language.

Groups, symmetry, damping, order and the kind of dynamic scales are shared by both. Of each side the
setting of most layers is written; other layers are left out by ``--skip_names`` where a part of
their names tells them apart.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prismquant.errors import RecipeError
from prismquant.recipe.exporters.export_task import ExportTask, note_alike, note_calibration
from prismquant.recipe.exporters.layer_work import LayerWork
from prismquant.recipe.exporters.mquant_rotations import transform_flags
from prismquant.recipe.exporters.mquant_side import SideFlags, note_side, side_flags
from prismquant.recipe.exporters.written_scope import WrittenLayer

Fields = dict[str, Any]

_TOWERS = {"visual": ("vision", "projector"), "llm": ("llm",)}
_PARTS = {
    "vision": "quant_visual_clip",
    "projector": "quant_cross_attention",
    "llm": "quant_llm",
}
_NO_GROUPS = -1
_MOST_PARTS = 200
_FORK = ("video_llama_3", "video_llama_3_remote")


@dataclass(frozen=True)
class _SideLayers:
    """One side, vision or language.

    Attributes:
        flags: Setting of most of its layers.
        chosen: Layers that get it.
    """

    flags: SideFlags
    chosen: frozenset[WrittenLayer]


def write(task: ExportTask) -> str:
    """A recipe as flags of MQuant's drivers, in one line.

    Raises:
        RecipeError: Nothing of it can be said there.
    """
    sides = {name: _side(task, name) for name in _TOWERS}
    found = {name: side for name, side in sides.items() if side is not None}
    if not found:
        raise RecipeError(
            "nothing of the recipe can be said in the words of mquant",
            where=task.recipe.name,
            remedy="it quantizes to integers of 2 to 8 bits, and neither the head nor the cache",
        )
    shared: Fields = {}
    for name in ("visual", "llm"):
        # Where both have a use for a flag, language counts.
        own = found[name].flags.shared() if name in found else {}
        shared |= {key: value for key, value in own.items() if value is not None}
    for kind in dict.fromkeys(
        (work, _name_of(layer), layer.role == "lm_head", _is_chosen(layer, found))
        for layer, work in task.work.items()
        if work.quantized
    ):
        _note(task, kind, shared)
    words = ["--quant"]
    words += _part_flags(task, found)
    for name, side in found.items():
        words += side.flags.own_words(name)
    words += [word for key, value in shared.items() for word in _words(key, value)]
    words += transform_flags(task, tuple(found))
    words += _calibration_words(task, found)
    skipped = _skipped(task, found)
    if skipped:
        task.ledger.guessed("--skip_names are parts of module paths in transformers 5")
        if any(not side.flags.rtn for side in found.values()):
            told = (
                "GPTQ of the released code reads --skip_names wrongly; rounding to nearest does not"
            )
            task.ledger.guessed(told)
        words += ["--skip_names", *map(shlex.quote, skipped)]
    if task.recipe.kv_cache is not None:
        spec, _ = task.recipe.kv_cache_settings
        task.ledger.dropped("kv_cache", spec.name, "no cache is quantized there")
    note_alike(task)
    return " ".join(words) + "\n"


def _words(key: str, value: Any) -> list[str]:
    if value is False or value == _NO_GROUPS:
        return []
    return [f"--{key}"] if value is True else [f"--{key}", str(value)]


def _side(task: ExportTask, name: str) -> _SideLayers | None:
    """The setting of most layers of a side; None where none is quantized."""
    own = {
        layer: flags
        for layer, work in task.work.items()
        if work.quantized
        and layer.modality in _TOWERS[name]
        and layer.role != "lm_head"
        and (flags := side_flags(work)) is not None
    }
    counts = Counter(flags for layer, flags in own.items() if not layer.reads_pixels)
    counts = counts or Counter(own.values())
    if not counts:
        return None
    usual = counts.most_common(1)[0][0]
    chosen = [
        layer
        for layer, flags in own.items()
        # Pixels stay in floating point, whatever the flags say.
        if flags == usual or (layer.reads_pixels and flags.of_pixels(usual) == usual)
    ]
    return _SideLayers(usual, frozenset(chosen))


def _name_of(layer: WrittenLayer) -> str:
    return "llm" if layer.modality == "llm" else "visual"


def _is_chosen(layer: WrittenLayer, found: dict[str, _SideLayers]) -> bool:
    side = found.get(_name_of(layer))
    return side is not None and layer in side.chosen


def _note(task: ExportTask, kind: tuple[LayerWork, str, bool, bool], shared: Fields) -> None:
    """Note what becomes of the work on some layers of a side."""
    work, name, is_head, is_chosen = kind
    notes, spec = task.notes(work), work.config.weights
    assert spec is not None
    if is_head:
        notes.dropped("weights", spec.name, "the head stays in floating point there")
    elif side_flags(work) is None:
        nearest = f"--{name}_w_bits {spec.bits}"
        notes.dropped("weights", spec.name, "numbers there are integers", nearest)
    elif is_chosen:
        note_side(notes, name, shared)
    else:
        why = f"all layers of {name} have one setting there, that of most; these are left out"
        notes.dropped("weights", spec.name, why, "--skip_names")


def _part_flags(task: ExportTask, found: dict[str, _SideLayers]) -> list[str]:
    """Flags of the parts that are quantized."""
    words = []
    for modality, flag in _PARTS.items():
        if any(layer.modality == modality for side in found.values() for layer in side.chosen):
            fork = modality == "projector" and set(task.scope.families) <= set(_FORK)
            words.append(f"--{'quant_visual_projector' if fork else flag}")
            if modality == "projector" and not task.scope.exact:
                told = "--quant_cross_attention is --quant_visual_projector for a VideoLLaMA3"
                task.ledger.guessed(told)
    return words


def _skipped(task: ExportTask, found: dict[str, _SideLayers]) -> list[str]:
    """Parts of names of all layers that a flag would quantize and the recipe does not.

    Raises:
        RecipeError: They are more than a command line should hold.
    """
    chosen = {layer for side in found.values() for layer in side.chosen}
    meant = {layer.modality for layer in chosen}
    kept = [layer.name for layer in chosen]
    left = [
        layer
        for layer in task.work
        if layer not in chosen and layer.modality in meant and layer.role != "lm_head"
    ]
    parts: dict[str, None] = {}
    for layer in left:
        if any(part in layer.name for part in parts):
            continue
        fitting = (part for part in _parts(layer) if not any(part in name for name in kept))
        parts[next(fitting, layer.name)] = None
    if len(parts) > _MOST_PARTS:
        remedy = "" if task.scope.exact else "; --model names one model's layers alone"
        raise RecipeError(
            f"{len(parts)} parts of names would be needed to leave single layers out",
            where=task.recipe.name,
            remedy=f"mquant has one setting for vision and one for language{remedy}",
        )
    return list(parts)


def _parts(layer: WrittenLayer) -> Iterator[str]:
    """Parts of a layer's name, the widest first: a block, a kind of layer in all blocks, itself."""
    names = layer.name.split(".")
    if layer.block is not None:
        before, _, after = layer.path.partition(".*.")
        for size in range(1, len(before.split(".")) + 1):
            yield f"{'.'.join(before.split('.')[-size:])}.{layer.block}."
        for size in range(1, len(after.split(".")) + 1):
            yield f".{'.'.join(after.split('.')[-size:])}"
    for size in range(1, len(names) + 1):
        yield ".".join(names[-size:])


def _calibration_words(task: ExportTask, found: dict[str, _SideLayers]) -> list[str]:
    calibration = task.recipe.calibration
    flags = [side.flags for side in found.values()]
    words = []
    told = []
    for key, needed in (
        ("nsamples", any(not one.rtn for one in flags)),
        ("calib_num", any(one.static for one in flags)),
    ):
        if needed:
            told.append(f"--{key} {calibration.samples}")
            words += [f"--{key}", str(calibration.samples)]
    if calibration.seed != 42:
        words += ["--seed", str(calibration.seed)]
    theirs = {
        "samples": calibration.samples,
        "seed": calibration.seed,
        "layer_sequential": True,
        "block_sequential": True,
        "quantized_inputs": False,
    }
    named = {"samples": " ".join(told), "seed": f"--seed {calibration.seed}"}
    note_calibration(task, theirs, named)
    return words
