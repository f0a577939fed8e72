"""Rotations and splits of ours as flags of MQuant."""

from __future__ import annotations

from typing import Any

from prismquant.recipe.exporters.export_task import ExportTask
from prismquant.recipe.transform_rule import TransformRule

_TOWERS = {"vision": "visual", "llm": "llm"}
_ROTATED = {"vision": "rotate_visual_clip", "llm": "rotate_llm"}


def transform_flags(task: ExportTask, sides: tuple[str, ...]) -> list[str]:
    """Flags of all transforms.

    Args:
        task: The recipe.
        sides: Sides that are quantized: ``visual``, ``llm``.
    """
    words: list[str] = []
    online: set[str] = set()
    kinds: set[str] = set()
    for index, rule in enumerate(task.recipe.transforms):
        place = task.ledger.places.of_transform(index)
        if rule.name == "rotation":
            words += _rotation(task, place, rule, sides, online, kinds)
        elif rule.name != "split":
            why = "no scale is moved between layers there"
            task.ledger.dropped(place, rule.name, why, "--rotate")
    for index, rule in enumerate(task.recipe.transforms):
        if rule.name == "split":
            words += _split(task, task.ledger.places.of_transform(index), rule, online)
    return list(dict.fromkeys(words))


def _rotation(
    task: ExportTask,
    place: str,
    rule: TransformRule,
    sides: tuple[str, ...],
    online: set[str],
    kinds: set[str],
) -> list[str]:
    options: Any = rule.build()
    ledger = task.ledger
    known = {layer.modality for layer in task.scope.layers}
    towers = [one for one in _ROTATED if not rule.match.modality or one in rule.match.modality]
    words = ["--rotate"]
    if kinds and options.kind not in kinds:
        ledger.changed(f"{place}.options.kind", options.kind, "--rotate_mode", "one kind for all")
    elif options.kind != "hadamard":
        words.append(f"--rotate_mode={options.kind}")
        ledger.written(f"{place}.options.kind", options.kind, f"--rotate_mode {options.kind}")
    kinds.add(options.kind)
    for tower in towers:
        if tower not in known:
            continue
        words.append(f"--{_ROTATED[tower]}")
        flag = f"online_{_TOWERS[tower]}_hadamard"
        if options.online and _TOWERS[tower] in sides:
            words.append(f"--{flag}")
            online.add(tower)
            why = "padded to a width that has a matrix there, in blocks of up to 1024 here"
            ledger.changed(f"{place}.options.online", True, f"--{flag}", why)
        elif options.online:
            why = f"it would quantize {tower} there, which the recipe does not"
            ledger.dropped(f"{place}.options.online", True, why)
    ledger.written(place, rule.name, " ".join(words))
    if options.online and options.signs:
        why = "online matrices have no random signs there"
        ledger.changed(f"{place}.options.signs", True, "--rotate", why)
    if not options.online and not options.signs:
        why = "offline matrices have random signs there"
        ledger.changed(f"{place}.options.signs", False, "--rotate", why)
    for name in ("residual", "values"):
        if not getattr(options, name):
            ledger.changed(f"{place}.options.{name}", False, "--rotate", "always rotated there")
    for name in ("online_block", "seed"):
        if name in rule.options and getattr(options, name):
            ledger.dropped(f"{place}.options.{name}", rule.options[name], "there is no such flag")
    return words


def _split(task: ExportTask, place: str, rule: TransformRule, online: set[str]) -> list[str]:
    """Flags that split a column off where an online rotation made it stand out."""
    meant = {layer.modality for layer in task.scope.layers if rule.match.means(layer)}
    roles = {layer.role for layer in task.scope.layers if rule.match.means(layer)}
    towers = [one for one in _TOWERS if one in meant]
    words = [f"--{_TOWERS[one]}_split" for one in towers if one in online]
    for one in towers:
        if one not in online:
            why = f"no column of {one} is split off without an online rotation there"
            task.ledger.dropped(f"{place}.match", one, why, f"--online_{_TOWERS[one]}_hadamard")
    if words:
        why = "the first column there, the one that stands out here"
        task.ledger.changed(place, rule.name, " ".join(words), why)
    if roles != {"mlp.down"}:
        others = sorted(roles - {"mlp.down"})
        why = "only the last layer of an MLP is split there"
        task.ledger.dropped(f"{place}.match", others, why)
    for key, value in rule.options.items():
        task.ledger.dropped(f"{place}.options.{key}", value, "there is no such flag")
    return words
