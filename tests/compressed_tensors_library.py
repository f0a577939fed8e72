"""The compressed-tensors library, as the reference that tests compare with.

It imports transformers, which imports torchvision; a torchvision built for another torch needs its
two operator schemas declared before that.
"""

from __future__ import annotations

import torch

if not hasattr(torch.ops.torchvision, "nms"):
    _DECLARED = torch.library.Library("torchvision", "FRAGMENT")
    _DECLARED.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.compressors.mxfp6 import MXFP6PackedCompressor
from compressed_tensors.compressors.mxfp8 import MXFP8QuantizationCompressor
from compressed_tensors.compressors.naive_quantized import (
    FloatQuantizationCompressor,
    IntQuantizationCompressor,
    NaiveQuantizationCompressor,
)
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize, quantize
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
)
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from compressed_tensors.quantization.utils.fp6_utils import cast_to_fp6
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

__all__ = [
    "FloatQuantizationCompressor",
    "IntQuantizationCompressor",
    "MXFP4PackedCompressor",
    "MXFP6PackedCompressor",
    "MXFP8QuantizationCompressor",
    "NVFP4PackedCompressor",
    "NaiveQuantizationCompressor",
    "PackedQuantizationCompressor",
    "QuantizationArgs",
    "QuantizationScheme",
    "calculate_qparams",
    "cast_to_fp4",
    "cast_to_fp6",
    "compute_dynamic_scales_and_zp",
    "dequantize",
    "fake_quantize",
    "generate_mx_scales",
    "quantize",
]
