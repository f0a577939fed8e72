"""What will be done, row by row: a recipe laid over a model.

Everything that can be known without weights is decided here, before any long work: the number
format of every layer, how its codes are chosen, in which layout it is stored, and how many bytes
it takes. All misfits are reported together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from prismquant.algorithms.correction import Correction
from prismquant.algorithms.methods import EQUALIZERS, build_solver
from prismquant.algorithms.split import Split
from prismquant.errors import FormatError, ModelError, PlanError, PrismQuantError, grouped, listed
from prismquant.formats.packed import stored_bytes
from prismquant.formats.spec import NumberSpec
from prismquant.models.arch import Modality, SiteKind
from prismquant.models.bound import BoundEdge, BoundModel, BoundSite
from prismquant.models.rotation import OnlineRotation, Rotation, online_rotations, untied
from prismquant.numerics.ranges import RangeRule
from prismquant.plan.bit_layout import DENSE, input_bytes, is_declarable, layout_of
from prismquant.plan.fallback import Asked, Fitted, fit, fit_together
from prismquant.plan.kv_plan import KVPlan, plan_kv_cache
from prismquant.recipe.match import Match
from prismquant.recipe.schema import (
    ROTATION,
    SPLIT,
    Calibration,
    OnFailure,
    Recipe,
    Setting,
    resolve,
)
from prismquant.storage import ShardReader

_LOOK = "`prismquant inspect MODEL` lists every layer with its modality, role and shape"


@dataclass(frozen=True)
class PlanRow:
    """What happens to one layer.

    Attributes:
        site: The layer.
        weights: Its weight's number format; None: left alone.
        activations: Its input's number format; None: floating point.
        outputs: Its output's number format; None: floating point.
        solver: The method that chooses the codes.
        options: Its options.
        correction: How far its weight is corrected for what precedes it; None: not.
        tuner: Who improves the codes on the block's output; None: nobody, and always at the head.
        tuner_options: Its options.
        vision_weight: What a vision token counts for in the language model's statistics.
        online: What happens to its input before anything else; None: nothing.
        split: When single input columns are kept in floating point; None: never.
        weight_range: How the weight's range is chosen.
        activation_range: How a static input's range is chosen.
        on_failure: What to do where the solver fails: ``stop``, or ``rtn``, round to nearest.
        layout: ``pack-quantized``, ``int-quantized``, or ``dense`` (floating point on disk).
        stored_bytes: Bytes that the weight, its scales and zero points take on disk.
        float_bytes: Bytes that the weight takes in the source.
        note: Why it is left alone, or what differs from the recipe's words.
    """

    site: BoundSite
    weights: NumberSpec | None
    activations: NumberSpec | None
    outputs: NumberSpec | None
    solver: str
    options: Mapping[str, Any]
    correction: Correction | None
    tuner: str | None
    tuner_options: Mapping[str, Any]
    vision_weight: float | Literal["gradient"]
    online: OnlineRotation | None
    split: Split | None
    weight_range: RangeRule
    activation_range: RangeRule
    on_failure: OnFailure
    layout: str
    stored_bytes: int
    float_bytes: int
    note: str

    @property
    def static_input(self) -> bool:
        """Whether a static activation scale must be calibrated."""
        return self.activations is not None and self.activations.calibrated

    @property
    def needs_data(self) -> bool:
        """Whether calibration samples must pass this layer."""
        if self.weights is None:
            return False
        observed = self.static_input or self.static_output or self.split is not None
        return observed or self.needs_float_chain or self.needs_hessian

    @property
    def can_fail(self) -> bool:
        """Whether its codes hang on statistics that may turn out to be of no use."""
        return self.weights is not None and (self.needs_hessian or self.correction is not None)

    @property
    def needs_tokens(self) -> bool:
        """Whether it cannot be done at all if no calibration token reaches it."""
        observed = self.static_input or self.static_output or self.split is not None
        falls_back = self.on_failure == "rtn" and not observed and self.tuner is None
        return self.needs_data and not falls_back

    @property
    def static_output(self) -> bool:
        """Whether a static scale of the output must be calibrated."""
        return self.outputs is not None and self.outputs.calibrated

    @property
    def sides(self) -> tuple[NumberSpec | None, NumberSpec | None]:
        """Number formats of input and output."""
        return (self.activations, self.outputs)

    @property
    def stored_dense(self) -> bool:
        """Whether the weight is stored dequantized."""
        return self.layout == DENSE

    @property
    def private_activations(self) -> bool:
        """Whether inputs or outputs are quantized in a way that no checkpoint format declares."""
        activations = [spec for spec in self.sides if spec is not None]
        return any(self.stored_dense or not is_declarable(spec) for spec in activations)

    @property
    def undeclared_rounding(self) -> bool:
        """Whether readers may round the scales of dynamic inputs by another rule."""
        dynamic = [spec for spec in self.sides if spec is not None and spec.dynamic]
        # For E4M3 the rule that is declared is that of servers: it rounds up but for a hair.
        same = ("e8m0-ceil", "e4m3")
        return any(
            spec.scale.startswith("e8m0-") and (spec.scale, spec.kind) != same for spec in dynamic
        )

    @property
    def needs_hessian(self) -> bool:
        """Whether its solver asks for second moments."""
        return build_solver(self.solver, self.options).needs_hessian

    @property
    def needs_float_chain(self) -> bool:
        """Whether the float model's states are needed beside those of the quantized one."""
        return self.correction is not None or self.tuner is not None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "name": self.site.name,
            "disk_name": self.site.disk_name,
            "modality": str(self.site.modality),
            "role": self.site.role,
            "kind": str(self.site.kind),
            "shape": list(self.site.weight_shape),
            "weights": self.weights.describe() if self.weights else None,
            "activations": self.activations.describe() if self.activations else None,
            "outputs": self.outputs.describe() if self.outputs else None,
            "solver": self.solver if self.weights else None,
            "options": dict(self.options) if self.weights else {},
            "correction": asdict(self.correction) if self.correction else None,
            "tuner": self.tuner,
            "tuner_options": dict(self.tuner_options),
            "vision_weight": self.vision_weight,
            "online": _online_name(self.online),
            "split": asdict(self.split) if self.split else None,
            "weight_range": asdict(self.weight_range) if self.weights else None,
            "activation_range": asdict(self.activation_range)
            if self.static_input or self.static_output
            else None,
            "on_failure": self.on_failure if self.weights else None,
            "layout": self.layout,
            "stored_bytes": self.stored_bytes,
            "float_bytes": self.float_bytes,
            "note": self.note,
        }


@dataclass(frozen=True)
class PlanEdge:
    """Scale that is moved from the readers of an edge to its upper end, or back.

    Attributes:
        edge: The edge.
        equalizer: The method that chooses the scale.
        options: Its options.
    """

    edge: BoundEdge
    equalizer: str
    options: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "source": self.edge.source,
            "readers": list(self.edge.consumers),
            "equalizer": self.equalizer,
            "options": dict(self.options),
        }


@dataclass(frozen=True)
class Plan:
    """One row per layer, in the order of the work.

    Attributes:
        recipe: Name of the recipe.
        architecture: Name of the architecture.
        rows: The layers.
        left_alone: Layers that no site describes, each with the reason.
        other_bytes: Bytes of all tensors that are no layer's weight: embeddings, norms, biases.
        calibration: How statistics are gathered.
        rotations: Which towers are rotated, and how.
        edges: Along which edges scale is moved, in the order of the work.
        kv_cache: What happens to the language model's keys and values; None: nothing.
        remarks: What a user should know of the checkpoint: who cannot load it, and why.
    """

    recipe: str
    architecture: str
    rows: tuple[PlanRow, ...]
    left_alone: tuple[tuple[str, str], ...]
    other_bytes: int
    calibration: Calibration
    rotations: tuple[Rotation, ...] = ()
    edges: tuple[PlanEdge, ...] = ()
    kv_cache: KVPlan | None = None
    remarks: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[PlanRow, ...]:
        """The rows that change something."""
        return tuple(row for row in self.rows if row.weights is not None)

    @property
    def needs_data(self) -> bool:
        """Whether calibration samples are needed."""
        told = bool(self.edges) or self.kv_cache is not None
        return told or any(row.needs_data for row in self.quantized)

    @property
    def needs_float_chain(self) -> bool:
        """Whether the float model's states are needed beside those of the quantized one."""
        return any(row.needs_float_chain for row in self.quantized)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors on disk afterwards, without file headers."""
        scales = 0 if self.kv_cache is None else self.kv_cache.stored_bytes
        return self.other_bytes + scales + sum(row.stored_bytes for row in self.rows)

    @property
    def float_bytes(self) -> int:
        """Bytes of all tensors in the source."""
        return self.other_bytes + sum(row.float_bytes for row in self.rows)

    def totals(self) -> dict[str, dict[str, int]]:
        """Per modality: layers, quantized layers, bytes before and after."""
        totals: dict[str, dict[str, int]] = {}
        for row in self.rows:
            entry = totals.setdefault(
                str(row.site.modality),
                {"layers": 0, "quantized": 0, "float_bytes": 0, "stored_bytes": 0},
            )
            entry["layers"] += 1
            entry["quantized"] += row.weights is not None
            entry["float_bytes"] += row.float_bytes
            entry["stored_bytes"] += row.stored_bytes
        return totals

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "recipe": self.recipe,
            "architecture": self.architecture,
            "rows": [row.to_dict() for row in self.rows],
            "left_alone": [{"name": n, "reason": r} for n, r in self.left_alone],
            "rotations": [asdict(rotation) for rotation in self.rotations],
            "edges": [edge.to_dict() for edge in self.edges],
            "kv_cache": self.kv_cache.to_dict() if self.kv_cache else None,
            "remarks": list(self.remarks),
            "other_bytes": self.other_bytes,
            "totals": self.totals(),
            "total_bytes": self.total_bytes,
            "float_bytes": self.float_bytes,
            "calibration": self.calibration.model_dump(mode="json"),
        }

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the result except weights and data."""
        return plan_fingerprint(self.to_dict())


def plan_fingerprint(content: Mapping[str, Any]) -> str:
    """The fingerprint of the plan that :meth:`Plan.to_dict` made this of; names and remarks do not
    enter, which decide nothing.
    """
    body = {key: value for key, value in content.items() if key not in ("recipe", "remarks")}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def make_plan(recipe: Recipe, bound: BoundModel) -> Plan:
    """Lay a recipe over a model.

    Raises:
        RecipeError: A layer's merged fields are impossible.
        PlanError: A rule matches nothing, a group size does not divide, fused layers differ, or a
            layer cannot be stored as asked. One error lists all of them.
    """
    settings = {
        site.name: resolve(recipe, modality=site.modality, role=site.role, name=site.name)
        for site in bound.sites
    }
    sizes = _source_sizes(bound)
    findings = _idle_rules(recipe, bound, settings.values())
    rotations = _rotations(recipe, bound, findings)
    rows, misfits = _rows(recipe, bound, settings, sizes, rotations, sound=not findings)
    remedies = {error.remedy for error in misfits.values() if error.remedy}
    # One remedy for all stands once, at the end.
    remedy = remedies.pop() if len(remedies) == 1 and not findings else None
    findings += [
        f"{name}: {error.what}" + (f" ({error.remedy})" if error.remedy and not remedy else "")
        for name, error in misfits.items()
    ]
    findings += _torn_fusions(rows)
    edges = _edges(recipe, bound, rows, findings)
    findings += _idle_splits(recipe, rows)
    kv_cache = plan_kv_cache(recipe, bound)
    if not findings and kv_cache is None and not any(row.weights for row in rows):
        findings.append("no layer is quantized: no rule with `weights` stays in force")
    if findings:
        raise PlanError(
            f"recipe {recipe.name!r} does not fit this {bound.arch.title}:"
            + listed(grouped(findings)),
            where=str(bound.folder),
            remedy=remedy or _LOOK,
        )
    return Plan(
        recipe=recipe.name,
        architecture=bound.arch.name,
        rows=tuple(rows),
        left_alone=tuple(bound.left_alone),
        other_bytes=sum(sizes.values()) - sum(row.float_bytes for row in rows),
        calibration=recipe.calibration,
        rotations=rotations,
        edges=edges,
        kv_cache=kv_cache,
        remarks=(
            *bound.notes,
            *_idle_entries(recipe, bound),
            *_remarks(rows),
            *(kv_cache.remarks() if kv_cache else ()),
        ),
    )


def problem_groups(rows: Sequence[PlanRow]) -> list[list[PlanRow]]:
    """Rows of one stage that read the same input and are quantized alike, to be solved together."""
    groups: dict[str, list[PlanRow]] = {}
    for row in rows:
        settings = row.to_dict()
        key = [row.site.input_key, str(row.site.dtype)] + [
            settings[k]
            for k in (
                "weights",
                "activations",
                "solver",
                "options",
                "correction",
                "vision_weight",
                "split",
                "weight_range",
                "activation_range",
                "on_failure",
            )
        ]
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(row)
    return list(groups.values())


def _rows(
    recipe: Recipe,
    bound: BoundModel,
    settings: Mapping[str, Setting],
    sizes: Mapping[str, int],
    rotations: tuple[Rotation, ...],
    *,
    sound: bool,
) -> tuple[list[PlanRow], dict[str, PrismQuantError]]:
    """A row for each layer; and by name those that cannot be as the recipe says, with why.

    Rotations are laid over the rows only where they are ``sound``.
    """
    shards = recipe.tensor_parallel
    followers = _followers(bound, settings, shards)
    online = online_rotations(bound, rotations) if sound else {}
    own_head = untied(bound, rotations)
    splits = _splits(recipe, bound)
    rows: list[PlanRow] = []
    misfits: dict[str, PrismQuantError] = {}
    for site in bound.sites:
        try:
            fitted = followers.get(site.name) or _fitted(site, settings[site.name], shards)
            row = _row(site, settings[site.name], fitted, bound, sizes, own_head)
            rows.append(_with_input(row, online.get(site.name), splits.get(site.name)))
        except (PlanError, FormatError) as error:
            misfits[site.name] = error
    return rows, misfits


def _source_sizes(bound: BoundModel) -> dict[str, int]:
    """Bytes of every tensor by its name on disk; without shards, as the configuration implies."""
    if bound.has_weights:
        reader = ShardReader(bound.folder)
        return {name: reader.info(name).nbytes for name in reader.names}
    head = f"{bound.arch.head}.weight"
    return {
        bound.names.to_disk(name): math.prod(shape) * bound.dtype.itemsize
        for name, shape in bound.shapes.items()
        if not (bound.tied and name == head)
    }


def _fitted(site: BoundSite, setting: Setting, shards: int) -> Fitted | None:
    """The formats that a layer can have; None where it is left alone."""
    if setting.weights is None:
        return None
    return fit(site, setting.weights, setting.activations, setting.fallback, shards)


def _followers(
    bound: BoundModel, settings: Mapping[str, Setting], shards: int
) -> dict[str, Fitted]:
    """Formats of layers that fit but must follow one that they are fused with and that does not."""
    found: dict[str, Fitted] = {}
    for sites in _fused(bound.sites).values():
        asked: dict[str, Asked] = {}
        for site in sites:
            setting = settings[site.name]
            if setting.weights is not None:
                asked[site.name] = (setting.weights, setting.activations, setting.fallback)
        if len(asked) == len(sites):
            # A shape that does not fit at all is reported with its own layer.
            with contextlib.suppress(PlanError):
                found |= fit_together(sites, asked, shards)
    return found


def _fused(sites: Iterable[BoundSite]) -> dict[str, list[BoundSite]]:
    """Layers that servers load as one matrix."""
    groups: dict[str, list[BoundSite]] = {}
    for site in sites:
        if site.fuse_key is not None:
            groups.setdefault(site.fuse_key, []).append(site)
    return groups


def _row(
    site: BoundSite,
    setting: Setting,
    fitted: Fitted | None,
    bound: BoundModel,
    sizes: Mapping[str, int],
    own_head: bool,
) -> PlanRow:
    dtype = site.dtype
    float_bytes = 0 if site.tied else sizes[f"{site.disk_name}.weight"]
    # A rotation gives a tied head a weight of its own.
    dense_bytes = math.prod(site.weight_shape) * dtype.itemsize if own_head else float_bytes
    head = bound.steps[site.step].kind == "head"
    row = PlanRow(
        site=site,
        weights=setting.weights,
        activations=setting.activations,
        outputs=setting.outputs,
        solver=setting.solver,
        options=setting.options,
        correction=setting.correction,
        # The head alone makes up its step: its solver has settled what a tuner would look at.
        tuner=None if head else setting.tuner,
        tuner_options={} if head else setting.tuner_options,
        vision_weight=setting.vision_weight,
        online=None,
        split=None,
        weight_range=setting.weight_range,
        activation_range=setting.activation_range,
        on_failure=setting.on_failure,
        layout=DENSE,
        stored_bytes=dense_bytes if site.tied else float_bytes,
        float_bytes=float_bytes,
        note=_unused(setting, head=head),
    )
    if fitted is None:
        return row
    if site.tied and not own_head:
        raise PlanError(
            "its weight is tied to the input embeddings, which stay in floating point",
            remedy="leave it alone with `skip: true`",
        )
    weights = fitted.weights
    note = "; ".join(filter(None, [row.note, fitted.note]))
    row = replace(row, weights=weights, activations=fitted.activations, note=note)
    if site.kind is SiteKind.PATCH_CONV:
        return _dense_row(row, dtype)
    layout = layout_of(weights, row.activations)
    if layout == DENSE:
        return _unportable_row(row, dtype)
    size = stored_bytes((site.out_features, site.in_features), weights, layout, dtype)
    size += input_bytes(row.activations, dtype) + input_bytes(row.outputs, dtype)
    return replace(row, layout=layout, stored_bytes=size)


def _unused(setting: Setting, *, head: bool) -> str:
    """Why a layer is left alone, or what of the recipe does not reach it."""
    if setting.weights is None:
        return "no rule gives it a weight format"
    return f"{setting.tuner} tunes blocks, not the head" if head and setting.tuner else ""


def _with_input(row: PlanRow, online: OnlineRotation | None, split: Split | None) -> PlanRow:
    """The row with what happens to its input before it is quantized, and the bytes that takes."""
    size, dtype = row.stored_bytes, row.site.dtype
    if online is not None:
        signs = 0 if online.signs is None else row.site.in_features
        size += online.block**2 * dtype.itemsize + signs
    if split is not None and row.weights is not None and row.layout != DENSE:
        size += split.columns * (4 + row.site.out_features * dtype.itemsize)
    else:
        split = None
    return replace(row, online=online, split=split, stored_bytes=size)


def _rotations(recipe: Recipe, bound: BoundModel, findings: list[str]) -> tuple[Rotation, ...]:
    """The rotations that are asked for, at most one for each tower."""
    chosen: dict[Modality, Rotation] = {}
    for index, transform in enumerate(recipe.transforms):
        if transform.name != ROTATION:
            continue
        if Modality.PROJECTOR in transform.match.modality:
            findings.append(
                f"transforms[{index}]: the projector is not rotated itself, it follows both of its "
                "neighbours: match vision or llm"
            )
        towers = (Modality.VISION, Modality.LLM)
        for rotation in transform.rotations(towers):
            if rotation.modality in chosen:
                findings.append(
                    f"transforms[{index}]: the {rotation.modality} tower is rotated twice"
                )
            chosen[rotation.modality] = rotation
    try:
        online_rotations(bound, tuple(chosen.values()))
    except ModelError as error:
        findings.append(error.what + (f" ({error.remedy})" if error.remedy else ""))
    return tuple(chosen.values())


def _splits(recipe: Recipe, bound: BoundModel) -> dict[str, Split]:
    """Where columns may be split off; a later transform wins."""
    return {
        site.name: transform.split()
        for transform in recipe.transforms
        if transform.name == SPLIT
        for site in bound.sites
        if transform.match.means(site)
    }


def _idle_splits(recipe: Recipe, rows: Sequence[PlanRow]) -> list[str]:
    splittable = [row.site for row in rows if row.split is not None]
    return [
        f"transforms[{index}] ({SPLIT}) matches no layer that is stored quantized"
        for index, transform in enumerate(recipe.transforms)
        if transform.name == SPLIT and not any(map(transform.match.means, splittable))
    ]


def _edges(
    recipe: Recipe, bound: BoundModel, rows: Sequence[PlanRow], findings: list[str]
) -> tuple[PlanEdge, ...]:
    """Edges along which scale is moved: those with a reader that matches and is quantized.

    A rotation at run time lies between the two ends of an edge and mixes its channels, so no scale
    passes it.
    """
    quantized = {row.site.name for row in rows if row.weights is not None}
    mixed = {row.site.name for row in rows if row.online is not None}
    open_edges = [edge for edge in bound.edges if not mixed.intersection(edge.consumers)]
    chosen: list[PlanEdge] = []
    for index, transform in enumerate(recipe.transforms):
        if transform.name not in EQUALIZERS:
            continue
        meant = [edge for edge in open_edges if _reads(edge, bound, quantized, transform.match)]
        if not meant:
            findings.append(
                f"transforms[{index}] ({transform.name}) matches no edge: none ends in a quantized "
                "layer that it means and whose input is not rotated at run time"
            )
        chosen += [PlanEdge(edge, transform.name, transform.options) for edge in meant]
    return tuple(chosen)


def _reads(edge: BoundEdge, bound: BoundModel, quantized: set[str], match: Match) -> bool:
    sites = [bound.site(name) for name in edge.consumers]
    if any(site.tied for site in sites):
        return False
    return any(site.name in quantized and match.means(site) for site in sites)


def _online_name(online: OnlineRotation | None) -> str | None:
    if online is None:
        return None
    return f"hadamard {online.block}" + ("" if online.signs is None else " with signs")


def _remarks(rows: Sequence[PlanRow]) -> tuple[str, ...]:
    """Who cannot load the checkpoint as it will be, and why."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for why in _obstacles(row):
            found.setdefault(why, []).append(row.site.name)
    return tuple(f"{why}: {names[0]}{_and_more(names)}" for why, names in found.items())


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _obstacles(row: PlanRow) -> list[str]:
    found = []
    if row.online is not None and row.online.signs is not None:
        found.append("only prismquant.load applies signs before a rotation at run time")
    elif row.online is not None and row.site.has_bias:
        found.append("vLLM has no rotation before a layer with a bias; prismquant.load has")
    elif row.online is not None:
        found.append(
            "the rotation at run time is declared as a transform of compressed-tensors: vLLM "
            "applies it without tensor parallelism, transformers ignores it and computes nonsense"
        )
    if row.split is not None:
        found.append("only prismquant.load keeps split columns in floating point")
    if row.private_activations:
        found.append(f"no checkpoint format declares {_scheme(row)}: only prismquant.load does it")
    elif row.undeclared_rounding:
        found.append(
            "no checkpoint format declares how the scales of dynamic MX inputs are rounded: only "
            "prismquant.load does it as the recipe says, transformers does it as compressed-tensors"
        )
    return found


def _dense_row(row: PlanRow, dtype: torch.dtype) -> PlanRow:
    if row.activations is not None or row.outputs is not None:
        raise PlanError(
            "no checkpoint format declares a quantized input for a convolution",
            remedy="set activations: none for the role patch_embed",
        )
    note = "; ".join(filter(None, [row.note, "a convolution is stored dequantized"]))
    return replace(row, note=note, stored_bytes=math.prod(row.site.weight_shape) * dtype.itemsize)


def _unportable_row(row: PlanRow, dtype: torch.dtype) -> PlanRow:
    """A format without a layout of its own: the values it can express, in the model's dtype."""
    note = "; ".join(filter(None, [row.note, "stored dequantized"]))
    size = math.prod(row.site.weight_shape) * dtype.itemsize
    size += input_bytes(row.activations, dtype) + input_bytes(row.outputs, dtype)
    return replace(row, note=note, stored_bytes=size)


def _idle_rules(recipe: Recipe, bound: BoundModel, settings: Iterable[Setting]) -> list[str]:
    used = {index for setting in settings for index in setting.rules}
    modalities = sorted({str(site.modality) for site in bound.sites})
    roles = sorted({site.role for site in bound.sites})
    return [
        f"rules[{index}] matches no layer: "
        f"{rule.match.model_dump(mode='json', exclude_defaults=True)}; "
        f"modalities: {', '.join(modalities)}; roles: {', '.join(roles)}"
        for index, rule in enumerate(recipe.rules)
        if index not in used
    ]


def _idle_entries(recipe: Recipe, bound: BoundModel) -> list[str]:
    """What stands in a rule's lists and means no layer, although the rule itself does."""
    matches = [(f"rules[{index}]", rule.match) for index, rule in enumerate(recipe.rules)]
    matches += [(f"transforms[{index}]", t.match) for index, t in enumerate(recipe.transforms)]
    return [
        f"{where}.match: {entry} means no layer of this model"
        for where, match in matches
        for entry in match.idle_entries(bound.sites)
    ]


def _torn_fusions(rows: Sequence[PlanRow]) -> list[str]:
    """Servers load q/k/v and gate/up as one matrix each: their schemes must agree."""
    groups: dict[str, list[PlanRow]] = {}
    for row in rows:
        if row.site.fuse_key is not None:
            groups.setdefault(row.site.fuse_key, []).append(row)
    findings = []
    for members in groups.values():
        schemes = {(row.weights, row.activations, row.outputs) for row in members}
        if len(schemes) > 1:
            listed = "; ".join(f"{row.site.role}: {_scheme(row)}" for row in members)
            findings.append(
                f"{members[0].site.name} and its neighbours are fused by servers "
                f"and must share a scheme, but: {listed}"
            )
        elif _shares_global_scale(members) and len(problem_groups(members)) > 1:
            findings.append(
                f"{members[0].site.name} and its neighbours are fused by servers and share one "
                "global scale, so they must be solved alike: give them the same solver, options, "
                "range, correction and on_failure"
            )
    return findings


def _shares_global_scale(rows: Sequence[PlanRow]) -> bool:
    return any(row.weights is not None and row.weights.scale == "e4m3" for row in rows)


def _scheme(row: PlanRow) -> str:
    if row.weights is None:
        return "float"
    inputs = f", input {row.activations.describe()}" if row.activations else ""
    outputs = f", output {row.outputs.describe()}" if row.outputs else ""
    return row.weights.describe() + inputs + outputs
