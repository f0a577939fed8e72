"""Recipes of MI-optimize: ``quant_config`` with an algorithm, its arguments, and calibration.

    quant_config:
      algo: smoothquant
      kwargs: {w_dtype: int8, a_dtype: int8, w_qtype: per_channel, a_qtype: per_token, alpha: 0.5}

The tool knows language models alone, so rules are about the language model. Codes without a zero
point go from ``-(2^(b-1) - 1)`` to ``2^(b-1) - 1`` there, with scales of absmax over the latter: a
narrow format. GPTQ and AWQ always have, or by default have, zero points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prismquant.arguments import MAX_SAMPLES
from prismquant.patterns import compile_pattern
from prismquant.recipe.importers.imported import Imported
from prismquant.recipe.importers.integer_formats import inputs_of, outputs_of, weights_of
from prismquant.recipe.importers.ledger import Ledger, joined, quoted, shown
from prismquant.recipe.importers.source_section import Setting, SourceSection, Table, idle
from prismquant.recipe.match import MAX_EXPRESSIONS

Fields = dict[str, Any]

NAME = "mi-optimize"

_TRANSFORMS = {"awq": "awq", "smoothquant": "smoothquant", "spinquant": "rotation"}
ALGORITHMS = (
    *("rtn", "gptq", "awq", "smoothquant", "zeroquant", "spinquant"),
    *("awq+gptq", "smoothquant+gptq", "spinquant+gptq"),
)
_REFUSED = {
    "spqr": "no outlier is kept in a sparse matrix here; nearest: gptq, with transforms: [split]",
    "quip": "no codebook and no rotation of every layer's input here; nearest: spinquant+gptq",
    "fp8": "write algo: rtn with w_dtype: fp8",
}

TEXTS = ("wikitext2", "c4", "ptb", "pileval")
"""Texts that are known here by the names that the tool has for them."""
_NAME = Setting("calibrate_name", "", "--calib", "wikitext2, c4, ptb, pileval; others are dropped")

CONFIG: Table = (
    Setting("algo", "", "solver, transforms"),
    Setting("kwargs", "", "rules"),
    Setting("calibrate_config", "", "calibration"),
    _NAME,
    idle("model_type", "the checkpoint's configuration says it"),
)
KWARGS: Table = (
    Setting("w_dtype", "", "weights", "fp8 is E4M3 up to 448, fp4 is E2M1; float16: left alone"),
    Setting("a_dtype", "float16", "activations", "float16, float32: none"),
    Setting("w_qtype", "by algo", "weights", "per_channel, per_group, per_tensor"),
    Setting("a_qtype", "by algo", "activations", "dynamic per_tensor becomes per token"),
    Setting("w_groupsize", "-1; awq, smoothquant, zeroquant 128", "weights", "-1: per channel"),
    Setting("a_groupsize", "-1", "activations", "with a_qtype: per_group alone"),
    Setting("groupsize", "", "weights", "as w_groupsize, which counts more; passed over there"),
    Setting("w_has_zero", "false; gptq, awq true", "weights", "without: a narrow format"),
    Setting("a_has_zero", "false", "activations", "without: a narrow format"),
    Setting("w_unsign", "true", "", "codes are the same numbers either way"),
    Setting("a_unsign", "true", "", "codes are the same numbers either way"),
    Setting("quantization_type", "by algo", "activations", "static is per_tensor alone"),
    Setting("skip_layers", "[lm_head]", "skip: true", "regular expressions of the whole path"),
    Setting("blocksize", "128", "options.block_size"),
    Setting("percdamp", "0.01", "options.damping", "of the mean of the diagonal"),
    Setting("actorder", "true", "options.order", "groups stay those of the original order"),
    Setting("alpha", "0.5", "transforms[].options.alpha", "one scale for layers with one input"),
    Setting("quant_out", "false", "outputs"),
    Setting("auto_scale", "true", "transforms[]: awq", "one scale for layers with one input"),
    Setting("auto_clip", "true", "options.scale_weighting: group", "on all tokens, not on one"),
    Setting("block_sequential", "false", "calibration.block_sequential"),
    Setting("layer_sequential", "false", "calibration.layer_sequential"),
    Setting("num_calibrate", "128", "calibration.samples", "passed over there"),
    idle("calibrate_seq_length", "named on the command line", "--seq-length"),
    _NAME,
    idle("model_type", "the checkpoint's configuration says it"),
    idle("device", "named on the command line", "--device"),
    idle("offload", "--memory-budget decides what waits where", "--memory-budget"),
    idle("w_qscheme", "w_has_zero and w_qtype say it", "w_has_zero, w_qtype"),
)
CALIBRATE: Table = (
    Setting("nsamples", "128", "calibration.samples"),
    Setting("nsample", "", "calibration.samples", "passed over there, for want of an s"),
    Setting("num_calibrate", "", "calibration.samples", "passed over there"),
    Setting("seed", "42", "calibration.seed"),
    Setting("name", "", "--calib", "wikitext2, c4, ptb, pileval; others are dropped"),
    _NAME,
    Setting("split", "", "--calib", "with the name: wikitext2:train"),
    *(
        idle(name, "named on the command line", "--calib")
        for name in ("calibrate_subject", "calibrate_nums", "task_name", "dataset_name", "shuffle")
    ),
    *(
        idle(name, "named on the command line", "--seq-length")
        for name in ("seqlen", "calibrate_seqlen", "calibrate_seq_length")
    ),
)
TABLES: Mapping[str, Table] = {
    "quant_config": CONFIG,
    "kwargs": KWARGS,
    "calibrate_config": CALIBRATE,
}
NOTES = (
    "A text that `calibrate_config` names (`wikitext2`, `c4`, `ptb`, `pileval`) is read from the "
    "Hugging Face hub where no `--calib` is given; without a network, give it as a `.txt` file.",
    "`algo`: `rtn`, `gptq`, `awq`, `smoothquant`, `zeroquant`, `spinquant`, and `awq+gptq`, "
    "`smoothquant+gptq`, `spinquant+gptq`. `spqr` and `quip` are errors. `zeroquant` is formats "
    "alone there and here; `tuner: zeroquant` would add the distillation of the paper.",
    "The tool knows language models alone: its rules are about the language model here, too; "
    "vision towers and projectors stay in floating point.",
    "Zero points: a range is widened to hold zero here, as in GPTQ there; so groups of one sign "
    "alone come to other codes than those of `rtn` and `awq` there.",
    "Codes without a zero point: `-(2^(b-1) - 1)` to `2^(b-1) - 1`, scale absmax over the latter "
    "(`int8-channel-narrow`). With `w_unsign: false` a slip in precedence makes the grid smaller "
    "there; here it is the same.",
    "GPTQ's groups are found in the order of the columns there, from weights that were corrected "
    "already; here they are of the original order, from the weights as they are.",
    "AWQ, SmoothQuant: each layer has a scale of its own there, divided out at run time; here one "
    "is folded into what precedes all layers that share an input, so that any server can run it.",
    "After `awq` or `smoothquant`, the Hessian of `+gptq` is of unscaled inputs there; here it is "
    "of those that the layer sees.",
    "`per_token` reduces over the tokens of a sequence there, for inputs with three axes; here "
    "every token has its scale.",
)


def recognizes(content: Any) -> bool:
    """Whether a content is a recipe of this dialect: quant_config, or an algorithm with dtypes."""
    if not isinstance(content, Mapping):
        return False
    if "quant_config" in content or ("algo" in content and ("kwargs" in content)):
        return True
    return "w_dtype" in content or (
        bool(content) and all(_is_algorithm(key, value) for key, value in content.items())
    )


def _is_algorithm(key: Any, value: Any) -> bool:
    known = isinstance(key, str) and key in (*ALGORITHMS, *_REFUSED)
    return known and isinstance(value, Mapping) and "kwargs" in value


def read(content: Any, source: str) -> Imported:
    """A recipe of MI-optimize in our grammar.

    Args:
        content: As recognized.
        source: Name of the file.

    Raises:
        RecipeError: It is not valid, or has no counterpart; lists all that is wrong.
    """
    ledger = Ledger(NAME, source)
    place, config = _config(ledger, "", ledger.mapping("", content))
    top = SourceSection(ledger, place, config, CONFIG)
    algo = _algorithm(top)
    arguments = SourceSection(ledger, top.at("kwargs"), top.content.get("kwargs") or {}, KWARGS)
    given = top.content.get("calibrate_config") or {}
    section = SourceSection(ledger, top.at("calibrate_config"), given, CALIBRATE)
    calibration = _calibration(arguments, section)
    rule = _rule(arguments, algo)
    rules: list[Fields] = [{"match": {"modality": "llm"}} | rule]
    skipped = _skipped(arguments)
    if skipped:
        rules.append({"match": {"name": skipped}, "skip": True, "optional": True})
    transforms = _transforms(arguments, algo, rule)
    _note_algorithm(top, algo, bool(transforms))
    body: Fields = {"name": Path(source).stem or NAME, "rules": rules, "calibration": calibration}
    data = _data(top, arguments, section)
    imported = ledger.finish(body | ({"transforms": transforms} if transforms else {}))
    return replace(imported, data=data)


def _config(ledger: Ledger, place: str, content: Mapping[str, Any]) -> tuple[str, Fields]:
    """The place and the keys of ``quant_config``, of whichever of the forms it was given in."""
    if "quant_config" in content:
        ledger.refuse_unknown(place, content, ["quant_config"])
        inner = joined(place, "quant_config")
        return _config(ledger, inner, ledger.mapping(inner, content["quant_config"]))
    named = [key for key, value in content.items() if _is_algorithm(key, value)]
    if len(named) > 1:
        ledger.wrong(place, f"it holds {len(named)} recipes ({', '.join(named)}): keep one")
    if named:
        inner = joined(place, named[0])
        return inner, {"algo": named[0], **ledger.mapping(inner, content[named[0]])}
    if "kwargs" in content:
        return place, dict(content)
    # Documented as one flat mapping as well.
    known = [setting.name for setting in CONFIG]
    inner_ones = {
        k for k, value in content.items() if isinstance(value, Mapping) and k not in known
    }
    ledger.refuse_unknown(place, dict.fromkeys(sorted(inner_ones)), known)
    content = {key: value for key, value in content.items() if key not in inner_ones}
    top = {key: content[key] for key in ("algo", "calibrate_config") if key in content}
    return place, top | {"kwargs": {k: v for k, v in content.items() if k not in top}}


def _algorithm(top: SourceSection) -> str:
    value = top.content.get("algo")
    if isinstance(value, str) and value.lower() in _REFUSED:
        top.wrong("algo", _REFUSED[value.lower()])
        return "rtn"
    if value is None:
        top.wrong("algo", f"it is missing; one of {', '.join(ALGORITHMS)}")
        return "rtn"
    return top.word("algo", "rtn", ALGORITHMS)


def _note_algorithm(top: SourceSection, algo: str, transformed: bool) -> None:
    first, _, second = algo.partition("+")
    ours = [f"transforms: {_TRANSFORMS[first]}"] if transformed else []
    ours.append(f"solver: {'gptq' if 'gptq' in (first, second) else 'rtn'}")
    if not transformed:
        top.honoured("algo", ", ".join(ours))
    elif first == "spinquant":
        top.changed("algo", ", ".join(ours), "Hadamard matrices, which are not learned")
    else:
        top.changed("algo", ", ".join(ours), "one scale for all layers that share an input")


def _rule(section: SourceSection, algo: str) -> Fields:
    """Fields of the rule for the language model."""
    weights, inputs = weights_of(section, algo), inputs_of(section, algo)
    fields: Fields = {"weights": weights} if weights else {"skip": True}
    if not weights and "w_dtype" in section:
        section.ledger.wrong(section.at("w_dtype"), "weights in floating point: nothing to do")
    fields["activations"] = inputs or "none"
    fields["outputs"] = outputs_of(section, algo, inputs) or "none"
    fields["weight_range"] = {"kind": "minmax"}
    fields |= _solver(section, algo, fields)
    return fields


def _solver(section: SourceSection, algo: str, fields: Fields) -> Fields:
    """Solver and options, with notes on the keys that are about them."""
    if algo.endswith("gptq"):
        section.dropped("auto_clip", "GPTQ searches no clip, there neither", "weight_range: mse")
        if not algo.startswith("awq"):
            section.dropped("auto_scale", f"{algo} has no such search", "algo: awq+gptq")
        return {"solver": "gptq", "options": _gptq(section)}
    for key in ("blocksize", "percdamp", "actorder"):
        section.dropped(key, f"{algo} rounds to nearest", "algo: gptq")
    if algo != "awq":
        for key in ("auto_scale", "auto_clip"):
            section.dropped(key, f"{algo} has no such search", "algo: awq")
        return {"solver": "rtn", "options": {"scale_weighting": "none"}}
    if not section.flag("auto_clip", True):
        section.honoured("auto_clip", "weight_range: minmax")
        return {"solver": "rtn", "options": {"scale_weighting": "none"}}
    clipped = {"kind": "mse", "max_shrink": 0.5, "steps": 10, "norm": 2.0, "signed_scale": False}
    section.changed(
        "auto_clip",
        "weight_range: mse, options.scale_weighting: group",
        "on all tokens, not on one",
    )
    options = {"scale_weighting": "group"}
    return {"solver": "rtn", "options": options, "weight_range": clipped}


def _gptq(section: SourceSection) -> Fields:
    ordered = section.flag("actorder", True)
    options: Fields = {
        "block_size": section.integer("blocksize", 128, 1, 65536),
        "order": "activation" if ordered else "original",
        "scale_weighting": "none",
        "refine_passes": 0,
    }
    section.honoured("blocksize", f"options.block_size: {options['block_size']}")
    section.honoured(
        "actorder", f"options.order: {options['order']}", "groups stay those of the original order"
    )
    return options | section.damping("percdamp")


def _transforms(section: SourceSection, algo: str, rule: Fields) -> list[Fields]:
    first = algo.partition("+")[0]
    match: Fields = {"modality": "llm"}
    if first != "smoothquant":
        section.dropped("alpha", f"{algo} has no strength", "algo: smoothquant")
    if first == "spinquant":
        return [{"name": "rotation", "match": match}]
    if first == "awq":
        if not section.flag("auto_scale", True):
            section.honoured("auto_scale", "no transform")
            return []
        section.changed("auto_scale", "transforms: awq", "one scale for layers with one input")
        return [{"name": "awq", "match": match, "options": {"grid": 20, "duo": True}}]
    if first != "smoothquant":
        return []
    if rule["activations"] == "none":
        section.dropped("alpha", "inputs in floating point need no smoothing, there neither")
        return []
    alpha = section.number("alpha", 0.5, 0, 1)
    section.changed("alpha", f"options.alpha: {alpha:.15g}", "one scale for layers with one input")
    return [{"name": "smoothquant", "match": match, "options": {"alpha": alpha}}]


def _skipped(section: SourceSection) -> list[str]:
    """Layers that are left alone, as regular expressions of whole paths."""
    found = []
    entries = section.words("skip_layers", ("lm_head",))
    if len(entries) > MAX_EXPRESSIONS:
        why = f"{len(entries)} expressions, more than {MAX_EXPRESSIONS}: join them with |"
        section.wrong("skip_layers", why)
        return []
    for number, entry in enumerate(entries):
        try:
            compile_pattern(entry)
        except ValueError as error:
            section.wrong("skip_layers", str(error))
            continue
        found.append(f"re:{entry}")
        if "skip_layers" in section:
            place = f"{section.at('skip_layers')}[{number}]"
            section.ledger.honoured(place, entry, f"skip: true, name: re:{entry}")
    return found


def _calibration(arguments: SourceSection, section: SourceSection) -> Fields:
    """Settings of the calibration."""
    ours: Fields = {}
    for key in ("block_sequential", "layer_sequential"):
        ours[key] = arguments.flag(key, False)
        arguments.honoured(key, f"calibration.{key}: {shown(ours[key])}")
    counts = (
        (arguments, "num_calibrate"),
        (section, "num_calibrate"),
        (section, "nsample"),
        (section, "nsamples"),
    )
    given_counts = [(part, key) for part, key in counts if key in part]
    for part, key in given_counts:
        ours["samples"] = part.integer(key, 128, 1, MAX_SAMPLES)
    for part, key in given_counts[:-1]:
        part.dropped(key, f"{given_counts[-1][1]}: {ours['samples']} counts")
    for part, key in given_counts[-1:]:
        told = f"calibration.samples: {ours['samples']}"
        if key == "nsamples":
            part.honoured(key, told)
        else:
            part.changed(key, told, "passed over there, where 128 are taken")
    if "seed" in section:
        ours["seed"] = section.integer("seed", 42, 0, 2**63 - 1)
        section.honoured("seed", f"calibration.seed: {ours['seed']}")
    return ours


def _data(top: SourceSection, arguments: SourceSection, section: SourceSection) -> str:
    """The text that is calibrated on, as ``--calib`` takes it; empty where none is known."""
    data = ""
    places = [(top, "calibrate_name"), (arguments, "calibrate_name")]
    for part, key in [*places, (section, "calibrate_name"), (section, "name")]:
        if key not in part:
            continue
        name = part.content[key]
        if not isinstance(name, str):
            part.wrong(key, f"a name, not {quoted(name)}")
        elif name not in TEXTS:
            part.dropped(key, "no text is known by this name", "--calib FILE")
        elif data and data.partition(":")[0] != name:
            part.wrong(key, f"it is named twice, once as {data}")
        else:
            split = section.content.get("split")
            data = f"{name}:{split}" if isinstance(split, str) and split else name
            part.honoured(key, f"--calib {data}, where no other data are given")
    if data:
        section.honoured("split", f"--calib {data}")
    else:
        section.dropped("split", "named on the command line", "--calib")
    return data
