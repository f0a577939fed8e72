"""Algorithms of ModelOpt's calibration, as solvers, range rules and transforms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prismquant.errors import suggest
from prismquant.recipe.importers.ledger import Ledger, in_quotes, joined, shown
from prismquant.recipe.importers.source_section import Setting, SourceSection, Table, idle

Fields = dict[str, Any]

_COMMON: Table = (
    Setting("method", "max", "solver, transforms, weight_range"),
    Setting("layerwise", "false", "calibration"),
    idle("moe_calib_experts_ratio", "no expert is asked for"),
    idle("distributed_sync", "ranks always share their statistics"),
    idle("shared_states", "layers that servers fuse share what they must"),
    idle("sync_expert_weight_amax", "no expert is asked for"),
    idle("skip_forward_without_activation_calib", "data are read only where they are needed"),
    idle("debug", "the record keeps everything"),
)
ALGORITHMS: Mapping[str, Table] = {
    "max": _COMMON,
    "smoothquant": (
        *_COMMON,
        Setting("alpha", "1.0", "transforms[].options.alpha", "one scale for layers of one input"),
    ),
    "awq_lite": (
        *_COMMON,
        Setting("alpha_step", "0.1", "transforms[].options.grid", "both forms are tried"),
    ),
    "awq_clip": (
        *_COMMON,
        Setting("min_clip_ratio", "0.5", "weight_range.max_shrink", "on the whole Hessian"),
        Setting("shrink_step", "0.05", "weight_range.steps"),
        idle("max_co_batch_size", "memory is bounded anyway"),
        idle("max_tokens_per_batch", "all tokens count"),
    ),
    "awq_full": (
        *_COMMON,
        Setting("alpha_step", "0.1", "transforms[].options.grid", "both forms are tried"),
        Setting("min_clip_ratio", "0.5", "weight_range.max_shrink", "on the whole Hessian"),
        Setting("shrink_step", "0.05", "weight_range.steps"),
        idle("max_co_batch_size", "memory is bounded anyway"),
        idle("max_tokens_per_batch", "all tokens count"),
    ),
    "mse": (
        *_COMMON,
        Setting("start_multiplier", "0.25", "weight_range.max_shrink"),
        Setting("stop_multiplier", "4.0", "", "above absmax only sweep looks, up to twice it"),
        Setting("step_size", "0.1", "weight_range.steps"),
        Setting("fp8_scale_sweep", "false", "weight_range: sweep"),
    ),
    "local_hessian": (
        *_COMMON,
        Setting("fp8_scale_sweep", "true", "weight_range: sweep"),
        *(
            idle(name, "every scale is tried, on each group's own block of the Hessian")
            for name in ("step_size", "start_multiplier", "stop_multiplier", "block_size")
        ),
    ),
    "gptq": (
        *_COMMON,
        Setting("perc_damp", "0.01", "options.damping", "of the mean of the diagonal"),
        Setting("block_size", "128", "options.block_size"),
        idle("fused", "what can be compiled is"),
    ),
}
_REFUSED = {
    "svdquant": "nothing here keeps a part of low rank; nearest: awq_lite",
    "lsq": "nothing here is trained end to end; nearest: tuner: autoround",
    "nvfp4_act_headroom": "nearest: max, with activation_range: percentile",
}


_RANGE_KEYS = (
    *("fp8_scale_sweep", "start_multiplier", "stop_multiplier", "step_size"),
    *("min_clip_ratio", "shrink_step"),
)


def algorithm_of(ledger: Ledger, place: str, value: Any, four_over_six: bool) -> Fields:
    """Fields of rules, transforms and calibration that an algorithm means.

    Args:
        ledger: Where it is noted.
        place: Of the algorithm.
        value: A name, a mapping, a list of either, or None.
        four_over_six: Whether blocks choose between two scales: then that is the range rule.

    Returns:
        ``rule``, ``transforms`` and ``calibration``.
    """
    found: Fields = {
        "rule": {"solver": "rtn", "options": {"scale_weighting": "none"}},
        "transforms": [],
        "calibration": {
            "layer_sequential": False,
            "block_sequential": False,
            "quantized_inputs": False,
        },
    }
    found["rule"]["weight_range"] = {"kind": "minmax"}
    listed = value if isinstance(value, list | tuple) else [value]
    for number, one in enumerate(listed):
        where = f"{place}[{number}]" if isinstance(value, list | tuple) else place
        if one is None:
            ledger.honoured(where, None, "weight_range: minmax")
            continue
        _one(ledger, where, {"method": one} if isinstance(one, str) else one, found)
        for key in _RANGE_KEYS if four_over_six else ():
            ledger.overruled(joined(where, key), "four_over_six counts")
    if four_over_six:
        found["rule"]["weight_range"] = {"kind": "four_over_six"}
    return found


def _one(ledger: Ledger, place: str, value: Any, found: Fields) -> None:
    content = ledger.mapping(place, value)
    method = content.get("method", "max")
    if isinstance(method, str) and method in _REFUSED:
        ledger.wrong(joined(place, "method"), _REFUSED[method])
        return
    method = "max" if method is None else method
    if not isinstance(method, str) or method not in ALGORITHMS:
        known = [*ALGORITHMS, *_REFUSED]
        ledger.wrong(place, f"{in_quotes(method)} is no algorithm; {suggest(str(method), known)}")
        return
    section = SourceSection(ledger, place, content, ALGORITHMS[method])
    # Hessians of GPTQ are of inputs as their quantizers give them, layerwise or not.
    found["calibration"]["quantized_inputs"] |= method == "gptq"
    _layerwise(section, found)
    if method == "smoothquant":
        alpha = section.number("alpha", 1.0, 0, 1)
        found["transforms"].append({"name": "smoothquant", "options": {"alpha": alpha}})
        section.changed(
            "alpha", f"options.alpha: {alpha:.15g}", "one scale for layers of one input"
        )
    if method in ("awq_lite", "awq_full"):
        grid = max(1, round(1 / section.number("alpha_step", 0.1, 0.001, 1)))
        found["transforms"].append({"name": "awq", "options": {"grid": grid, "duo": True}})
        section.changed("alpha_step", f"options.grid: {grid}", "both forms are tried")
    if method in ("awq_clip", "awq_full"):
        _clip(section, found["rule"])
    if method == "mse":
        _mse(section, found["rule"])
    if method == "local_hessian":
        found["rule"]["options"] = {"scale_weighting": "group"}
        found["rule"]["weight_range"] = {"kind": "sweep", "signed_scale": False}
        section.honoured("fp8_scale_sweep", "weight_range: sweep")
    if method == "gptq":
        _gptq(section, found["rule"])
    _told(ledger, place, value, content, method)


def _told(ledger: Ledger, place: str, value: Any, content: Mapping[str, Any], method: str) -> None:
    """Note the method itself, where it stands."""
    where = joined(place, "method") if isinstance(value, Mapping) and "method" in content else place
    ours = {"max": "weight_range: minmax", "mse": "weight_range", "gptq": "solver: gptq"}
    if method in ("smoothquant", "awq_lite", "awq_full"):
        why = "one scale is folded into what precedes all layers of one input"
        ledger.changed(where, method, "transforms", why)
    else:
        ledger.honoured(where, method, ours.get(method, "solver: rtn, options, weight_range"))


def _layerwise(section: SourceSection, found: Fields) -> None:
    value = section.content.get("layerwise")
    given = value if isinstance(value, Mapping) else {"enable": value}
    enabled = given.get("enable") is True
    calibration = found["calibration"]
    if enabled:
        carried = given.get("get_qdq_activations_from_prev_layer") is True
        calibration["block_sequential"] = carried
        calibration["quantized_inputs"] |= carried
    section.honoured("layerwise", f"calibration: {shown(calibration)}")


def _clip(section: SourceSection, rule: Fields) -> None:
    least = section.number("min_clip_ratio", 0.5, 0.01, 1)
    step = section.number("shrink_step", 0.05, 0.001, 1)
    shrink = min(0.99, 1 - least)
    steps = max(2, round(shrink / step))
    rule["options"] = {"scale_weighting": "group"}
    rule["weight_range"] = _grid(shrink, steps)
    section.honoured("min_clip_ratio", f"weight_range.max_shrink: {shrink:.15g}")
    section.honoured("shrink_step", f"weight_range.steps: {steps}")


def _grid(shrink: float, steps: int) -> Fields:
    """Scales from absmax downwards, of which the least squared error decides."""
    return {
        "kind": "mse",
        "max_shrink": shrink,
        "steps": steps,
        "norm": 2.0,
        "signed_scale": False,
    }


def _mse(section: SourceSection, rule: Fields) -> None:
    if section.flag("fp8_scale_sweep", False):
        rule["weight_range"] = {"kind": "sweep", "signed_scale": False}
        section.honoured("fp8_scale_sweep", "weight_range: sweep")
        for key in ("start_multiplier", "stop_multiplier", "step_size"):
            section.dropped(key, "every scale is tried, there too")
        return
    section.honoured("fp8_scale_sweep", "weight_range: mse")
    start = section.number("start_multiplier", 0.25, 0.01, 1)
    step = section.number("step_size", 0.1, 0.001, 1)
    shrink = min(0.99, 1 - start)
    steps = max(2, round(shrink / step) + 1)
    rule["weight_range"] = _grid(shrink, steps)
    section.honoured("start_multiplier", f"weight_range.max_shrink: {shrink:.15g}")
    section.honoured("step_size", f"weight_range.steps: {steps}")
    section.changed("stop_multiplier", "weight_range: mse", "nothing above absmax is tried")


def _gptq(section: SourceSection, rule: Fields) -> None:
    rule["solver"] = "gptq"
    rule["options"] = {
        "block_size": section.integer("block_size", 128, 1, 65536),
        "order": "original",
        "scale_weighting": "none",
        "refine_passes": 0,
    } | section.damping("perc_damp")
    section.honoured("block_size", f"options.block_size: {rule['options']['block_size']}")
