"""Modifiers of llm-compressor that transform a model: SmoothQuant, AWQ and SpinQuant."""

from __future__ import annotations

from typing import Any

from prismquant.recipe.importers.ledger import quoted, shown
from prismquant.recipe.importers.module_lists import too_long_together, too_many
from prismquant.recipe.importers.module_names import excluding, named_modules
from prismquant.recipe.importers.source_section import Setting, SourceSection, Table, idle

Fields = dict[str, Any]

_EDGES = "edges that end in these layers; the other end follows from the model"

SMOOTHQUANT: Table = (
    Setting(
        "smoothing_strength",
        "0.5",
        "transforms[].options.alpha",
        "of each channel's largest magnitude, not of its largest less its smallest value",
    ),
    Setting("mappings", "by class", "transforms[].match", _EDGES),
    Setting("ignore", "[]", "transforms[].match", "compared with the layers that read an edge"),
    Setting("algorithm", "smoothquant", "transforms[].options.search", "else searched"),
    idle("num_calibration_steps", "all samples are used", "calibration.samples"),
    idle("calibration_function", "the model's own forward is called"),
)
AWQ: Table = (
    Setting("mappings", "by class", "transforms[].match", _EDGES),
    Setting("duo_scaling", "true", "transforms[].options.duo", "true tries both forms, as `both`"),
    Setting("n_grid", "20", "transforms[].options.grid"),
    idle("offload_device", "--memory-budget decides what waits where", "--memory-budget"),
    idle("max_chunk_memory", "--memory-budget decides what waits where", "--memory-budget"),
)
SPINQUANT: Table = (
    Setting(
        "rotations",
        "[R1, R2]",
        "transforms[].options.residual, values, online; kv_cache.rotated",
        "R1, R2, R4; R3 rotates the keys of an integer cache, and does nothing for others",
    ),
    Setting("transform_type", "hadamard", "transforms[].options.kind, signs"),
    Setting("transform_block_size", "null", "transforms[].options.online_block", "of R4 alone"),
    Setting("randomize", "false", "", "true is refused, there too"),
    Setting("learnable", "false", "", "true is refused, there too"),
    idle("precision", "rotations are multiplied in float64"),
    idle("mappings", "what is rotated follows from the model"),
    idle("norm_mappings", "what is rotated follows from the model"),
    Setting("transform_config", "null", "", "refused"),
)

_SMOOTHED = ["attn.qkv", "mlp.gate", "mlp.up"]


def smoothquant(section: SourceSection) -> Fields:
    """Our transform for a SmoothQuantModifier."""
    alpha = section.number("smoothing_strength", 0.5, 0, 1)
    logarithmic = section.word("algorithm", "smoothquant", ("smoothquant", "log_equalization"))
    why = "of largest magnitudes; scales are centred on 1 and stay within a factor of 1024"
    if logarithmic == "log_equalization":
        section.changed("algorithm", "options.search: true", "the strength is searched")
        section.dropped("smoothing_strength", "the strength is searched")
        options: Fields = {"search": True}
    else:
        section.honoured("algorithm", "name: smoothquant")
        section.changed("smoothing_strength", f"options.alpha: {alpha:.15g}", why)
        options = {"alpha": alpha}
    excluded = _patterns(section, "ignore", section.words("ignore"))
    match = _match(section, _pairs(section), excluded, _SMOOTHED)
    return {"name": "smoothquant", "match": match, "options": options}


def awq(section: SourceSection) -> Fields:
    """Our transform for an AWQModifier."""
    duo = section.content.get("duo_scaling", True)
    if not isinstance(duo, bool) and duo != "both":
        section.wrong("duo_scaling", f"true, false or both, not {quoted(duo)}")
    options = {"grid": section.integer("n_grid", 20, 1, 1000), "duo": duo is not False}
    section.honoured("n_grid", f"options.grid: {options['grid']}")
    if duo is True:
        section.changed("duo_scaling", "options.duo: true", "tries both forms, as `both` there")
    else:
        section.honoured("duo_scaling", f"options.duo: {shown(options['duo'])}")
    match = _match(section, _balanced(section), [], ["attn", "mlp"])
    return {"name": "awq", "match": match, "options": options}


def spinquant(section: SourceSection) -> tuple[list[Fields], bool]:
    """Our rotation for a SpinQuantModifier, and whether it rotates keys."""
    rotations = {one.upper() for one in section.words("rotations", ("R1", "R2"))}
    unknown = rotations - {"R1", "R2", "R3", "R4"}
    if unknown:
        section.wrong("rotations", f"R1, R2, R3 or R4, not {', '.join(sorted(unknown))}")
    kinds = ("hadamard", "random-hadamard", "random-matrix")
    kind = section.word("transform_type", "hadamard", kinds)
    for key in ("randomize", "learnable"):
        if section.flag(key, False):
            section.wrong(key, "rotations are neither drawn anew for each layer nor learned")
        section.honoured(key, "false")
    if "transform_config" in section:
        section.wrong("transform_config", "name the rotations instead")
    options: Fields = {
        "residual": "R1" in rotations,
        "values": "R2" in rotations,
        "online": "R4" in rotations,
        "kind": "random" if kind == "random-matrix" else "hadamard",
    }
    if kind != "random-matrix" or options["online"]:
        options["signs"] = kind != "hadamard"
    _block(section, options)
    turned = any(options[key] for key in ("residual", "values", "online"))
    if options["residual"] or options["values"]:
        section.honoured("transform_type", f"options.kind: {options['kind']}")
    else:
        del options["kind"]
        section.dropped("transform_type", "only R1 and R2 have a kind")
    told = _told(options) if turned else "no transform"
    if "R3" in rotations:
        section.changed("rotations", told, "R3 turns the keys of an integer cache alone")
    else:
        section.honoured("rotations", told)
    rotation = {"name": "rotation", "match": {"modality": "llm"}, "options": options}
    return [rotation] if turned else [], "R3" in rotations


def _told(options: Fields) -> str:
    return ", ".join(f"options.{key}: {shown(value)}" for key, value in options.items())


def _block(section: SourceSection, options: Fields) -> None:
    if "transform_block_size" not in section:
        return
    size = section.integer("transform_block_size", 2, 1, 1 << 20)
    if size < 2 or size & (size - 1):
        section.wrong("transform_block_size", "a power of two from 2 up")
    elif options["online"]:
        options["online_block"] = size
        section.changed(
            "transform_block_size", f"options.online_block: {size}", "R1 and R2 are whole"
        )
    else:
        section.dropped("transform_block_size", "R1 and R2 are whole: only R4 has blocks")


def _pairs(section: SourceSection) -> list[str] | None:
    """Layers that read the edges of SmoothQuant's mappings: ``[[layers], norm]`` each."""
    if "mappings" not in section:
        return None
    found: list[str] = []
    value = section.content["mappings"]
    for one in value if isinstance(value, list | tuple) else [value]:
        fine = isinstance(one, list | tuple) and len(one) == 2
        layers = [one[0]] if fine and isinstance(one[0], str) else one[0] if fine else []
        if not fine or not all(isinstance(layer, str) for layer in layers):
            section.wrong("mappings", f"[[layers], norm] each, not {quoted(one)}")
            continue
        found += layers
    return found


def _balanced(section: SourceSection) -> list[str] | None:
    """Layers that read the edges of AWQ's mappings."""
    if "mappings" not in section:
        return None
    found: list[str] = []
    value = section.content["mappings"]
    for number, one in enumerate(value if isinstance(value, list | tuple) else [value]):
        place = f"{section.at('mappings')}[{number}]"
        own = SourceSection(section.ledger, place, one, _MAPPING)
        if "smooth_layer" not in own or "balance_layers" not in own:
            section.ledger.wrong(place, "it needs smooth_layer and balance_layers")
        found += own.words("balance_layers")
    return found


_MAPPING: Table = (
    Setting("smooth_layer", "", "", "follows from the model"),
    Setting("balance_layers", "", "transforms[].match.name"),
    idle("activation_hook_target", "inputs are taken where the layers read them"),
)


def _patterns(section: SourceSection, key: str, entries: tuple[str, ...] | list[str]) -> list[str]:
    found = []
    if too_many(entries):
        section.wrong(key, too_many(entries))
        return []
    for entry in entries:
        try:
            one = named_modules(entry)
        except ValueError as error:
            section.wrong(key, str(error))
            continue
        if one.kind in ("expression", "name"):
            found.append(one.pattern)
    return found


def _match(
    section: SourceSection, layers: list[str] | None, excluded: list[str], roles: list[str]
) -> Fields:
    """Our criteria for the edges that are meant."""
    if too_long_together(excluded):
        section.wrong("ignore", too_long_together(excluded))
        excluded = []
    if excluded:
        section.changed(
            "ignore", "match.name", "compared with the layers that read an edge, not with norms"
        )
    if layers is None:
        match: Fields = {"modality": "llm", "role": roles}
        return match | ({"name": [excluding("re:.*", excluded)]} if excluded else {})
    names = [excluding(one, excluded) for one in _patterns(section, "mappings", layers)]
    section.changed("mappings", f"match.name: {shown(names)}", _EDGES)
    return {"name": names}
