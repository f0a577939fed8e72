"""Functions of MQuant and of its VideoLLaMA3 fork: the same names and arguments, our engine.

    from prismquant.compat.mquant import qwen2vl_rtn_gptq_fwrd_plus

    quantizers = qwen2vl_rtn_gptq_fwrd_plus(model, dataset, dev, dataset_name, args)

They quantize the model that they are given, in place, and return its weights' quantizers.
"""

from __future__ import annotations

from prismquant.compat.in_place import CompatWarning
from prismquant.compat.live_model import remove_quantizers
from prismquant.compat.mquant.qwen2vl_gptq_plus import (
    gptq_qwen2vl_fwrd_llm,
    gptq_qwen2vl_fwrd_visual_clip_conv1,
    gptq_qwen2vl_fwrd_visual_clip_cross_attention,
    gptq_qwen2vl_fwrd_visual_clip_resblocks,
    qwen2vl_llm_rtn,
    qwen2vl_rtn_gptq_fwrd_plus,
    qwen2vl_visual_clip_rtn,
    qwen2vl_visual_cross_attention_rtn,
)
from prismquant.compat.mquant.videollama3_gptq_plus import (
    gptq_videollama3_fwrd_llm,
    gptq_videollama3_fwrd_visual_encoder_layers,
    gptq_videollama3_fwrd_visual_encoder_patch_embedding,
    gptq_videollama3_fwrd_visual_projector,
    videollama3_llm_rtn,
    videollama3_rtn_gptq_fwrd_plus,
    videollama3_visual_encoder_rtn,
    videollama3_visual_projector_rtn,
)
from prismquant.compat.mquant.weight_quantizers import WeightQuantizer

__all__ = [
    "CompatWarning",
    "WeightQuantizer",
    "gptq_qwen2vl_fwrd_llm",
    "gptq_qwen2vl_fwrd_visual_clip_conv1",
    "gptq_qwen2vl_fwrd_visual_clip_cross_attention",
    "gptq_qwen2vl_fwrd_visual_clip_resblocks",
    "gptq_videollama3_fwrd_llm",
    "gptq_videollama3_fwrd_visual_encoder_layers",
    "gptq_videollama3_fwrd_visual_encoder_patch_embedding",
    "gptq_videollama3_fwrd_visual_projector",
    "qwen2vl_llm_rtn",
    "qwen2vl_rtn_gptq_fwrd_plus",
    "qwen2vl_visual_clip_rtn",
    "qwen2vl_visual_cross_attention_rtn",
    "remove_quantizers",
    "videollama3_llm_rtn",
    "videollama3_rtn_gptq_fwrd_plus",
    "videollama3_visual_encoder_rtn",
    "videollama3_visual_projector_rtn",
]
