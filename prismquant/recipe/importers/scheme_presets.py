"""Schemes that compressed-tensors knows by name, as the arguments that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Scheme = Mapping[str, Mapping[str, Any]]

_INT_TOKEN = {"type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_INT_GROUP = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
_NV = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
_MX8_INPUT = _MX | {"num_bits": 8, "dynamic": True}


def _integers(weights: int, inputs: int) -> Scheme:
    scheme = {"weights": _INT_GROUP | {"num_bits": weights}}
    rounded = {"input_activations": _INT_TOKEN | {"num_bits": inputs}}
    return scheme | rounded if inputs < 16 else scheme


_W8A8: Scheme = {
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "input_activations": _INT_TOKEN | {"num_bits": 8},
}

SCHEMES: Mapping[str, Scheme] = {
    **{f"W{bits}A16": _integers(bits, 16) for bits in range(2, 9)},
    **{f"W{bits}A8": _integers(bits, 8) for bits in range(2, 8)},
    **{f"W{bits}A4": _integers(bits, 4) for bits in range(2, 5)},
    "UNQUANTIZED": {},
    "W4A16_ASYM": {"weights": _INT_GROUP | {"num_bits": 4, "symmetric": False}},
    "W8A8": _W8A8,
    "INT8": _W8A8,
    "W4AFP8": {
        "weights": _INT_GROUP | {"num_bits": 4},
        "input_activations": _FP8 | {"strategy": "token", "dynamic": True},
    },
    "FP8": {
        "weights": _FP8 | {"strategy": "tensor"},
        "input_activations": _FP8 | {"strategy": "tensor", "observer": "static_minmax"},
    },
    "FP8_DYNAMIC": {
        "weights": _FP8 | {"strategy": "channel"},
        "input_activations": _FP8 | {"strategy": "token", "dynamic": True},
    },
    "FP8_BLOCK": {
        "weights": _FP8 | {"strategy": "block", "block_structure": [128, 128]},
        "input_activations": _FP8 | {"strategy": "group", "group_size": 128, "dynamic": True},
    },
    "NVFP4A16": {"weights": _NV},
    "NVFP4": {
        "weights": _NV,
        "input_activations": _NV | {"dynamic": "local", "observer": "static_minmax"},
    },
    "MXFP4A16": {"weights": _MX | {"num_bits": 4}},
    "MXFP4": {
        "weights": _MX | {"num_bits": 4},
        "input_activations": _MX | {"num_bits": 4, "dynamic": True},
    },
    "MXFP4XFP8": {
        "weights": _MX | {"num_bits": 4},
        "input_activations": _FP8 | {"strategy": "group", "group_size": 128, "dynamic": True},
    },
    "MXFP6A16": {"weights": _MX | {"num_bits": 6}},
    "MXFP6A8": {"weights": _MX | {"num_bits": 6}, "input_activations": _MX8_INPUT},
    "MXFP8A16": {"weights": _MX | {"num_bits": 8}},
    "MXFP8": {"weights": _MX | {"num_bits": 8}, "input_activations": _MX8_INPUT},
}
"""All named schemes; a name counts whatever its case."""
