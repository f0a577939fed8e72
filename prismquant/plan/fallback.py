"""Widths that a number format cannot hold, and the nearest format that can.

Groups and blocks must tile what they cover. Vision towers have widths such as 3420 and 4304, which
no usual group divides, and a server that splits a layer over devices (tensor parallelism) cuts the
width once more: the inputs of layers that close an attention or an MLP, the outputs of those that
open one. All of this is known from shapes alone, so it is found while planning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from prismquant.errors import PlanError
from prismquant.formats.spec import NumberSpec, spec
from prismquant.models.arch import Parallel
from prismquant.models.bound import BoundSite
from prismquant.numerics.kinds import Granularity
from prismquant.recipe.rule import Fallback

# Formats of weight and input, and what to do where they do not fit.
Asked = tuple[NumberSpec, NumberSpec | None, Fallback]

# Group sizes that servers have kernels for; a fallback only picks among these.
_SERVED_GROUPS = (128, 64, 32)
_LISTED_GROUPS = (256, 128, 96, 64, 48, 32, 16)


class Cuttable(Protocol):
    """Properties of a layer that decide which formats fit, and how servers cut it."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def parallel(self) -> Parallel | None: ...
    @property
    def fuse_key(self) -> str | None: ...


@dataclass(frozen=True)
class Fitted:
    """Formats that a layer can have.

    Attributes:
        weights: Of its weight.
        activations: Of its input; None: floating point.
        note: What differs from the formats that were asked for, and why; empty: nothing.
    """

    weights: NumberSpec
    activations: NumberSpec | None
    note: str = ""


def fit(
    site: BoundSite,
    weights: NumberSpec,
    activations: NumberSpec | None,
    fallback: Fallback,
    shards: int = 1,
) -> Fitted:
    """Make sure that a layer's shape can be expressed, or find formats in which it can.

    Args:
        site: The layer.
        weights: The format of its weight that is asked for.
        activations: That of its input.
        fallback: ``error``: refuse a misfit. ``channel``: one scale a row. ``nearest``: the next
            smaller group that servers have kernels for, then one scale a row. Formats whose scales
            need groups (NVFP4, MX, blocks) become 8 bits with one scale a row.
        shards: Over how many devices the layer will be split.

    Returns:
        The formats.

    Raises:
        PlanError: The shape does not fit, with what would.
    """
    reason = misfit(site, weights, activations, shards)
    if reason is None:
        return Fitted(weights, activations)
    candidates = [] if fallback == "error" else _ladder(weights, activations, fallback)
    for candidate in candidates:
        if misfit(site, candidate.weights, candidate.activations, shards) is None:
            return replace(candidate, note=f"{reason}: {_in_words(candidate, activations)} instead")
    raise _refusal(reason, site, weights, shards)


def misfit(
    layer: Cuttable, weights: NumberSpec, activations: NumberSpec | None, shards: int = 1
) -> str | None:
    """Reason for which a layer cannot have formats, in words; None where it can.

    Args:
        layer: The layer.
        weights: The format of its weight.
        activations: That of its input; None: floating point.
        shards: Over how many devices the layer will be split.
    """
    return _misfit(layer, weights, shards) or _misfit_of_input(layer, activations, shards)


def fit_together(
    sites: Sequence[BoundSite],
    asked: Mapping[str, Asked],
    shards: int = 1,
) -> dict[str, Fitted]:
    """Formats for layers that servers give one scheme: where one falls back, all do.

    Args:
        sites: The layers.
        asked: What :func:`fit` takes of each, by name.
        shards: Over how many devices the layers will be split.

    Returns:
        The formats of those that follow another one, by name.

    Raises:
        PlanError: A shape does not fit.
    """
    found = {site.name: fit(site, *asked[site.name], shards) for site in sites}
    candidates = dict.fromkeys(fitted for fitted in found.values() if fitted.note)
    fallen = next((one for one in candidates if _fits_all(one, sites, shards)), None)
    if fallen is None:
        return {}
    formats = (fallen.weights, fallen.activations)
    others = (
        "the other experts of its block" if sites[0].expert else "the layers that it is fused with"
    )
    return {
        name: replace(fallen, note=f"as {others}: {_in_words(fallen, asked[name][1])} instead")
        for name, fitted in found.items()
        if formats not in ((fitted.weights, fitted.activations), asked[name][:2])
    }


def _fits_all(fitted: Fitted, sites: Sequence[BoundSite], shards: int) -> bool:
    """Whether all layers can have the formats of one."""
    return all(misfit(s, fitted.weights, fitted.activations, shards) is None for s in sites)


def _in_words(fitted: Fitted, asked: NumberSpec | None) -> str:
    """Formats in words: of the weight, and of the input where another one was asked for."""
    words = fitted.weights.describe()
    if fitted.activations is None or fitted.activations == asked:
        return words
    return f"{words}, inputs in {fitted.activations.describe()}"


def _ladder(
    weights: NumberSpec, activations: NumberSpec | None, fallback: Fallback
) -> list[Fitted]:
    """Formats to try in place of one that does not fit, nearest first."""
    inputs = activations
    if activations is not None and activations.granularity is Granularity.GROUP:
        inputs = spec("int8-token" if activations.kind == "int" else "fp8-token")
    if not _groups_are_free(weights):
        name = "int8-channel" if weights.kind == "int" else "fp8-channel"
        return [Fitted(spec(name), inputs)]
    channel = replace(weights, granularity=Granularity.CHANNEL, group_size=None)
    if weights.granularity is Granularity.CHANNEL:
        return [Fitted(channel, inputs)]
    smaller = [g for g in _SERVED_GROUPS if g < (weights.group_size or 0)]
    groups = [replace(weights, group_size=g) for g in smaller if fallback == "nearest"]
    return [Fitted(candidate, inputs) for candidate in (*groups, channel)]


def _groups_are_free(weights: NumberSpec) -> bool:
    """Whether the format means the same with another group size, or with none."""
    return weights.scale == "float" and weights.granularity is not Granularity.BLOCK


def _misfit(site: Cuttable, weights: NumberSpec, shards: int) -> str | None:
    """Reason for which a weight cannot have a format; None where it can."""
    cut = _cut_misfit(site, shards)
    if cut is not None:
        return cut
    width, rows = _shard(site, shards)
    size = weights.group_size
    if size is None:
        return None
    if width % size:
        return f"group size {size} does not divide {_width_of(site, width, shards)}"
    if weights.granularity is Granularity.BLOCK and rows % size:
        # A short last block is fine where it ends the matrix that a server holds.
        if rows != site.out_features:
            return f"blocks of {size} rows do not divide its {rows} outputs on each device"
        if site.fuse_key is not None:
            return f"blocks of {size} rows do not divide its {rows} outputs, which servers fuse"
    return None


def _misfit_of_input(site: Cuttable, activations: NumberSpec | None, shards: int) -> str | None:
    """Reason for which an input cannot have a format; None where it can."""
    size = None if activations is None else activations.group_size
    width, _ = _shard(site, shards)
    if size is None or width % size == 0:
        return None
    return f"the input's group size {size} does not divide {_width_of(site, width, shards)}"


def _cut_misfit(site: Cuttable, shards: int) -> str | None:
    rows = site.parallel is Parallel.ROW
    features, side = (site.in_features, "inputs") if rows else (site.out_features, "outputs")
    if site.parallel is not None and features % shards:
        return f"its {features} {side} cannot be split over {shards} devices"
    return None


def _shard(site: Cuttable, shards: int) -> tuple[int, int]:
    """Inputs and outputs of the layer on one device."""
    inputs = shards if site.parallel is Parallel.ROW else 1
    outputs = shards if site.parallel is Parallel.COLUMN else 1
    return site.in_features // inputs, site.out_features // outputs


def _width_of(site: Cuttable, width: int, shards: int) -> str:
    if width == site.in_features:
        return f"its {width} input features"
    return f"the {width} of its {site.in_features} input features on each of {shards} devices"


def _refusal(reason: str, site: Cuttable, weights: NumberSpec, shards: int) -> PlanError:
    """The error that says why a format does not fit, and what would."""
    if _cut_misfit(site, shards) is not None:
        remedy = (
            "plan for a number of devices that divides it, or leave the layer alone (skip: true)"
        )
        return PlanError(reason, remedy=remedy)
    if not _groups_are_free(weights):
        eight = "int8-channel" if weights.kind == "int" else "fp8-channel"
        remedy = (
            f"keep it in 8 bits (weights: {eight}), skip it, or set fallback: nearest (--fallback)"
        )
        return PlanError(reason, remedy=remedy)
    width, _ = _shard(site, shards)
    legal = [str(g) for g in _LISTED_GROUPS if width % g == 0][:3]
    fitting = f"; {', '.join(legal)} would" if legal else ""
    return PlanError(
        reason + fitting,
        remedy="use a group_size that does, granularity channel, or fallback: nearest (--fallback)",
    )
