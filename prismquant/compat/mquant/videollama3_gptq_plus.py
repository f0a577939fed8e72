"""Functions for VideoLLaMA3 of MQuant's fork: the same names and arguments, our engine."""

from __future__ import annotations

from typing import Any, Unpack

from prismquant.compat.in_place import EngineOptions
from prismquant.compat.mquant.entry_points import (
    FunctionCall,
    PartFunction,
    Quantizers,
    quantize_all,
    quantize_part,
)
from prismquant.compat.mquant.families import VIDEOLLAMA3
from prismquant.compat.mquant.weight_quantizers import WeightQuantizer

__all__ = [
    "gptq_videollama3_fwrd_llm",
    "gptq_videollama3_fwrd_visual_encoder_layers",
    "gptq_videollama3_fwrd_visual_encoder_patch_embedding",
    "gptq_videollama3_fwrd_visual_projector",
    "videollama3_llm_rtn",
    "videollama3_rtn_gptq_fwrd_plus",
    "videollama3_visual_encoder_rtn",
    "videollama3_visual_projector_rtn",
]


def videollama3_rtn_gptq_fwrd_plus(
    model: Any,
    dataset: Any,
    dev: Any,
    dataset_name: str | None,
    args: Any,
    **options: Unpack[EngineOptions],
) -> dict[str, WeightQuantizer]:
    """Quantize the parts of a VideoLLaMA3 that ``args`` asks for; in place.

    Weights take their quantized values, and layers round their inputs where ``args`` says so
    (:func:`prismquant.compat.mquant.remove_quantizers` takes that out again).

    Args:
        model: A VideoLlama3ForConditionalGeneration of transformers, or a wrapper with it as
            its ``model`` and the processor as its ``processor``.
        dataset: Calibration data: ``data.iloc[i]`` is a row, ``build_prompt(row)`` a list of items
            ``{"type": "image", "value": path}`` and ``{"type": "text", "value": text}``. Not looked
            at where nothing needs data.
        dev: Device of the arithmetic, e.g. ``cuda:0``; None: where the model is.
        dataset_name: Name of the data, for the wrapper's own prompts.
        args: A namespace of MQuant's flags; those that it lacks have MQuant's defaults, and
            ``quant`` counts as given.
        options: Wishes that MQuant has no flags for.

    Returns:
        Quantizers of the weights by MQuant's paths of modules, e.g.
        ``model.mm_projector.readout.0``.

    Raises:
        ModelError: The model is of another family, or is not whole.
        RecipeError: A flag is unknown, of another family, or has no such value.
        PrismQuantError: As of :func:`prismquant.quantize`. The model is as it was.
    """
    call = FunctionCall(model, dev, args, dataset, dataset_name, options)
    return quantize_all(VIDEOLLAMA3, call)


def videollama3_visual_encoder_rtn(
    model: Any, dev: Any, args: Any, quantizers: Quantizers, **options: Unpack[EngineOptions]
) -> dict[str, Any]:
    """Round the weights of the vision encoder to nearest; in place.

    Arguments and errors as of :func:`videollama3_rtn_gptq_fwrd_plus`;
    ``quantizers`` takes the new ones, and is returned.
    """
    function = PartFunction(
        VIDEOLLAMA3, "videollama3_visual_encoder_rtn", "quant_visual_clip", rtn=True
    )
    return quantize_part(function, FunctionCall(model, dev, args, options=options), quantizers)


def gptq_videollama3_fwrd_visual_encoder_patch_embedding(
    model: Any,
    dataset: Any,
    dev: Any,
    dataset_name: str | None,
    args: Any,
    quantizers: Quantizers,
    **options: Unpack[EngineOptions],
) -> dict[str, Any]:
    """Quantize the patch embedding by GPTQ; in place.

    Arguments and errors as of :func:`videollama3_rtn_gptq_fwrd_plus`;
    ``quantizers`` takes the new ones, and is returned.
    """
    function = PartFunction(
        VIDEOLLAMA3,
        "gptq_videollama3_fwrd_visual_encoder_patch_embedding",
        "quant_visual_clip",
        rtn=False,
        left=("attn", "mlp"),
    )
    call = FunctionCall(model, dev, args, dataset, dataset_name, options)
    return quantize_part(function, call, quantizers)


def gptq_videollama3_fwrd_visual_encoder_layers(
    model: Any,
    dataset: Any,
    dev: Any,
    dataset_name: str | None,
    args: Any,
    quantizers: Quantizers,
    **options: Unpack[EngineOptions],
) -> dict[str, Any]:
    """Quantize the weights of the vision encoder's layers by GPTQ; in place.

    Arguments and errors as of :func:`videollama3_rtn_gptq_fwrd_plus`;
    ``quantizers`` takes the new ones, and is returned.
    """
    function = PartFunction(
        VIDEOLLAMA3,
        "gptq_videollama3_fwrd_visual_encoder_layers",
        "quant_visual_clip",
        rtn=False,
        left=("patch_embed",),
    )
    call = FunctionCall(model, dev, args, dataset, dataset_name, options)
    return quantize_part(function, call, quantizers)


def videollama3_visual_projector_rtn(
    model: Any, dev: Any, args: Any, quantizers: Quantizers, **options: Unpack[EngineOptions]
) -> dict[str, Any]:
    """Round the weights of the projector to nearest; in place.

    Arguments and errors as of :func:`videollama3_rtn_gptq_fwrd_plus`;
    ``quantizers`` takes the new ones, and is returned.
    """
    function = PartFunction(
        VIDEOLLAMA3, "videollama3_visual_projector_rtn", "quant_visual_projector", rtn=True
    )
    return quantize_part(function, FunctionCall(model, dev, args, options=options), quantizers)


def gptq_videollama3_fwrd_visual_projector(
    model: Any,
    dataset: Any,
    dev: Any,
    dataset_name: str | None,
    args: Any,
    quantizers: Quantizers,
    **options: Unpack[EngineOptions],
) -> dict[str, Any]:
    """Quantize the weights of the projector by GPTQ; in place.

    Arguments and errors as of :func:`videollama3_rtn_gptq_fwrd_plus`;
    ``quantizers`` takes the new ones, and is returned.
    """
    function = PartFunction(
        VIDEOLLAMA3, "gptq_videollama3_fwrd_visual_projector", "quant_visual_projector", rtn=False
    )
    call = FunctionCall(model, dev, args, dataset, dataset_name, options)
    return quantize_part(function, call, quantizers)


def videollama3_llm_rtn(
    model: Any, dev: Any, args: Any, quantizers: Quantizers, **options: Unpack[EngineOptions]
) -> dict[str, Any]:
    """Round the weights of the language model to nearest; in place.

    Arguments and errors as of :func:`videollama3_rtn_gptq_fwrd_plus`;
    ``quantizers`` takes the new ones, and is returned.
    """
    function = PartFunction(VIDEOLLAMA3, "videollama3_llm_rtn", "quant_llm", rtn=True)
    return quantize_part(function, FunctionCall(model, dev, args, options=options), quantizers)


def gptq_videollama3_fwrd_llm(
    model: Any,
    dataset: Any,
    dev: Any,
    dataset_name: str | None,
    args: Any,
    quantizers: Quantizers,
    **options: Unpack[EngineOptions],
) -> dict[str, Any]:
    """Quantize the weights of the language model by GPTQ; in place.

    Arguments and errors as of :func:`videollama3_rtn_gptq_fwrd_plus`;
    ``quantizers`` takes the new ones, and is returned.
    """
    function = PartFunction(VIDEOLLAMA3, "gptq_videollama3_fwrd_llm", "quant_llm", rtn=False)
    call = FunctionCall(model, dev, args, dataset, dataset_name, options)
    return quantize_part(function, call, quantizers)
