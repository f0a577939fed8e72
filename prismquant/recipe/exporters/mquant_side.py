"""Flags of one side of MQuant, vision or language: bits, static scales, rounding, clips."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from prismquant.algorithms.methods import build_solver
from prismquant.formats.spec import NumberSpec
from prismquant.numerics.kinds import Granularity
from prismquant.numerics.rules import RangeRule
from prismquant.recipe.exporters.export_ledger import WorkNotes, note_fallback
from prismquant.recipe.exporters.layer_work import LayerWork
from prismquant.recipe.exporters.written_gptq import damping, refined

Fields = dict[str, Any]

# The search of the shrink factor there.
_CLIP = RangeRule("mse", max_shrink=0.8, steps=80, norm=2.4, signed_scale=False)
_FLOAT = 16


@dataclass(frozen=True)
class SideFlags:
    """Setting of a side's layers.

    Attributes:
        w_bits, a_bits: Widths; 16 is floating point.
        static, rtn, clip: Flags of the side.
        w_asym, w_groupsize, percdamp, act_order: Flags that both sides share, as this one has them;
            None where it has no use for one.
        a_asym, a_groupsize: Likewise.
    """

    w_bits: int
    a_bits: int
    static: bool
    rtn: bool
    clip: bool
    w_asym: bool
    w_groupsize: int | None
    percdamp: float | None
    act_order: bool | None
    a_asym: bool | None
    a_groupsize: int | None

    def own_words(self, name: str) -> list[str]:
        """Flags of the side alone."""
        words = [f"--{name}_w_bits", str(self.w_bits), f"--{name}_a_bits", str(self.a_bits)]
        flags = {"static": self.static, "w_rtn": self.rtn, "w_clip": self.clip}
        return words + [f"--{name}_{flag}" for flag, on in flags.items() if on]

    def shared(self) -> Fields:
        """Flags that are of both sides."""
        names = ("w_asym", "w_groupsize", "percdamp", "act_order", "a_asym", "a_groupsize")
        return {name: getattr(self, name) for name in names}

    def of_pixels(self, usual: SideFlags) -> SideFlags:
        """The setting of a layer whose input stays in floating point, with the inputs of others."""
        if self.a_bits != _FLOAT:
            return self
        return replace(
            self,
            a_bits=usual.a_bits,
            static=usual.static,
            a_asym=usual.a_asym,
            a_groupsize=usual.a_groupsize,
        )


def side_flags(work: LayerWork) -> SideFlags | None:
    """The nearest setting to a layer's work; None where its numbers are no integers."""
    config = work.config
    weights, inputs = config.weights, config.activations
    if weights is None or weights.kind != "int" or weights.scale != "float":
        return None
    known = inputs is not None and inputs.kind == "int" and inputs.scale == "float"
    static = known and inputs is not None and not inputs.dynamic
    rtn = config.solver == "rtn"
    options: Any = build_solver(config.solver, config.options)
    mean = rtn or options.damping_basis == "mean" or not options.damping
    dynamic = inputs if known and not static else None
    return SideFlags(
        w_bits=weights.bits,
        a_bits=inputs.bits if known and inputs is not None else _FLOAT,
        static=static,
        rtn=rtn,
        clip=config.weight_range.kind != "minmax",
        w_asym=not weights.symmetric,
        w_groupsize=None if rtn else _size(weights),
        percdamp=None if rtn else float(options.damping) if mean else 0.01,
        act_order=None if rtn else options.order != "original",
        a_asym=None if dynamic is None else not dynamic.symmetric,
        a_groupsize=None if dynamic is None else _size(dynamic),
    )


def _size(spec: NumberSpec) -> int:
    return spec.group_size or -1 if spec.granularity == Granularity.GROUP else -1


def note_side(notes: WorkNotes, name: str, shared: Fields) -> None:
    """Note the work on layers that get the setting of their side.

    Args:
        notes: On the layers.
        name: ``visual`` or ``llm``.
        shared: Flags of both sides, as they are written.
    """
    config, flags = notes.config, side_flags(notes.work)
    assert flags is not None
    assert config.weights is not None
    _note_weights(notes, name, flags, shared)
    _note_inputs(notes, name, flags, shared)
    if config.outputs is not None:
        notes.dropped("outputs", config.outputs.name, "no outputs are quantized there")
    elif notes.said("outputs"):
        notes.written("outputs", "none", "no outputs are quantized")
    options: Any = build_solver(config.solver, config.options)
    if flags.rtn:
        notes.written("solver", "rtn", f"--{name}_w_rtn")
    else:
        notes.written("solver", "gptq", f"no --{name}_w_rtn")
        value = damping(notes, options, "--percdamp")
        if shared["percdamp"] != value:
            notes.changed("options.damping", value, f"--percdamp {shared['percdamp']}", _SHARED)
        wide = "sorted by the diagonal alone there" if options.order == "pivot" else ""
        other = _SHARED if shared["act_order"] != flags.act_order else ""
        told = "--act_order" if shared["act_order"] else "no --act_order"
        notes.either("options.order", options.order, told, other or wide)
        refined(notes, options)
        if notes.said("options.block_size"):
            told = "blocks do not change the codes, and are of 128 columns there"
            notes.written("options.block_size", options.block_size, "", told)
    _note_range(notes, name, flags, options)
    _note_fallback(notes, flags)


def _note_fallback(notes: WorkNotes, flags: SideFlags) -> None:
    value = notes.work.fallback
    if not flags.w_groupsize or flags.w_groupsize < 0:
        note_fallback(notes, "")
    elif value != "error" or notes.said("fallback"):
        why = "where groups do not divide a width, the last one is smaller there"
        notes.changed("fallback", value, f"--w_groupsize {flags.w_groupsize}", why)


_SHARED = "vision and language share it there"


def _note_weights(notes: WorkNotes, name: str, flags: SideFlags, shared: Fields) -> None:
    spec = notes.config.weights
    assert spec is not None
    size = -1 if flags.rtn else shared.get("w_groupsize", -1)
    told = f"--{name}_w_bits {spec.bits}" + (f" --w_groupsize {size}" if size > 0 else "")
    told += " --w_asym" if shared["w_asym"] else ""
    whys = []
    if spec.granularity in (Granularity.TENSOR, Granularity.BLOCK):
        whys.append("a scale for each row there")
    elif _size(spec) != size:
        whys.append("rounding to nearest is by channel there" if flags.rtn else _SHARED)
    if shared["w_asym"] == spec.symmetric:
        whys.append(_SHARED)
    elif spec.symmetric and spec.narrow == flags.clip:
        how = "the full grid" if flags.clip else "a scale of absmax / (2^(b-1) - 1)"
        whys.append(f"{how} there, {'with' if flags.clip else 'without'} --{name}_w_clip")
    notes.either("weights", spec.name, told, "; ".join(dict.fromkeys(whys)))


def _note_inputs(notes: WorkNotes, name: str, flags: SideFlags, shared: Fields) -> None:
    spec = notes.config.activations
    if spec is None:
        if notes.said("activations"):
            notes.written("activations", "none", f"--{name}_a_bits 16, or pixels")
        return
    if flags.a_bits == _FLOAT:
        notes.dropped("activations", spec.name, "numbers there are integers", f"--{name}_a_bits 8")
        return
    told = f"--{name}_a_bits {spec.bits}" + (f" --{name}_static" if flags.static else "")
    whys = []
    if flags.static:
        if not spec.symmetric or spec.narrow:
            whys.append("static scales are of the full grid there")
    else:
        if not spec.narrow and spec.symmetric:
            whys.append("a scale of absmax / (2^(b-1) - 1) there")
        if shared["a_asym"] != flags.a_asym:
            whys.append(_SHARED)
        if shared["a_groupsize"] != flags.a_groupsize:
            whys.append(_SHARED)
    notes.either("activations", spec.name, told, "; ".join(dict.fromkeys(whys)))
    if flags.static:
        kind = notes.config.activation_range.kind
        why = "" if kind == "minmax" else "the range holds every value there"
        notes.either("activation_range", kind, f"--{name}_static", why)


def _note_range(notes: WorkNotes, name: str, flags: SideFlags, options: Any) -> None:
    rule = notes.config.weight_range
    value: Any = rule.kind
    if rule.kind == "mse":
        value = {key: getattr(rule, key) for key in ("kind", "max_shrink", "steps", "norm")}
    told = f"--{name}_w_clip" if flags.clip else f"no --{name}_w_clip"
    why = ""
    if flags.clip and rule != _CLIP:
        same = replace(rule, signed_scale=False) == _CLIP
        why = "scales have no sign there" if same else "it shrinks by 0.8 in 80 steps, norm 2.4"
    notes.either("weight_range", value, told, why)
    if options.scale_weighting != "none" and flags.clip:
        given = options.scale_weighting
        notes.changed("options.scale_weighting", given, told, "columns count alike there")
    elif notes.said("options.scale_weighting"):
        notes.written("options.scale_weighting", options.scale_weighting, told)
