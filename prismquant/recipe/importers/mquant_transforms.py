"""Rotations and splits that flags of MQuant ask for."""

from __future__ import annotations

from typing import Any

from prismquant.recipe.importers.source_section import SourceSection

Fields = dict[str, Any]

_PARTS = {"vision": ("visual", "rotate_visual_clip"), "llm": ("llm", "rotate_llm")}


def transforms_of(section: SourceSection) -> list[Fields]:
    """Our transforms, with notes on all flags about rotations and splits."""
    kind = section.word("rotate_mode", "hadamard", ("hadamard", "random"))
    master = section.flag("rotate", False)
    rotations: dict[str, Fields] = {}
    splits: list[Fields] = []
    for modality, (part, key) in _PARTS.items():
        turned = section.flag(key, False) and master
        online = section.flag(f"online_{part}_hadamard", False) and turned
        if turned:
            rotations[modality] = _options(kind, online)
        if section.flag(f"{part}_split", False) and online:
            match = {"modality": modality, "role": "mlp.down"}
            splits.append({"name": "split", "match": match})
        _note(section, part, key, turned, online)
    _note_master(section, rotations, kind)
    alike = len(rotations) == 2 and rotations["vision"] == rotations["llm"]
    if alike:
        rotations = {"": rotations["llm"]}
    return [_rotation(modality, options) for modality, options in rotations.items()] + splits


def _rotation(modality: str, options: Fields) -> Fields:
    rotation: Fields = {"name": "rotation"}
    if modality:
        rotation["match"] = {"modality": modality}
    return rotation | {"options": options}


def _options(kind: str, online: bool) -> Fields:
    """Options of a rotation; an online one has no signs there, and then none have here."""
    options: Fields = {"kind": kind, "online": online}
    return options | ({"signs": False} if online else {})


def _note(section: SourceSection, part: str, key: str, turned: bool, online: bool) -> None:
    if turned:
        section.honoured(key, "transforms: rotation")
    else:
        section.dropped(key, "without --rotate nothing is rotated, there too", "--rotate")
    flag = f"online_{part}_hadamard"
    if online:
        section.changed(flag, "options.online: true", "in blocks of up to 1024, without padding")
    else:
        why = f"without --rotate and --{key} no weight is rotated for it"
        section.dropped(flag, why, f"--rotate --{key}")
    if online:
        section.changed(f"{part}_split", "transforms: split", "which column is measured")
    else:
        why = f"no column stands out without --{flag}, and none is split, there too"
        section.dropped(f"{part}_split", why, f"--{flag}")


def _note_master(section: SourceSection, rotations: dict[str, Fields], kind: str) -> None:
    if rotations:
        section.honoured("rotate", "transforms: rotation")
        section.honoured("rotate_mode", f"options.kind: {kind}")
    else:
        why = "no part is named that would be rotated"
        section.dropped("rotate", why, "--rotate_llm, --rotate_visual_clip")
        section.dropped("rotate_mode", why)
