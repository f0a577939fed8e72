"""The work behind MQuant's functions: find the model, read the flags, quantize in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from prismquant.compat.in_place import EngineOptions, Job, quantize_in_place
from prismquant.compat.live_model import LiveModel, model_in
from prismquant.compat.mquant.families import FAMILIES, Family
from prismquant.compat.mquant.namespaces import flags_of, has_flag, read_namespace
from prismquant.compat.mquant.prompts import samples_of_prompts
from prismquant.compat.mquant.weight_quantizers import WeightQuantizer, by_key
from prismquant.data import Sample
from prismquant.errors import ArgumentError, ModelError, RecipeError
from prismquant.formats.quantized_layer import QuantizedLayer
from prismquant.recipe.importers.imported import Imported

Quantizers = MutableMapping[str, Any]

_QUANTIZED = ("quant_visual_clip", "quant_cross_attention", "quant_visual_projector", "quant_llm")
_WRAPPERS = ("ActQuantWrapper", "ActRotateWrapper")
_ROTATED = ("rotate_visual_clip", "rotate_llm")
# Functions of single parts quantize weights alone, there too.
_FLOAT_INPUTS: Mapping[str, Any] = MappingProxyType(
    {"visual_a_bits": 16, "llm_a_bits": 16, "visual_static": False, "llm_static": False}
)


@dataclass(frozen=True)
class PartFunction:
    """A function for one part of a model.

    Attributes:
        family: Of the model.
        name: The function's.
        flag: The flag that asks for the part in the function for all parts.
        rtn: Whether it rounds to nearest, or solves by GPTQ.
        left: Roles of that part that it leaves alone.
    """

    family: Family
    name: str
    flag: str
    rtn: bool
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class FunctionCall:
    """Arguments that a caller gives.

    Attributes:
        model: A wrapper around the model, or the model.
        dev: Where the arithmetic happens; None: where the model is.
        args: The namespace.
        dataset, dataset_name: Calibration data; None where there are none.
        options: What MQuant has no flags for.
    """

    model: Any
    dev: Any
    args: Any
    dataset: Any = None
    dataset_name: str | None = None
    options: EngineOptions = field(default_factory=EngineOptions)


def quantize_all(family: Family, call: FunctionCall) -> dict[str, WeightQuantizer]:
    """Quantize the parts of a model that a namespace asks for; in place.

    Returns:
        Quantizers of the weights, by MQuant's keys.

    Raises:
        PrismQuantError: The model is of another family, a flag is wrong, or the engine refuses the
            work; the model is as it was.
    """
    live = _find(family, call.model, family.entry)
    imported = read_namespace(call.args, family, {"quant": True})
    missing = [name for name in _input_bits(family, call.args) if not has_flag(call.args, name)]
    remark = f"{', '.join(missing)}: not given, so 8 as in MQuant's driver: inputs are quantized"
    return _quantized(family, call, live, imported, (remark,) * bool(missing))


def quantize_part(
    function: PartFunction, call: FunctionCall, quantizers: Quantizers
) -> dict[str, Any]:
    """Quantize the weights of one part of a model; in place.

    Args:
        function: The function that was called.
        call: Its arguments.
        quantizers: Takes those of the part's layers.

    Returns:
        All of ``quantizers``.

    Raises:
        ArgumentError: ``quantizers`` takes none.
        PrismQuantError: As of :func:`quantize_all`; or a flag asks for a rotation.
    """
    if not isinstance(quantizers, MutableMapping):
        raise ArgumentError(
            f"a {type(quantizers).__name__} cannot take quantizers",
            where="quantizers",
            remedy="give a dictionary, which may be empty",
        )
    family, flags = function.family, flags_of(call.args)
    live = _find(family, call.model, function.name)
    rotated = [name for name in _ROTATED if flags.get("rotate") and flags.get(name)]
    if rotated:
        raise RecipeError(
            f"a rotation is of a whole model, and {function.name} quantizes a part of it",
            where=", ".join(f"args.{name}" for name in ("rotate", *rotated)),
            remedy=f"call {family.entry}, or set rotate = False",
        )
    forced = {
        **dict.fromkeys(_QUANTIZED, False),
        "quant": True,
        function.flag: True,
        "visual_w_rtn": function.rtn,
        "llm_w_rtn": function.rtn,
        **_FLOAT_INPUTS,
    }
    imported = read_namespace(call.args, family, forced)
    skip = {"match": {"modality": "vision", "role": list(function.left)}, "skip": True}
    if function.left:
        imported = replace(imported, recipe=imported.recipe.with_rules(skip))
    side = "llm" if function.flag == "quant_llm" else "visual"
    bits = flags.get(f"{side}_a_bits", 8)
    remark = (
        f"{side}_a_bits: {bits}: {function.name} quantizes weights alone, as there; {family.entry} "
        "quantizes inputs, too"
    )
    remarks = () if bits == 16 else (remark,)
    quantizers.update(_quantized(family, call, live, imported, remarks))
    return dict(quantizers) if not isinstance(quantizers, dict) else quantizers


def _input_bits(family: Family, args: Any) -> list[str]:
    """Names of the flags that say in how many bits inputs are, of the parts that are quantized."""
    flags = flags_of(args)
    visual = flags.get("quant_visual_clip") or flags.get(family.connector)
    return ["visual_a_bits"] * bool(visual) + ["llm_a_bits"] * bool(flags.get("quant_llm"))


def _quantized(
    family: Family,
    call: FunctionCall,
    live: LiveModel,
    imported: Imported,
    remarks: tuple[str, ...] = (),
) -> dict[str, WeightQuantizer]:
    axes = {name: tensor.dim() for name, tensor in live.model.named_parameters()}
    found: dict[str, WeightQuantizer] = {}

    def see(layers: Sequence[QuantizedLayer]) -> None:
        for layer in layers:
            found[layer.name] = WeightQuantizer.of(layer, axes[f"{layer.name}.weight"])

    def samples(count: int) -> tuple[Sample, ...]:
        return samples_of_prompts(call.dataset, call.dataset_name, live.holder, count)

    plan = quantize_in_place(
        Job(live, imported, samples, call.dev, see, call.options, remarks),
    )
    return by_key(found, plan, family)


def _find(family: Family, holder: Any, called: str) -> LiveModel:
    """The model that a caller gives.

    Raises:
        ModelError: It is none, is of another family, or is wrapped by MQuant already.
    """
    model = model_in(holder)
    if model is None:
        raise ModelError(
            f"{called} takes a whole model: a {type(holder).__name__} has no language head, and "
            "holds no model that has",
            remedy=f"pass a {family.hf_class} of transformers, or a wrapper with it as .model and "
            "the processor as .processor",
        )
    names = {one.__name__ for one in type(model).__mro__}
    if family.hf_class not in names:
        raise _other_model(family, type(model).__name__, names, called)
    wrapped = [n for n, module in model.named_modules() if type(module).__name__ in _WRAPPERS]
    if wrapped:
        raise ModelError(
            f"{len(wrapped)} layers are wrapped by MQuant already",
            where=wrapped[0],
            remedy="leave out qwen2vl_add_act_qaunt and what rotates: the flags of args say all "
            "that is to be done",
        )
    return LiveModel(model, holder)


def _other_model(family: Family, given: str, names: Collection[str], called: str) -> ModelError:
    what = f"{called} quantizes {family.title}, and this is a {given}"
    if family.remote_class in names:
        return ModelError(
            f"{called} takes a {family.hf_class} of transformers, and this is a {given} of the "
            "checkpoint's own code",
            remedy="load it by prismquant.load(FOLDER), which gives that class, and the processor",
        )
    for other in FAMILIES:
        if other.hf_class in names or other.remote_class in names:
            return ModelError(
                what,
                remedy=f"call {other.entry}(model, dataset, dev, dataset_name, args); its "
                f"connector is quantized by {other.connector}, not by {family.connector}",
            )
    return ModelError(
        what,
        remedy='prismquant.quantize(FOLDER, "--quant --quant_llm ..", OUT) takes the same flags '
        "for a checkpoint of any family",
    )
