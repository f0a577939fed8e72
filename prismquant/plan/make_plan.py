"""Laying a recipe over a model: one row a layer, and every misfit in one error."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from prismquant.errors import FormatError, PlanError, PrismQuantError, grouped, listed
from prismquant.formats.online_rotation import OnlineRotation
from prismquant.formats.packed import stored_bytes
from prismquant.formats.quantized_layer import OutlierColumns
from prismquant.models.arch import SiteKind
from prismquant.models.bound import BoundModel, BoundSite
from prismquant.models.rotated_towers import online_rotations, untied
from prismquant.numerics.scales import SCALE_DTYPES
from prismquant.plan.bit_layout import DENSE, input_bytes, layout_of
from prismquant.plan.fallback import Asked, Fitted, fit, fit_together
from prismquant.plan.kv_plan import plan_kv_cache
from prismquant.plan.obstacles import remarks_on
from prismquant.plan.plan import OutlierRoom, Plan, PlanRow
from prismquant.plan.recipe_findings import (
    idle_entries,
    idle_rules,
    rules_of_absent_towers,
    torn_experts,
    torn_fusions,
)
from prismquant.plan.transform_plan import (
    idle_rooms,
    outlier_rooms,
    plan_edges,
    plan_transforms,
    rotated_towers,
    unfit_drafts,
    unrotated_values,
)
from prismquant.recipe.layer_config import Options
from prismquant.recipe.resolve import Resolved, resolve_all
from prismquant.recipe.schema import Recipe

_LOOK = "`prismquant inspect MODEL` lists every layer with its modality, role and shape"
_UNTOUCHED = "no rule gives it a weight format"


def make_plan(recipe: Recipe, bound: BoundModel) -> Plan:
    """Lay a recipe over a model.

    Raises:
        RecipeError: A layer's merged fields are impossible.
        PlanError: A rule matches nothing, a group size does not divide, fused layers differ, or a
            layer cannot be stored as asked. One error lists all of them.
    """
    if recipe.choose:
        raise PlanError(
            f"the recipe leaves a choice among {', '.join(one.name for one in recipe.choose)}",
            where=f"recipe {recipe.name!r}",
            remedy="`quantize` makes it on calibration data; or plan `recipe.chosen(name)`",
        )
    resolved = resolve_all(recipe, bound.sites)
    sizes = _source_sizes(bound)
    findings = idle_rules(recipe, bound, resolved.values())
    transforms = plan_transforms(recipe, bound, findings)
    towers = rotated_towers(transforms, bound, findings)
    online = {} if findings else online_rotations(bound, towers)
    own_head = untied(bound, towers)
    rows, misfits = _rows(recipe, bound, resolved, sizes, own_head=own_head)
    rows = [_with_edits(row, online, outlier_rooms(transforms)) for row in rows]
    remedies = {error.remedy for error in misfits.values() if error.remedy}
    # One remedy for all stands once, at the end.
    remedy = remedies.pop() if len(remedies) == 1 and not findings else None
    findings += [
        f"{name}: {error.what}" + (f" ({error.remedy})" if error.remedy and not remedy else "")
        for name, error in misfits.items()
    ]
    findings += [*torn_fusions(rows), *torn_experts(rows)]
    edges = plan_edges(transforms, bound, rows, findings)
    findings += idle_rooms(transforms, rows)
    kv_cache = plan_kv_cache(recipe, bound)
    if not findings and kv_cache is None and not any(row.quantized for row in rows):
        findings.append("no layer is quantized: no rule with `weights` stays in force")
    if findings:
        folded = grouped(findings)
        raise PlanError(
            f"recipe {recipe.name!r} does not fit this {bound.arch.title}:" + listed(folded),
            where=str(bound.folder),
            remedy=remedy or f"{_searched(recipe)}{_LOOK}",
            findings=folded,
        )
    return Plan(
        recipe=recipe.name,
        architecture=bound.arch.name,
        rows=tuple(rows),
        left_alone=tuple((item.name, item.reason) for item in bound.left_alone),
        other_bytes=sum(sizes.values()) - sum(row.float_bytes for row in rows),
        calibration=recipe.calibration,
        towers=towers,
        edges=edges,
        kv_cache=kv_cache,
        remarks=(
            *bound.notes,
            *(remark for _, remark in rules_of_absent_towers(recipe, bound)),
            *idle_entries(recipe, bound),
            *unrotated_values(towers, bound),
            *unfit_drafts(towers, edges, bound),
            *remarks_on(rows, resolved),
            *(kv_cache.remarks() if kv_cache else ()),
        ),
    )


def _searched(recipe: Recipe) -> str:
    """Words on the model that a search found the recipe for; none for any other recipe."""
    if recipe.sensitivity is None:
        return ""
    return (
        f"a search found the recipe for the model that {recipe.sensitivity.file} was analyzed of: "
        "if this is another, analyze it and search again; "
    )


def _rows(
    recipe: Recipe,
    bound: BoundModel,
    resolved: Mapping[str, Resolved],
    sizes: Mapping[str, int],
    *,
    own_head: bool,
) -> tuple[list[PlanRow], dict[str, PrismQuantError]]:
    """A row for each layer; and by name those that cannot be as the recipe says, with why."""
    shards = recipe.tensor_parallel
    followers = _followers(bound, resolved, shards)
    rows: list[PlanRow] = []
    misfits: dict[str, PrismQuantError] = {}
    for site in bound.sites:
        try:
            fitted = followers.get(site.name) or _fitted(site, resolved[site.name], shards)
            rows.append(_row(site, resolved[site.name], fitted, bound, sizes, own_head))
        except (PlanError, FormatError) as error:
            misfits[site.name] = error
    return rows, misfits


def _source_sizes(bound: BoundModel) -> dict[str, int]:
    """Bytes of every tensor by its name on disk; without shards, as the configuration implies."""
    if bound.has_weights:
        reader = bound.shards()
        return {name: reader.info(name).nbytes for name in reader.names}
    head = f"{bound.arch.head}.weight"
    return {
        bound.names.to_disk(name): math.prod(shape) * bound.dtype.itemsize
        for name, shape in bound.shapes.items()
        if not (bound.tied and name == head)
    }


def _fitted(site: BoundSite, asked: Resolved, shards: int) -> Fitted | None:
    """The formats that a layer can have; None where it is left alone."""
    if asked.config.weights is None:
        return None
    return fit(site, asked.config.weights, asked.config.activations, asked.fallback, shards)


def _followers(
    bound: BoundModel, resolved: Mapping[str, Resolved], shards: int
) -> dict[str, Fitted]:
    """Formats of layers that fit but must follow one that they are fused with and that does not."""
    found: dict[str, Fitted] = {}
    for sites in _fused(bound.sites).values():
        asked: dict[str, Asked] = {}
        for site in sites:
            config, fallback = resolved[site.name].config, resolved[site.name].fallback
            if config.weights is not None:
                asked[site.name] = (config.weights, config.activations, fallback)
        if len(asked) == len(sites):
            # A shape that does not fit at all is reported with its own layer.
            with contextlib.suppress(PlanError):
                found |= fit_together(sites, asked, shards)
    return found


def _fused(sites: Iterable[BoundSite]) -> dict[str, list[BoundSite]]:
    """Layers that servers load as one matrix, or as the experts of a block."""
    groups: dict[str, list[BoundSite]] = {}
    for site in sites:
        if site.scheme_key is not None:
            groups.setdefault(site.scheme_key, []).append(site)
    return groups


def _row(
    site: BoundSite,
    asked: Resolved,
    fitted: Fitted | None,
    bound: BoundModel,
    sizes: Mapping[str, int],
    own_head: bool,
) -> PlanRow:
    config, dtype = asked.config, site.dtype
    float_bytes = 0 if site.tied else sizes[f"{site.disk_name}.weight"]
    # A rotation gives a tied head a weight of its own.
    dense_bytes = math.prod(site.weight_shape) * dtype.itemsize if own_head else float_bytes
    note = ""
    if bound.steps[site.step].kind == "head" and config.tuner:
        # The head alone makes up its step: its solver has settled what a tuner would look at.
        note = f"{config.tuner} tunes blocks, not the head"
        config = replace(config, tuner=None, tuner_options=Options())
    if site.expert is None:
        config = config.without_experts()
    elif config.correction is not None:
        note = "an expert is not corrected: the float model sends it other tokens"
        config = replace(config, correction=None)
    row = PlanRow(
        site=site,
        config=config.settled(),
        online=None,
        outliers=None,
        layout=DENSE,
        stored_bytes=dense_bytes if site.tied else float_bytes,
        float_bytes=float_bytes,
        note=note,
    )
    if fitted is None:
        skipped = asked.skipped_by is not None
        why = f"skipped by rules[{asked.skipped_by}]" if skipped else _UNTOUCHED
        return replace(row, note=why)
    if dtype not in SCALE_DTYPES:
        raise PlanError(
            f"its weight is stored as {str(dtype).removeprefix('torch.')}, and scales cannot be",
            remedy="save the model in float32, bfloat16 or float16 first",
        )
    view = bound.views.get(f"{site.disk_name}.weight")
    if view is not None and view.index is None:
        raise PlanError(
            f"its weight is a part of {view.source} on disk, and readers want that whole",
            remedy="leave it alone with `skip: true`, or use the checkpoint in transformers' own "
            "format (of InternVL: the one whose name ends with -hf)",
        )
    if site.tied and not own_head:
        raise PlanError(
            "its weight is tied to the input embeddings, which stay in floating point",
            remedy="leave it alone with `skip: true`",
        )
    if (fitted.weights, fitted.activations) != (config.weights, config.activations):
        config = replace(config, weights=fitted.weights, activations=fitted.activations)
    row = replace(row, config=config.settled(), note=_joined(note, fitted.note))
    if site.kind is SiteKind.PATCH_CONV:
        return _dense_row(row)
    layout = layout_of(fitted.weights, config.activations)
    if layout == DENSE:
        return _unportable_row(row)
    size = stored_bytes((site.out_features, site.in_features), fitted.weights, layout, dtype)
    return replace(row, layout=layout, stored_bytes=size + _side_bytes(row))


def _side_bytes(row: PlanRow) -> int:
    """Bytes of the static scales of input and output."""
    return sum(input_bytes(spec, row.site.dtype) for spec in row.config.sides)


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def _with_edits(
    row: PlanRow, online: Mapping[str, OnlineRotation], rooms: Mapping[str, OutlierRoom]
) -> PlanRow:
    """The row with what happens to its input before it is quantized, and the bytes that takes."""
    rotation, room = online.get(row.site.name), rooms.get(row.site.name)
    size, itemsize = row.stored_bytes, row.site.dtype.itemsize
    if rotation is not None:
        size += rotation.stored_bytes(itemsize)
    if not row.quantized or row.layout == DENSE:
        room = None
    if room is not None:
        size += OutlierColumns.stored_bytes(room.columns, row.site.out_features, itemsize)
    return replace(row, online=rotation, outliers=room, stored_bytes=size)


def _dense_row(row: PlanRow) -> PlanRow:
    if row.config.sides != (None, None):
        raise PlanError(
            "no checkpoint format declares a quantized input for a convolution",
            remedy="set activations: none for the role patch_embed",
        )
    note = _joined(row.note, "a convolution is stored dequantized")
    return replace(row, note=note, stored_bytes=_dense_bytes(row))


def _unportable_row(row: PlanRow) -> PlanRow:
    """A format without a layout of its own: the values it can express, in the model's dtype."""
    size = _dense_bytes(row) + _side_bytes(row)
    return replace(row, note=_joined(row.note, "stored dequantized"), stored_bytes=size)


def _dense_bytes(row: PlanRow) -> int:
    return math.prod(row.site.weight_shape) * row.site.dtype.itemsize
