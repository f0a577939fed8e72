"""Configurations of ModelOpt: ``quant_cfg`` as a dictionary or an ordered list, and ``algorithm``.

    {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "axis": 0},
                   "*input_quantizer": {"num_bits": 8, "axis": None},
                   "*lm_head*": {"enable": False}, "default": {"enable": False}},
     "algorithm": "max"}

Entries are read in order and the last that means a quantizer counts, as with our rules; each entry
becomes a rule.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prismquant.errors import shortened, suggest
from prismquant.recipe.importers.calibration_algorithms import ALGORITHMS, algorithm_of
from prismquant.recipe.importers.imported import Imported
from prismquant.recipe.importers.ledger import Ledger, in_quotes, joined, shown
from prismquant.recipe.importers.modelopt_imports import IMPORT, with_imports
from prismquant.recipe.importers.modelopt_presets import DISABLED_LAYERS, PRESETS
from prismquant.recipe.importers.modelopt_search import (
    CONSTRAINTS,
    SEARCH,
    is_search,
    refuse_search,
)
from prismquant.recipe.importers.quantizer_attributes import (
    ATTRIBUTES,
    BLOCK_SIZES,
    quantizer_of,
)
from prismquant.recipe.importers.quantizer_entries import (
    ENTRY,
    QuantizerEntry,
    entries_of,
    is_base,
)
from prismquant.recipe.importers.quantizer_names import KINDS, Kind, layer_globs
from prismquant.recipe.importers.source_section import Setting, SourceSection, Table, idle

Fields = dict[str, Any]

NAME = "modelopt"

CONFIG: Table = (
    Setting("quant_cfg", "", "rules, kv_cache"),
    Setting("algorithm", "max", "solver, transforms, weight_range"),
    idle("effective_bits", "bytes are counted exactly"),
    idle("metadata", "of a file, not of a model"),
    Setting("quantize", "", "all of the above, in a file"),
    Setting("imports", "", "rules", "parts that the tool has, or YAML files; $import puts them in"),
)
TABLES: Mapping[str, Table] = {
    "Configuration": CONFIG,
    "Entries of quant_cfg": ENTRY,
    "Attributes of a quantizer": ATTRIBUTES,
    "block_sizes": BLOCK_SIZES,
    **{f"algorithm: {name}": table for name, table in ALGORITHMS.items()},
    "auto_quantize": SEARCH,
    "constraints": CONSTRAINTS,
}
NOTES = (
    "Configurations by name: `--recipe INT8_SMOOTHQUANT_CFG`; in a file: JSON, YAML, or one Python "
    "literal (`CFG = {..}`), which is parsed and never run.",
    "In a dictionary `default` comes first here, wherever it stands: its author means what holds "
    "where no other entry does. Newer releases read it in its place, and turn off all before it.",
    "Taken word for word, `*weight_quantizer` also means `lm_head`, vision towers and projectors "
    "where no entry leaves them out; that is told.",
    "Integers: scale absmax / (2^(b-1) - 1), so `int8-channel-narrow`.",
    "Ranges come from the float model there: layers of a block, and blocks, see no rounded weight "
    "and no rounded input (`layerwise` with `get_qdq_activations_from_prev_layer` lets blocks).",
    "GPTQ's Hessians are of rounded inputs, there and here; there later layers of a block also see "
    "what rounded inputs give. The lowest code, -2^(b-1), which GPTQ may reach there, is left out.",
    "AWQ and SmoothQuant scales are of each layer there, and averaged over those of one input when "
    "the checkpoint is written; here there is one, searched for all of them.",
    "Of two quantizers in a row (`W4A8_AWQ_BETA_CFG`) the first counts.",
    "`auto_quantize`: its arguments, or a file of them, are a search and no recipe; the error that "
    "says so has the two commands, `prismquant analyze` and `prismquant search`, filled in.",
)

_FIELDS: Mapping[str, str] = {
    "weight_quantizer": "weights",
    "input_quantizer": "activations",
    "output_quantizer": "outputs",
}
# Near enough to one of these is a slip; globs of other quantizers are not.
_USUAL = ("default", *(f"*{kind}" for kind in KINDS))
_SLIP = 0.85
_CONVOLUTIONS = ("nn.Conv2d", "nn.Conv3d")
_EVERYWHERE = {
    "lm_head": "lm_head",
    "vision towers": "model.visual.blocks.0.mlp.linear_fc1",
}


@dataclass
class _ReadEntries:
    """Entries as far as they were read."""

    rules: list[Fields] = field(default_factory=list)
    linear_alone: bool = True
    four_over_six: bool = False
    configured: set[str] = field(default_factory=set)
    on: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(_EVERYWHERE, False))
    standard: Fields = field(default_factory=dict)
    keys: Fields | None = None
    values: Fields | None = None
    cached: dict[str, str] = field(default_factory=dict)
    formats: list[str] = field(default_factory=list)


def recognizes(content: Any) -> bool:
    """Whether a content is a configuration of this dialect, or the name of one."""
    if isinstance(content, str):
        return content.removeprefix("mtq.") in PRESETS
    if not isinstance(content, Mapping):
        return False
    inner = content.get("quantize")
    whole = isinstance(inner, Mapping) and bool({"quant_cfg", IMPORT} & {*inner})
    return "quant_cfg" in content or is_search(content) or whole


def read(content: Any, source: str) -> Imported:
    """A configuration of ModelOpt in our grammar.

    Args:
        content: As recognized.
        source: Name of the file, or of the configuration.

    Raises:
        RecipeError: It is not valid, or has no counterpart; lists all that is wrong.
    """
    ledger = Ledger(NAME, source)
    if isinstance(content, Mapping):
        content = with_imports(ledger, content, source)
        ledger.require_valid()
        if is_search(content):
            raise refuse_search(content, source, read)
    name = Path(source).stem
    if isinstance(content, str):
        name = content.removeprefix("mtq.")
        if name not in PRESETS:
            ledger.wrong("", f"no configuration is called so; {suggest(name, PRESETS)}")
        content = PRESETS.get(name, {"quant_cfg": []})
    section = SourceSection(ledger, "", content, CONFIG)
    if "quantize" in section:
        section = SourceSection(ledger, "quantize", section.content["quantize"], CONFIG)
    found = _ReadEntries()
    entries = entries_of(ledger, section.at("quant_cfg"), section.content.get("quant_cfg"))
    if entries and not is_base(entries[0]) and any(_layers(one) for one in entries):
        ledger.changed(
            section.at("quant_cfg"),
            entries[0].pattern,
            "weights: int8-channel, activations: int8-tensor",
            "no entry turns all quantizers off first, and those that none sets are so there, too",
        )
        base = {"weights": "int8-channel-narrow", "activations": "int8-tensor-narrow"}
        found.rules.append({"match": {}} | base)
    for entry in entries:
        _read_entry(ledger, entry, found)
    said = algorithm_of(
        ledger,
        section.at("algorithm"),
        section.content.get("algorithm", "max"),
        found.four_over_six,
    )
    body = _body(ledger, section, found, said)
    return ledger.finish({"name": name or NAME} | body)


def _body(ledger: Ledger, section: SourceSection, found: _ReadEntries, said: Fields) -> Fields:
    """The recipe, of all that was read."""
    cache = found.keys or found.values
    if found.keys != found.values:
        ledger.wrong(section.at("quant_cfg"), "keys and values have one format here")
    weighted = any("weights" in rule for rule in found.rules)
    if not weighted and cache is None:
        ledger.wrong(section.at("quant_cfg"), "no weight quantizer is on: nothing to do")
    if not weighted:
        for place in (section.at("algorithm"), *found.formats):
            ledger.overruled(place, "no weight is quantized")
    rules = found.rules if weighted else []
    if rules:
        method = {"match": {}} | said["rule"] | {"tuner": "none"}
        patch: Fields = {"match": {"role": "patch_embed"}, "optional": True}
        patch |= {"skip": True} if found.linear_alone else {"activations": "none"}
        rules = [method, *rules, patch]
    also = [name for name, on in found.on.items() if on]
    if also and weighted:
        why = f"{' and '.join(also)} as well: no entry leaves them out, there neither"
        ledger.changed(section.at("quant_cfg"), "*", "rules", why)
    body: Fields = {"rules": rules, "calibration": said["calibration"]}
    if said["transforms"] and rules:
        body["transforms"] = said["transforms"]
    return body | ({"kv_cache": cache} if cache else {})


def _layers(entry: QuantizerEntry) -> dict[Kind, tuple[str, ...]]:
    """Globs of the layers that an entry means, by the kind of their quantizers."""
    found = {kind: layer_globs(entry.pattern, kind) for kind in KINDS}
    return {kind: globs for kind, globs in found.items() if globs}


def _read_entry(ledger: Ledger, entry: QuantizerEntry, found: _ReadEntries) -> None:
    if not entry.enable and isinstance(entry.cfg, Mapping):
        known = [setting.name for setting in ATTRIBUTES]
        ledger.refuse_unknown(joined(entry.place, "cfg"), _with_words(entry.cfg), known)
    if "bmm_quantizer" in entry.pattern or "softmax_quantizer" in entry.pattern:
        _read_cache(ledger, entry, found)
        return
    if entry.parent and entry.parent not in ("nn.Linear", *_CONVOLUTIONS):
        why = f"no {entry.parent} is quantized here"
        if entry.enable:
            ledger.dropped(entry.place, entry.pattern, why)
        else:
            ledger.honoured(entry.place, entry.pattern, "nothing", why)
        return
    layers = _layers(entry)
    if entry.pattern in DISABLED_LAYERS and not entry.enable and not entry.parent:
        _leave_standard(entry, found)
        ledger.honoured(entry.place, entry.pattern, "skip: true")
        return
    if not layers:
        meant = difflib.get_close_matches(entry.pattern, _USUAL, n=1, cutoff=_SLIP)
        if not meant and not {*"*?["} & {*entry.pattern}:
            meant = [f"*{entry.pattern}*"]
        if meant:
            what = f"{in_quotes(entry.pattern)} means no quantizer"
            ledger.wrong(entry.place, f"{what}; did you mean {shortened(meant[0])}?")
        ledger.dropped(entry.place, entry.pattern, "it means no quantizer of a layer")
        return
    by_globs: dict[tuple[str, ...], Fields] = {}
    for kind, globs in layers.items():
        fields = _fields(ledger, entry, kind, found)
        if fields:
            by_globs.setdefault(globs, {}).update(fields)
    for globs, fields in by_globs.items():
        match = _match(entry, globs)
        found.rules.append({"match": match} | fields | ({"optional": True} if match else {}))
        if "weights" in fields or "skip" in fields:
            _note_extent(entry, globs, fields, found)
    if not by_globs:
        return
    if entry.enable:
        found.formats.append(entry.place)
    told = ", ".join(
        f"{key}: {shown(one)}" for part in by_globs.values() for key, one in part.items()
    )
    ledger.honoured(entry.place, entry.pattern, told)


def _leave_standard(entry: QuantizerEntry, found: _ReadEntries) -> None:
    """Leave alone what every named configuration does, all such entries in a row in one rule.

    Few of these layers are in any model, so that none of them is missed.
    """
    pattern = ".*".join(re.escape(part) for part in entry.pattern.split("*"))
    if found.rules and found.rules[-1] is found.standard:
        [name] = found.standard["match"]["name"]
        found.standard["match"]["name"] = [f"{name}|{pattern}"]
    else:
        found.standard = {"match": {"name": [f"re:{pattern}"]}, "skip": True, "optional": True}
        found.rules.append(found.standard)
    for name, layer in _EVERYWHERE.items():
        if fnmatch.fnmatchcase(layer, layer_globs(entry.pattern, "weight_quantizer")[0]):
            found.on[name] = False


def _match(entry: QuantizerEntry, globs: tuple[str, ...]) -> Fields:
    match: Fields = {"role": "patch_embed"} if entry.parent in _CONVOLUTIONS else {}
    if globs != ("*",):
        match["name"] = list(globs)
    return match


def _note_extent(
    entry: QuantizerEntry, globs: tuple[str, ...], fields: Fields, found: _ReadEntries
) -> None:
    """Remember whether the head and vision towers are on."""
    on = not fields.get("skip", False)
    if on and entry.parent != "nn.Linear":
        found.linear_alone = False
    if entry.parent in _CONVOLUTIONS:
        return
    for name, layer in _EVERYWHERE.items():
        if any(fnmatch.fnmatchcase(layer, glob) for glob in globs):
            found.on[name] = on


def _fields(ledger: Ledger, entry: QuantizerEntry, kind: Kind, found: _ReadEntries) -> Fields:
    """Fields of our rule for the quantizers of one kind that an entry means."""
    key = _FIELDS[kind]
    if entry.cfg is None and entry.enable:
        if kind not in found.configured:
            ledger.wrong(entry.place, f"it turns {kind}s on that no entry before has set")
        elif key != "weights":
            ledger.wrong(entry.place, "write the cfg out: formats of inputs come with their rule")
        return {"skip": False} if key == "weights" else {}
    if not entry.enable:
        return {"skip": True} if key == "weights" else {key: "none"}
    cfg = entry.cfg
    if isinstance(cfg, Mapping) and not cfg:
        ledger.wrong(joined(entry.place, "cfg"), "it is empty")
        return {}
    if isinstance(cfg, list | tuple):
        if not cfg:
            ledger.wrong(joined(entry.place, "cfg"), "it is empty")
            return {}
        if len(cfg) > 1:
            why = "of two quantizers in a row the first counts"
            ledger.changed(joined(entry.place, "cfg"), cfg, key, why)
        cfg = cfg[0]
    section = SourceSection(ledger, joined(entry.place, "cfg"), _with_words(cfg), ATTRIBUTES)
    quantizer = quantizer_of(section, kind)
    found.configured.add(kind)
    found.four_over_six |= quantizer.four_over_six and key == "weights"
    if quantizer.name is None:
        return {}
    fields: Fields = {key: quantizer.name}
    if quantizer.histogram:
        fields["activation_range"] = "percentile"
    return fields


def _with_words(cfg: Any) -> Any:
    return {str(key): one for key, one in cfg.items()} if isinstance(cfg, Mapping) else cfg


def _read_cache(ledger: Ledger, entry: QuantizerEntry, found: _ReadEntries) -> None:
    """Read an entry about what attention multiplies."""
    meant = {
        part: fnmatch.fnmatchcase(f"model.layers.0.self_attn.{part}_quantizer", entry.pattern)
        for part in ("q_bmm", "k_bmm", "v_bmm", "p_bmm", "softmax")
    }
    others = [part for part in ("q_bmm", "p_bmm", "softmax") if meant[part]]
    if entry.enable and others:
        ledger.wrong(entry.place, f"nothing here quantizes {', '.join(others)}; name k and v alone")
        return
    cache = _cache_format(ledger, entry) if entry.enable else None
    if meant["k_bmm"]:
        found.keys = cache
    if meant["v_bmm"]:
        found.values = cache
    parts = [part for part in ("k_bmm", "v_bmm") if meant[part]]
    before = {found.cached[part] for part in parts if part in found.cached}
    found.cached |= dict.fromkeys(parts, entry.place)
    for place in before - {*found.cached.values()}:
        ledger.overruled(place, "a later entry counts")
    ledger.honoured(entry.place, entry.pattern, f"kv_cache: {shown(cache or 'none')}")


def _cache_format(ledger: Ledger, entry: QuantizerEntry) -> Fields | None:
    place = joined(entry.place, "cfg")
    section = SourceSection(ledger, place, _with_words(entry.cfg), ATTRIBUTES)
    quantizer = quantizer_of(section, "input_quantizer", cache=True)
    name = re.sub("-.*", "", quantizer.name or "")
    if name in ("fp8", "int8", "int4") and (quantizer.name or "").split("-")[1] == "tensor":
        return {"format": name}
    ledger.wrong(place, f"a cache is fp8, int8 or int4 with one scale, not {quantizer.name}")
    return None
