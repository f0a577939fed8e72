"""The bit layouts of the compressed-tensors format, by name: a layout more is one line more."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from prismquant.formats.layouts.integers import PackedIntegers
from prismquant.formats.layouts.layout import Layout
from prismquant.formats.layouts.micro import MicroScaled
from prismquant.formats.layouts.plain import PlainBytes

PACK_QUANTIZED = "pack-quantized"
INT_QUANTIZED = "int-quantized"
FLOAT_QUANTIZED = "float-quantized"
NAIVE_QUANTIZED = "naive-quantized"
NVFP4_PACK_QUANTIZED = "nvfp4-pack-quantized"
MXFP4_PACK_QUANTIZED = "mxfp4-pack-quantized"
MXFP6_PACK_QUANTIZED = "mxfp6-pack-quantized"
MXFP8_QUANTIZED = "mxfp8-quantized"

_ALL: tuple[Layout, ...] = (
    PackedIntegers(PACK_QUANTIZED),
    PlainBytes(INT_QUANTIZED, "int", torch.int8, blocks=False),
    PlainBytes(FLOAT_QUANTIZED, "e4m3", torch.float8_e4m3fn, blocks=True),
    PlainBytes(NAIVE_QUANTIZED, "e4m3", torch.float8_e4m3fn, blocks=True),
    MicroScaled(NVFP4_PACK_QUANTIZED, "e2m1", 4, "e4m3"),
    MicroScaled(MXFP4_PACK_QUANTIZED, "e2m1", 4, "e8m0"),
    MicroScaled(MXFP6_PACK_QUANTIZED, "e2m3", 6, "e8m0"),
    MicroScaled(MXFP8_QUANTIZED, "e4m3", 8, "e8m0"),
)

TABLE: Mapping[str, Layout] = MappingProxyType({layout.name: layout for layout in _ALL})
