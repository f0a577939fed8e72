"""Command lines of MQuant and of its VideoLLaMA3 fork.

    --quant --rotate --rotate_llm --quant_llm --llm_w_bits 4 --llm_static --act_order

Bits, static scales, rounding to nearest and clipping differ between vision and language; groups,
symmetry, damping and order are shared, as there. A flag that the tool passes over in silence has no
effect here either, and that is told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prismquant.arguments import MAX_SAMPLES
from prismquant.recipe.importers.imported import Imported
from prismquant.recipe.importers.ledger import Ledger
from prismquant.recipe.importers.mquant_command import flags_in, holds_command
from prismquant.recipe.importers.mquant_flags import FLAGS, TABLES
from prismquant.recipe.importers.mquant_transforms import transforms_of
from prismquant.recipe.importers.source_section import SourceSection
from prismquant.recipe.match import MAX_EXPRESSIONS

Fields = dict[str, Any]

NAME = "mquant"

__all__ = ["NAME", "NOTES", "TABLES", "read", "recognizes"]

NOTES = (
    'Give the arguments as one text: `--recipe "--quant .."`, `--mquant-args "--quant .."`, or '
    '`prismquant recipe convert --from mquant ".."`; a file with the whole command, or a '
    "dictionary of the flags, is read as well.",
    "The connector (`visual.merger`, `mm_projector`) is `modality: projector`; "
    "`--quant_cross_attention` and the fork's `--quant_visual_projector` are the same, and go by "
    "the settings of vision.",
    "`lm_head`, embeddings and the cache stay in floating point. The input of the patch embedding "
    "does, too.",
    "Calibration is theirs: stage by stage, block by block, quantized inputs not simulated while "
    "GPTQ is at work. There GPTQ and static scales are calibrated on the set that is evaluated "
    "afterwards; here on `--calib`.",
    "Its functions for Qwen2-VL and VideoLLaMA3 can be called by their names, on a model in "
    "memory: [compat](compat.md).",
    "Weights without `--w_asym`: scale absmax / (2^(b-1) - 1), `int4-channel-narrow`; with "
    "`--.._w_clip` the scale is searched on the full grid, as there.",
    "An online rotation is in blocks of up to 1024 here, and never pads; which column a split "
    "keeps is measured, and not always the first.",
)

_DRIVER = re.compile(r"quant_(\w+)\.py")
_SIXTEEN = ("qwenvl", "minicpmv")
_MANY_SAMPLES = {"minicpmv": 128}
# The search of the shrink factor there: 80 steps of a hundredth.
_CLIPPED: Fields = {
    "kind": "mse",
    "max_shrink": 0.8,
    "steps": 80,
    "norm": 2.4,
    "signed_scale": False,
}
_LARGEST: Fields = {"kind": "minmax"}
_GROUPS = (
    "groups are of the original order of columns; where they do not divide a layer's, the next of "
    "128, 64 and 32 that does is taken, or one scale a row, not a last one that is cut off"
)
_TOWERS = {"visual": ("vision", "projector"), "llm": ("llm",)}


@dataclass(frozen=True)
class _Side:
    """Settings of one side, vision or language.

    Attributes:
        name: ``visual`` or ``llm``, as the flags begin.
        w_bits, a_bits: Widths; 16 is floating point.
        static, rtn, clip: Flags of the side.
    """

    name: str
    w_bits: int
    a_bits: int
    static: bool
    rtn: bool
    clip: bool


def recognizes(content: Any) -> bool:
    """Whether a content is a command line of this tool, or a mapping of its flags."""
    if isinstance(content, Mapping):
        keys = set(content)
        return bool(keys) and keys <= FLAGS.keys() and bool(keys & _TELLING)
    return isinstance(content, str) and holds_command(content)


_TELLING = {"quant", "quant_llm", "quant_visual_clip", "llm_w_bits", "visual_w_bits", "rotate_llm"}


def read(content: Any, source: str) -> Imported:
    """A command line of MQuant as a recipe of our grammar.

    Args:
        content: As recognized.
        source: Name of the file, or the beginning of the text.

    Raises:
        RecipeError: It is not valid, or has no counterpart; lists all that is wrong.
    """
    ledger = Ledger(NAME, source)
    driver = _DRIVER.search(content) if isinstance(content, str) else None
    given = content if isinstance(content, Mapping) else flags_in(str(content), ledger)
    script = driver.group(1) if driver else ""
    bits = 16 if script in _SIXTEEN else None
    section = SourceSection(ledger, "", given, FLAGS.values())
    sides = {name: _side(section, name, bits) for name in _TOWERS}
    if "load_gptq" in section:
        section.wrong("load_gptq", "a pickled model is never read")
    quantized = _quantized(section)
    rules: list[Fields] = []
    for modality in quantized:
        side = sides["llm" if modality == "llm" else "visual"]
        rules += _rules(section, modality, side)
    if not rules:
        ledger.wrong("", "nothing would be quantized: give --quant with --quant_llm and others")
    skipped = section.words("skip_names")
    if len(skipped) > MAX_EXPRESSIONS:
        section.wrong("skip_names", f"{len(skipped)} parts of names, more than {MAX_EXPRESSIONS}")
        skipped = ()
    # There layers are wrapped, and go by the name of what is in the wrapper.
    for name in (re.sub(r"\.(module|L2)$", "", part) for part in skipped):
        skip = {"match": {"name": f"re:.*{re.escape(name)}.*"}, "skip": True, "optional": True}
        section.honoured("skip_names", f"skip: true, name: re:.*{re.escape(name)}.*")
        rules.append(skip)
    transforms = transforms_of(section)
    used = [sides["llm" if modality == "llm" else "visual"] for modality in quantized]
    body: Fields = {"name": NAME, "rules": rules}
    body["calibration"] = _calibration(section, used, _MANY_SAMPLES.get(script, 8))
    return ledger.finish(body | ({"transforms": transforms} if transforms else {}))


def _side(section: SourceSection, name: str, bits: int | None) -> _Side:
    widths = {
        part: section.integer(f"{name}_{part}_bits", bits or default, 2, 16)
        for part, default in (("w", 4), ("a", 8))
    }
    for part, width in widths.items():
        if 8 < width < 16:
            section.wrong(f"{name}_{part}_bits", f"2 to 8, or 16 for floating point, not {width}")
    flags = {key: section.flag(f"{name}_{key}", False) for key in ("static", "w_rtn", "w_clip")}
    return _Side(name, widths["w"], widths["a"], flags["static"], flags["w_rtn"], flags["w_clip"])


def _quantized(section: SourceSection) -> list[str]:
    """Modalities that are quantized."""
    section.honoured("quant", "rules")
    asked = {
        "vision": ["quant_visual_clip"],
        "projector": ["quant_cross_attention", "quant_visual_projector"],
        "llm": ["quant_llm"],
    }
    found = []
    for modality, keys in asked.items():
        given = [section.flag(key, False) for key in keys]
        wanted = any(given)
        for key in keys:
            section.honoured(key, f"rules[].match.modality: {modality}")
        # An online rotation of a tower asks for the tower, too.
        part = {"vision": "visual", "llm": "llm"}.get(modality)
        tower = {"vision": "rotate_visual_clip", "llm": "rotate_llm"}.get(modality)
        if part and section.flag(f"online_{part}_hadamard", False):
            wanted |= section.flag(str(tower), False)
        if wanted:
            found.append(modality)
    return found if section.flag("quant", False) else []


def _rules(section: SourceSection, modality: str, side: _Side) -> list[Fields]:
    """Rules of one modality."""
    match: Fields = {"modality": modality}
    if modality == "llm":
        match["role"] = ["attn", "mlp"]
    if side.w_bits == 16:
        section.honoured(f"{side.name}_w_bits", f"{modality}: skip: true")
        return [{"match": match, "skip": True}]
    asym = section.flag("w_asym", False)
    size = section.integer("w_groupsize", -1, -1, 1 << 20)
    unit = f"g{size}" if size > 0 and not side.rtn else "channel"
    weights = f"int{side.w_bits}-{unit}" + ("-asym" if asym else "" if side.clip else "-narrow")
    fields: Fields = {"weights": weights, "activations": _inputs(section, side)}
    fields["weight_range"] = _CLIPPED if side.clip else _LARGEST
    fields |= _method(section, side)
    told = f"{modality}: weights: {weights}"
    section.honoured(f"{side.name}_w_bits", told)
    section.honoured("w_asym", told)
    rule = fields["weight_range"]["kind"]
    section.honoured(f"{side.name}_w_clip", f"{modality}: weight_range: {rule}")
    section.honoured(f"{side.name}_w_rtn", f"{modality}: solver: {fields['solver']}")
    if size > 0 and side.rtn:
        section.dropped("w_groupsize", "rounding to nearest is by channel, there too", "gptq")
    elif size > 0:
        fields["fallback"] = "nearest"
        section.changed("w_groupsize", told, _GROUPS)
    else:
        section.honoured("w_groupsize", told)
    rules = [{"match": match} | fields]
    if modality == "vision":
        # Its input is pixels; no checkpoint declares a convolution with a quantized one.
        patch: Fields = {"match": {"role": "patch_embed"}, "activations": "none"}
        rules.append(patch | {"optional": True})
    return rules


def _method(section: SourceSection, side: _Side) -> Fields:
    if side.rtn:
        return {"solver": "rtn", "options": {"scale_weighting": "none"}}
    ordered = section.flag("act_order", False)
    options: Fields = {
        "order": "activation" if ordered else "original",
        "scale_weighting": "none",
        "refine_passes": 0,
    }
    section.honoured("act_order", f"options.order: {options['order']}")
    return {"solver": "gptq", "options": options | section.damping("percdamp")}


def _inputs(section: SourceSection, side: _Side) -> str:
    """Name of the inputs' format, with notes on all flags about it."""
    key = f"{side.name}_a_bits"
    if side.a_bits == 16:
        section.honoured(key, "activations: none")
        if side.static:
            section.dropped(f"{side.name}_static", f"{key} is 16: inputs stay in floating point")
        return "none"
    if side.static:
        name = f"int{side.a_bits}-tensor"
        section.changed(
            f"{side.name}_static",
            f"activations: {name}",
            "scale absmax over half the codes, in place of the larger of |min| / 128, max / 127",
        )
        for flag in ("a_asym", "a_groupsize", "a_clip_ratio", "act_per_tensor"):
            why = f"static scales of {side.name} are symmetric, of the tensor, unclipped, there too"
            section.dropped(flag, why, f"activations: int{side.a_bits}-tensor-asym")
    else:
        name = _dynamic(section, side)
        section.honoured(f"{side.name}_static", f"activations: {name}")
    section.honoured(key, f"activations: {name}")
    return name


def _dynamic(section: SourceSection, side: _Side) -> str:
    size = section.integer("a_groupsize", -1, -1, 1 << 20)
    asym = section.flag("a_asym", False)
    ending = "asym" if asym else "narrow"
    name = f"int{side.a_bits}-token-{ending}"
    if size > 0:
        name = f"int{side.a_bits}-g{size}-{ending}-dyn"
    section.honoured("a_groupsize", f"activations: {name}")
    section.honoured("a_asym", f"activations: {name}")
    if section.flag("act_per_tensor", False):
        section.changed("act_per_tensor", f"activations: {name}", "a scale for each token is finer")
    if section.number("a_clip_ratio", 1.0, 0.01, 1) < 1:
        section.dropped("a_clip_ratio", "dynamic scales clip nothing", "--llm_static, percentile")
    else:
        section.honoured("a_clip_ratio", f"activations: {name}")
    return name


def _calibration(section: SourceSection, used: list[_Side], fewest: int) -> Fields:
    """Settings of the calibration: samples enough for what is done on them."""
    gptq = section.integer("nsamples", fewest, 1, MAX_SAMPLES)
    static = section.integer("calib_num", 32, 1, MAX_SAMPLES)
    needed = [gptq] * any(not side.rtn for side in used) + [static] * any(s.static for s in used)
    samples = max(needed, default=gptq)
    for key in ("nsamples", "calib_num"):
        section.changed(key, f"calibration.samples: {samples}", "one set for GPTQ and for scales")
    seed = section.integer("seed", 42, 0, 2**63 - 1)
    section.honoured("seed", f"calibration.seed: {seed}")
    return {"samples": samples, "seed": seed, "quantized_inputs": False}
