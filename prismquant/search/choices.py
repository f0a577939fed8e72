"""Units of choice of a model, and what each may be, with exact bytes.

A unit of choice is a set of layers that must share a format, because readers load them as one
matrix: queries, keys and values; gate and up. Keys and values of the whole language model are one
unit as well. For every format on offer a recipe with that format everywhere is laid over the model,
so that each layer becomes what it would really become: its shape may not fit, it may have no layout
of its own, a convolution's input stays in floating point. A unit's format touches no other unit,
so the bytes of any mix are the sum of its options' bytes and the fixed ones.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from prismquant.check.planned_checkpoint import KV_CACHE, refusals
from prismquant.check.target_reader import TargetReader
from prismquant.errors import ArgumentError, grouped, shortened
from prismquant.models.arch import Modality, Parallel
from prismquant.models.bound import BoundModel, BoundSite
from prismquant.numerics.scales import SCALE_DTYPES
from prismquant.plan.kv_plan import KVPlan
from prismquant.plan.make_plan import make_plan
from prismquant.plan.plan import Plan, PlanRow
from prismquant.recipe.schema import Recipe, parse_recipe
from prismquant.search.format_grammar import numbers_of, rule_of
from prismquant.search.sensitivity import FLOAT, Choice, ChoiceUnit, FormatOption, LayerShape

# Layers of a unit whose names a unit's name spells out.
_SPELLED = 4
_PATCH_EMBED = {"match": {"role": "patch_embed"}, "activations": "none"}


@dataclass(frozen=True)
class UnitRows:
    """A unit of choice with the rows of the plan that each of its options means.

    Attributes:
        unit: The unit, whose options have no scores yet; to leave it alone is the only one where
            its layers are left out of the choice.
        sites: Its layers, in the order of the model; empty for the key-value cache.
        rows: Rows of its layers by the option's name; none for :data:`FLOAT` and for caches.
        caches: Plans of the key-value cache by the option's name; none for layers.
    """

    unit: ChoiceUnit
    sites: tuple[BoundSite, ...] = ()
    rows: Mapping[str, tuple[PlanRow, ...]] = field(default_factory=dict)
    caches: Mapping[str, KVPlan] = field(default_factory=dict)


@dataclass(frozen=True)
class Choices:
    """Everything that can be chosen in a model.

    Attributes:
        formats: Formats on offer, by name.
        units: Units of choice, in the order of the model, and those that are left alone; the
            key-value cache is the last.
        plans: For every format the plan in which all units have it.
        fixed_bytes: Bytes of all tensors on disk that no unit holds.
        fixed_weights: How many numbers these hold. A head that is tied to the embeddings takes no
            bytes, but its unit has their numbers.
        notes: Layers that are left alone and why, and what formats become where shapes do not fit.
    """

    formats: Mapping[str, Choice]
    units: tuple[UnitRows, ...]
    plans: Mapping[str, Plan]
    fixed_bytes: int
    fixed_weights: int
    notes: tuple[str, ...]


def make_choices(
    bound: BoundModel,
    formats: Mapping[str, Choice],
    *,
    solver: str = "gptq",
    solver_options: Mapping[str, Any] | None = None,
    modalities: Iterable[str] = (),
    disable: Iterable[str] = (),
) -> Choices:
    """Find the units of choice of a model, and the rows and bytes of each in every format.

    Args:
        bound: The model.
        formats: The formats on offer.
        solver: The method that chooses codes.
        solver_options: Its options.
        modalities: Those that are chosen for; none: all.
        disable: Names of layers, or of modules that hold them, in which ``*`` and ``?`` stand for
            others; a unit with such a layer is left alone.

    Raises:
        ArgumentError: Nothing is left to choose, or a format of a cache has no language model.
        PlanError, RecipeError: A format cannot be laid over the model.
    """
    names, patterns = tuple(modalities) or tuple(Modality), tuple(disable)
    alone, notes = _left_alone(bound, names, patterns)
    _refuse_idle(bound, formats, names, alone)
    plans = {
        name: make_plan(_recipe(name, choice, alone, solver, solver_options or {}), bound)
        for name, choice in formats.items()
    }
    refused = {name: _refusals(plan, bound) for name, plan in plans.items()}
    caches = {name: plan for name, plan in plans.items() if formats[name].cache is not None}
    chosen = {name: _by_layer(plan) for name, plan in plans.items() if name not in caches}
    every = next(iter(plans.values()))
    floats = {row.site.name: row.float_bytes for row in every.rows}
    units = [
        _unit(bound, sites, floats, {} if sites in alone else chosen, formats)
        for sites in _fused(bound)
    ]
    if caches:
        units.append(_cache_unit(bound, caches))
    units = [_with_refusals(one, refused) for one in units]
    held = sum(layer.weights for one in units for layer in one.unit.layers)
    return Choices(
        formats=dict(formats),
        units=tuple(units),
        plans=plans,
        fixed_bytes=every.other_bytes,
        fixed_weights=_numbers(bound) - held,
        notes=(*notes, *_fallbacks(units)),
    )


def _refuse_idle(
    bound: BoundModel,
    formats: Mapping[str, Choice],
    modalities: Sequence[str],
    alone: Sequence[tuple[BoundSite, ...]],
) -> None:
    """Refuse formats that no unit could have."""
    cached = [name for name, choice in formats.items() if choice.cache is not None]
    if len(cached) < len(formats) and len(alone) == len(_fused(bound)):
        raise ArgumentError(
            "nothing is left to choose: every layer is left alone",
            where="--modalities and --disable",
            remedy="name other modalities, or disable fewer layers",
        )
    if cached and Modality.LLM not in modalities:
        raise ArgumentError(
            "formats of the key-value cache are named, but the language model is left out",
            where="--formats and --modalities",
            remedy=f"leave out {', '.join(cached)}, or choose for llm, too",
        )


def _refusals(plan: Plan, bound: BoundModel) -> dict[str, dict[str, str]]:
    """By layer, and for keys and values, the readers that refuse the plan's format, with why."""
    found: dict[str, dict[str, str]] = {}
    for reader in TargetReader:
        for layer, why in refusals(plan, bound, reader).items():
            found.setdefault(layer, {})[reader.value] = why
    return found


def _with_refusals(
    unit: UnitRows, refused: Mapping[str, Mapping[str, Mapping[str, str]]]
) -> UnitRows:
    """The unit, each option with the readers that refuse any of its layers."""
    names = [site.name for site in unit.sites] or [KV_CACHE]

    def told(option: FormatOption) -> FormatOption:
        by_layer = refused.get(option.format, {})
        readers = {
            reader: why
            for name in reversed(names)
            for reader, why in by_layer.get(name, {}).items()
        }
        return replace(option, refused=dict(sorted(readers.items())))

    options = tuple(told(option) for option in unit.unit.options)
    return replace(unit, unit=replace(unit.unit, options=options))


def _fused(bound: BoundModel) -> list[tuple[BoundSite, ...]]:
    """Layers of each unit, in the order of the model."""
    found: dict[str, list[BoundSite]] = {}
    for site in bound.sites:
        found.setdefault(site.scheme_key or site.name, []).append(site)
    return [tuple(sites) for sites in found.values()]


def _left_alone(
    bound: BoundModel, modalities: Sequence[str], patterns: Sequence[str]
) -> tuple[list[tuple[BoundSite, ...]], list[str]]:
    """Layers of the units that are not chosen for; and lines that tell which and why."""
    found: list[tuple[BoundSite, ...]] = []
    lines: list[str] = []
    for sites in _fused(bound):
        disabled = [site.name for site in sites if _matched(site.name, patterns)]
        reasons = [why for site in sites if (why := _obstacle(site))]
        if disabled:
            reasons.append("disabled" if len(sites) == 1 else f"{disabled[0]} is disabled")
        if sites[0].modality not in modalities:
            found.append(sites)
        elif reasons:
            found.append(sites)
            lines.append(f"left alone: {_name(sites)}: {reasons[0]}")
    names = [site.name for site in bound.sites]
    idle = [p for p in patterns if not any(_matched(name, [p]) for name in names)]
    lines = [*grouped(lines), *(f"--disable {shortened(p)} names no layer" for p in idle)]
    gone = [word.value for word in Modality if word not in modalities]
    return found, [*([f"left alone: {' and '.join(gone)}"] if gone else []), *lines]


def _matched(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern means the layer, or a module that holds it."""
    parts = name.split(".")
    holders = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(one, pattern) for pattern in patterns for one in holders)


def _obstacle(site: BoundSite) -> str:
    """Reason for which a layer cannot be quantized at all; empty: none."""
    if site.tied:
        return "its weight is tied to the input embeddings, which stay in floating point"
    if site.dtype not in SCALE_DTYPES:
        return f"stored as {str(site.dtype).removeprefix('torch.')}, which scales cannot be"
    return ""


def _recipe(
    name: str,
    choice: Choice,
    alone: Sequence[tuple[BoundSite, ...]],
    solver: str,
    options: Mapping[str, Any],
) -> Recipe:
    """The recipe that gives a format to everything that is chosen for."""
    if choice.cache is not None:
        content = {"name": name, "kv_cache": dict(choice.cache), "rules": []}
        return parse_recipe(content, source=name)
    rule = rule_of(choice) | {"solver": solver} | ({"options": dict(options)} if options else {})
    rules = [rule, _PATCH_EMBED]
    if alone:
        names = [site.name for sites in alone for site in sites]
        rules.append({"match": {"name": names}, "skip": True})
    return parse_recipe({"name": name, "rules": rules}, source=name)


def _by_layer(plan: Plan) -> dict[str, PlanRow]:
    return {row.site.name: row for row in plan.rows}


def _numbers(bound: BoundModel) -> int:
    """Count of all numbers on disk; without shards, as the configuration implies."""
    if bound.has_weights:
        reader = bound.shards()
        return sum(math.prod(reader.info(name).shape) for name in reader.names)
    tied = f"{bound.arch.head}.weight" if bound.tied else None
    return sum(math.prod(shape) for name, shape in bound.shapes.items() if name != tied)


def _unit(
    bound: BoundModel,
    sites: tuple[BoundSite, ...],
    floats: Mapping[str, int],
    chosen: Mapping[str, Mapping[str, PlanRow]],
    formats: Mapping[str, Choice],
) -> UnitRows:
    """A unit of layers with its options; ``chosen`` is empty where it is left alone."""
    rows = {name: tuple(by_layer[s.name] for s in sites) for name, by_layer in chosen.items()}
    options = [FormatOption(FLOAT, sum(floats[site.name] for site in sites))]
    options += [_option(name, formats[name], members) for name, members in rows.items()]
    unit = ChoiceUnit(
        name=_name(sites),
        modality=sites[0].modality.value,
        step=bound.steps[sites[0].step].name,
        kind="layers",
        layers=tuple(_shape(site) for site in sites),
        options=tuple(options),
    )
    return UnitRows(unit, sites, rows)


def _shape(site: BoundSite) -> LayerShape:
    cut: dict[Parallel | None, Literal["row", "column"] | None] = {
        None: None,
        Parallel.ROW: "row",
        Parallel.COLUMN: "column",
    }
    return LayerShape(
        name=site.name,
        role=site.role,
        out_features=site.out_features,
        in_features=site.in_features,
        parallel=cut[site.parallel],
        fused=site.fuse_key is not None,
    )


def _option(name: str, choice: Choice, rows: Sequence[PlanRow]) -> FormatOption:
    asked = tuple(spec.name for spec in numbers_of(choice) if spec is not None)
    formats = {row.site.name: _names(row) for row in rows}
    differing = {layer: "/".join(names) for layer, names in formats.items() if names != asked}
    return FormatOption(name, sum(row.stored_bytes for row in rows), formats=differing)


def _names(row: PlanRow) -> tuple[str, ...]:
    """Names of the formats of a layer's weight and input."""
    specs = (row.config.weights, row.config.activations)
    return tuple(spec.name for spec in specs if spec is not None)


def _cache_unit(bound: BoundModel, plans: Mapping[str, Plan]) -> UnitRows:
    cached = [site for site in bound.sites if site.cache is not None]
    numbers = sum(site.out_features for site in cached)
    alone = sum(site.out_features * site.dtype.itemsize for site in cached)
    options = [FormatOption(FLOAT, 0, alone)]
    caches = {name: plan.kv_cache for name, plan in plans.items() if plan.kv_cache is not None}
    for name, cache in caches.items():
        each = -(-numbers * cache.spec.number.bits // 8)
        options.append(FormatOption(name, cache.stored_bytes, each))
    unit = ChoiceUnit(
        name=KV_CACHE,
        modality=Modality.LLM.value,
        step=bound.arch.tower(Modality.LLM).root,
        kind="kv_cache",
        layers=(),
        options=tuple(options),
    )
    return UnitRows(unit, caches=caches)


def _name(sites: Sequence[BoundSite]) -> str:
    """The common beginning of the layers' names, and what tells them apart."""
    if len(sites) == 1:
        return sites[0].name
    paths = [site.name.split(".") for site in sites]
    columns = zip(*(path[:-1] for path in paths), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, columns))
    ends = [".".join(path[common:]) for path in paths]
    told = ends if len(ends) <= _SPELLED else [ends[0], "..", ends[-1]]
    return ".".join([*paths[0][:common], f"{{{','.join(told)}}}"])


def _fallbacks(units: Iterable[UnitRows]) -> list[str]:
    """Lines on rows that are not quite what was asked for."""
    return grouped(
        f"{name}: {row.site.name}: {row.note}"
        for unit in units
        for name, rows in unit.rows.items()
        for row in rows
        if row.note
    )
