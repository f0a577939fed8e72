"""Number formats in the words of MI-optimize: dtypes, ``qtype``, group sizes, zero points."""

from __future__ import annotations

from prismquant.recipe.importers.source_section import SourceSection

_INTEGERS = {f"int{bits}": bits for bits in range(2, 9)}
_SMALL = {"fp8": "fp8", "fp4": "fp4"}
_FLOATS = ("float16", "bfloat16", "float32")
DTYPES = (*_INTEGERS, *_SMALL, *_FLOATS)
_SIZES = {"awq": 128, "awq+gptq": 128, "smoothquant": 128, "zeroquant": 128}
# With a group size that is no word on granularity, what `qtype` says counts.
_WEIGHTS = {"rtn": "per_group", "awq": "per_group", "zeroquant": "per_group"}
_STATIC = "static scales are of the whole tensor: only a_qtype: per_tensor is static"
_FINER = "a scale for each token, which is finer: tensor scales are static here"


def weights_of(section: SourceSection, algo: str) -> str | None:
    """Name of the weights' format, with notes on its keys; None: floating point."""
    dtype = section.word("w_dtype", "", DTYPES)
    if not dtype:
        section.wrong("w_dtype", f"it is missing; one of {', '.join(DTYPES)}")
    if dtype in (*_FLOATS, ""):
        return None
    unit = _weight_unit(section, algo)
    solved = algo.endswith("gptq")
    zero = section.flag("w_has_zero", solved or algo == "awq")
    unsigned = section.flag("w_unsign", True)
    if dtype in _SMALL:
        section.changed("w_dtype", f"weights: {_SMALL[dtype]}-{unit}", _small(dtype))
        for key in ("w_has_zero", "w_unsign"):
            section.dropped(key, "numbers with an exponent have no zero point")
        return f"{_SMALL[dtype]}-{unit}"
    name = f"{dtype}-{unit}-{'asym' if zero else 'narrow'}"
    told = f"weights: {name}"
    section.honoured("w_dtype", told)
    if solved and not zero:
        section.changed("w_has_zero", told, "passed over there: GPTQ has zero points always")
    elif algo in ("zeroquant", "smoothquant") and zero:
        section.changed("w_has_zero", told, f"passed over there: {algo} has none")
    else:
        section.honoured("w_has_zero", told)
    _sign(section, "w_unsign", told, unsigned, zero)
    return name


def inputs_of(section: SourceSection, algo: str) -> str | None:
    """Name of the inputs' format, with notes on its keys; None: floating point."""
    dtype = section.word("a_dtype", "float16", DTYPES)
    if dtype in _FLOATS:
        section.honoured("a_dtype", "activations: none")
        for key in ("a_qtype", "a_groupsize", "a_has_zero", "a_unsign", "quantization_type"):
            section.dropped(key, "inputs stay in floating point")
        return None
    unit = _input_unit(section, algo)
    zero = section.flag("a_has_zero", False)
    unsigned = section.flag("a_unsign", True)
    dynamic = "-dyn" if unit.startswith("g") else ""
    if dtype in _SMALL:
        name = f"{_SMALL[dtype]}-{unit}{dynamic}"
        section.changed("a_dtype", f"activations: {name}", _small(dtype))
        for key in ("a_has_zero", "a_unsign"):
            section.dropped(key, "numbers with an exponent have no zero point")
        return name
    name = f"{dtype}-{unit}-{'asym' if zero else 'narrow'}{dynamic}"
    told = f"activations: {name}"
    if (algo.endswith("gptq") and not algo.startswith("smoothquant")) or algo == "awq":
        section.changed("a_dtype", told, f"refused there: {algo} is for weights alone")
    else:
        section.honoured("a_dtype", told)
    if algo in ("zeroquant", "smoothquant") and zero:
        section.changed("a_has_zero", told, f"passed over there: {algo} has none")
    else:
        section.honoured("a_has_zero", told)
    _sign(section, "a_unsign", told, unsigned, zero)
    return name


def outputs_of(section: SourceSection, algo: str, inputs: str | None) -> str | None:
    """Name of the outputs' format; None: floating point."""
    wanted = section.flag("quant_out", False)
    if not algo.startswith("smoothquant"):
        section.dropped("quant_out", f"{algo} quantizes no outputs", "algo: smoothquant")
        return None
    if wanted and inputs is None:
        section.dropped("quant_out", "as inputs, outputs stay in floating point")
        return None
    section.honoured("quant_out", f"outputs: {inputs if wanted else 'none'}")
    return inputs if wanted else None


def _small(dtype: str) -> str:
    grids = {"fp8": "E4M3 up to 448, as servers have it", "fp4": "E2M1"}
    return f"{grids[dtype]}; documented there, and not reachable"


def _sign(section: SourceSection, key: str, told: str, unsigned: bool, zero: bool) -> None:
    if unsigned or zero:
        section.honoured(key, told, "codes are the same numbers either way")
    else:
        section.changed(key, told, "there a slip in precedence leaves out part of the grid")


def _group_size(section: SourceSection, algo: str) -> int:
    size = section.integer("w_groupsize", 0, -1, 1 << 20)
    other = section.integer("groupsize", 0, -1, 1 << 20)
    if size and other:
        section.dropped("groupsize", "w_groupsize counts")
    return size or other or _SIZES.get(algo, -1)


def _weight_unit(section: SourceSection, algo: str) -> str:
    """Unit that shares a scale of the weights: ``channel``, ``tensor``, or ``g`` with a size."""
    unit = _unit_of_weights(section, algo)
    if "groupsize" in section and not section.content.get("w_groupsize"):
        section.changed("groupsize", f"weights: {unit}", "passed over there")
    return unit


def _unit_of_weights(section: SourceSection, algo: str) -> str:
    size = _group_size(section, algo)
    kinds = ("per_channel", "per_group", "per_tensor", "per_token", "per_dimension")
    kind = section.word("w_qtype", _WEIGHTS.get(algo, "per_channel"), kinds)
    if kind in ("per_token", "per_dimension"):
        section.wrong("w_qtype", f"a weight has no scales {kind}")
    if algo.endswith("gptq"):
        # There the group size alone counts, whatever the kind says.
        unit = f"g{size}" if size > 0 else "channel"
        said = {"per_group": size > 0, "per_channel": size <= 0}.get(kind, False)
        _note_unit(section, unit, "" if said else "GPTQ goes by w_groupsize alone")
        return unit
    if kind == "per_group" and size <= 0:
        _note_unit(section, "channel", "per_group without a size, which fails there")
        return "channel"
    unit = {"per_group": f"g{size}", "per_tensor": "tensor"}.get(kind, "channel")
    section.honoured("w_qtype", f"weights: {unit}")
    if unit.startswith("g"):
        section.honoured("w_groupsize", f"weights: {unit}")
    else:
        section.dropped("w_groupsize", f"w_qtype: {kind} has no groups", "w_qtype: per_group")
    return unit


def _note_unit(section: SourceSection, unit: str, why: str) -> None:
    section.honoured("w_groupsize", f"weights: {unit}")
    if why:
        section.changed("w_qtype", f"weights: {unit}", why)
    else:
        section.honoured("w_qtype", f"weights: {unit}")


def _input_unit(section: SourceSection, algo: str) -> str:
    """Unit that shares a scale of the inputs: ``tensor``, ``token``, or ``g`` with a size."""
    default = "per_token" if algo == "zeroquant" else "per_tensor"
    kinds = ("per_tensor", "per_token", "per_group", "per_channel", "per_dimension")
    kind = section.word("a_qtype", default, kinds)
    dynamic = algo in ("smoothquant", "smoothquant+gptq", "zeroquant")
    when = section.word("quantization_type", "dynamic" if dynamic else "static", _TIMES)
    size = section.integer("a_groupsize", -1, -1, 1 << 20)
    if kind == "per_dimension":
        section.wrong("a_qtype", "no server multiplies inputs with a scale for each feature")
    if kind == "per_group":
        if size <= 0:
            section.wrong("a_groupsize", "per_group needs a size")
        section.honoured("a_groupsize", f"activations: g{size}")
    else:
        section.dropped("a_groupsize", f"a_qtype: {kind} has no groups", "a_qtype: per_group")
    unit = f"g{max(size, 1)}" if kind == "per_group" else "token"
    if kind == "per_tensor":
        unit = "tensor" if when == "static" else "token"
    _note_inputs(section, kind, when, unit)
    return unit


_TIMES = ("static", "dynamic")


def _note_inputs(section: SourceSection, kind: str, when: str, unit: str) -> None:
    told = f"activations: {unit}"
    if kind == "per_tensor" and when == "dynamic":
        section.changed("a_qtype", told, _FINER)
    elif kind == "per_channel":
        section.changed("a_qtype", told, "a scale for each token, as per_token means")
    else:
        section.honoured("a_qtype", told)
    if when == "static" and kind != "per_tensor":
        section.changed("quantization_type", f"{told}, dynamic", _STATIC)
    else:
        section.honoured("quantization_type", told)
