"""Arguments of ModelOpt's ``auto_quantize``, as the two commands that do the same here.

A search is no recipe: it analyzes a model first. So these arguments are never a run's recipe; what
is told is how to find one.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from prismquant.errors import PrismQuantError, RecipeError
from prismquant.recipe.importers.imported import Imported
from prismquant.recipe.importers.ledger import Ledger, quoted
from prismquant.recipe.importers.source_section import Setting, SourceSection, Table, idle
from prismquant.recipe.resolve import resolve

_PLACE = "named on the command line"
_LAYER = ("llm", "mlp.down", "model.language_model.layers.0.mlp.down_proj")

SEARCH: Table = (
    Setting("quantization_formats", "", "analyze --formats"),
    Setting("candidate_formats", "", "analyze --formats", "of a file"),
    Setting("constraints", "", "search --bits", "see below"),
    Setting("disabled_layers", "[]", "analyze --disable", "globs of layers, as there"),
    Setting("method", "gradient", "analyze --method", "gradient or kl_div; fisher is ours"),
    Setting("auto_quantize_method", "gradient", "analyze --method", "of a file"),
    Setting("num_score_steps", "128", "analyze --samples", "batches there"),
    Setting("score_size", "128", "analyze --samples", "of a file"),
    *(
        idle(name, "samples are read from --calib, losses are built in", "--calib")
        for name in ("data_loader", "forward_step", "loss_func", "forward_backward_step")
    ),
    idle("model", _PLACE, "MODEL"),
    idle("num_calib_steps", "statistics are of the same samples", "analyze --samples"),
    idle("verbose", "progress is always shown"),
    idle("checkpoint", "an analysis that is cut off goes on", "analyze --resume"),
    idle("cost_excluded_layers", "bytes are those of the whole model", "search --cap, --floor"),
    idle("module_search_spaces", "every unit has every format", "search --cap, --floor"),
    idle("fixed_quantization_config", "every unit has every format", "analyze --disable"),
    idle("kv_cache", "name it among the formats", "analyze --formats kv:fp8"),
)
CONSTRAINTS: Table = (
    Setting("effective_bits", "4.8", "search --bits", "of all weights, embeddings and scales too"),
    idle("cost_model", "bytes are those on disk"),
    idle("cost", "bytes are those on disk"),
)


def is_search(content: Mapping[str, Any]) -> bool:
    """Whether a content holds arguments of a search."""
    return isinstance(content.get("auto_quantize"), Mapping) or "quantization_formats" in content


def refuse_search(
    content: Mapping[str, Any], source: str, read: Callable[[Any, str], Imported]
) -> RecipeError:
    """The error for arguments of a search, with the commands that do the same.

    Args:
        content: The arguments, alone or as ``auto_quantize`` of a file.
        source: Name of the file.
        read: Reads the configuration of one format.

    Raises:
        RecipeError: They are not valid themselves.
    """
    ledger = Ledger("modelopt", source)
    inner = content.get("auto_quantize")
    place = "auto_quantize" if isinstance(inner, Mapping) else ""
    section = SourceSection(ledger, place, inner if place else content, SEARCH)
    bits = SourceSection(
        ledger, section.at("constraints"), section.content.get("constraints") or {}, CONSTRAINTS
    ).number("effective_bits", 4.8, 0.01, 16)
    formats = _formats(section, read)
    method = section.content.get("method", section.content.get("auto_quantize_method", "gradient"))
    if method not in ("gradient", "kl_div"):
        section.wrong("method", f"gradient or kl_div, not {quoted(method)}")
    for one, other in _TWICE:
        if one in section and other in section:
            section.wrong(other, f"give either this or {one}")
    disabled = section.words("disabled_layers")
    key = "score_size" if "score_size" in section else "num_score_steps"
    samples = section.integer(key, 128, 1, 1_000_000)
    ledger.require_valid()
    words = ["prismquant", "analyze", "MODEL", "--calib", "DATA", "--formats", ",".join(formats)]
    words += ["--method", str(method), "--samples", str(samples), "--out", "sensitivity.json"]
    words += [word for glob in disabled for word in ("--disable", glob)]
    search = ["prismquant", "search", "sensitivity.json", "--bits", f"{bits:g}", "--out", "r.yaml"]
    return RecipeError(
        "arguments of auto_quantize are a search, not a recipe",
        where=source,
        remedy=f"{shlex.join(words)}; then {shlex.join(search)}; then --recipe r.yaml",
    )


_TWICE = (
    ("method", "auto_quantize_method"),
    ("score_size", "num_score_steps"),
    ("quantization_formats", "candidate_formats"),
)


def _formats(section: SourceSection, read: Callable[[Any, str], Imported]) -> list[str]:
    """Names of the formats, as an analysis takes them."""
    key = "quantization_formats" if "quantization_formats" in section else "candidate_formats"
    listed = section.content.get(key)
    if not isinstance(listed, list | tuple) or not listed:
        section.wrong(key, "a list of configurations, by name or written out")
        return []
    found = []
    for number, one in enumerate(listed):
        if one is None:
            continue
        modality, role, name = _LAYER
        try:
            recipe = read(one, f"{section.at(key)}[{number}]").recipe
            made = resolve(recipe, modality=modality, role=role, name=name).config
        except PrismQuantError as error:
            section.ledger.wrong(f"{section.at(key)}[{number}]", error.what)
            continue
        if made.weights is None:
            section.ledger.wrong(f"{section.at(key)}[{number}]", "it quantizes no MLP layer")
            continue
        inputs = "none" if made.activations is None else made.activations.name
        found.append(f"{made.weights.name}+{inputs}")
    return found
