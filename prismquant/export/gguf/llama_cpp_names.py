"""What llama.cpp calls the tensors of a Qwen-VL model: two files, one table for each.

Names are those of the gguf package's constants. The vision tower and the merger make up the second
file (``mmproj``); there the patch embedding, a convolution over two frames, is stored as two over
one frame, and the fused query-key-value projection of Qwen2-VL and Qwen2.5-VL as three layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

# Model type -> the architecture's name in the gguf package, and the projector's.
ARCHITECTURES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "qwen2_vl": ("QWEN2VL", "QWEN2VL"),
        "qwen2_5_vl": ("QWEN2VL", "QWEN25VL"),
        "qwen3_vl": ("QWEN3VL", "QWEN3VL"),
    }
)
# Of these the query-key-value projection of the tower stays in one piece.
_FUSED_QKV = ("qwen3_vl",)

_TEXT = MappingProxyType(
    {
        r"embed_tokens": "TOKEN_EMBD",
        r"norm": "OUTPUT_NORM",
        r"layers\.(\d+)\.input_layernorm": "ATTN_NORM",
        r"layers\.(\d+)\.self_attn\.q_proj": "ATTN_Q",
        r"layers\.(\d+)\.self_attn\.k_proj": "ATTN_K",
        r"layers\.(\d+)\.self_attn\.v_proj": "ATTN_V",
        r"layers\.(\d+)\.self_attn\.o_proj": "ATTN_OUT",
        r"layers\.(\d+)\.self_attn\.q_norm": "ATTN_Q_NORM",
        r"layers\.(\d+)\.self_attn\.k_norm": "ATTN_K_NORM",
        r"layers\.(\d+)\.post_attention_layernorm": "FFN_NORM",
        r"layers\.(\d+)\.mlp\.gate_proj": "FFN_GATE",
        r"layers\.(\d+)\.mlp\.up_proj": "FFN_UP",
        r"layers\.(\d+)\.mlp\.down_proj": "FFN_DOWN",
    }
)
_VISION = MappingProxyType(
    {
        r"patch_embed\.proj": "V_ENC_EMBD_PATCH",
        r"pos_embed": "V_ENC_EMBD_POS",
        r"blocks\.(\d+)\.norm1": "V_ENC_INPUT_NORM",
        r"blocks\.(\d+)\.norm2": "V_ENC_POST_ATTN_NORM",
        r"blocks\.(\d+)\.attn\.qkv": "V_ENC_ATTN_QKV",
        r"blocks\.(\d+)\.attn\.proj": "V_ENC_ATTN_O",
        r"blocks\.(\d+)\.mlp\.(?:fc1|up_proj|linear_fc1)": "V_ENC_FFN_UP",
        r"blocks\.(\d+)\.mlp\.gate_proj": "V_ENC_FFN_GATE",
        r"blocks\.(\d+)\.mlp\.(?:fc2|down_proj|linear_fc2)": "V_ENC_FFN_DOWN",
        r"merger\.(?:ln_q|norm)": "V_POST_NORM",
        r"deepstack_merger_list\.(\d+)\.norm": "V_DS_NORM",
        r"deepstack_merger_list\.(\d+)\.linear_fc1": "V_DS_FC1",
        r"deepstack_merger_list\.(\d+)\.linear_fc2": "V_DS_FC2",
    }
)
# The merger's two layers are numbers 0 and 2 of a sequence; number 1 is the activation.
_MERGER = MappingProxyType({"mlp.0": 0, "mlp.2": 2, "linear_fc1": 0, "linear_fc2": 2})
_QKV = ("V_ENC_ATTN_Q", "V_ENC_ATTN_K", "V_ENC_ATTN_V")


@dataclass(frozen=True)
class Part:
    """One tensor of a GGUF file.

    Attributes:
        tensor: Name of a member of ``gguf.MODEL_TENSOR``.
        block: The number in its name, or None.
        suffix: ``weight``, ``bias``, or ``weight.1`` of the second frame's patch embedding.
        index: Which of ``count`` equal pieces of the source's tensor it is: rows, or frames.
        count: Into how many the source's tensor is cut.
    """

    tensor: str
    block: int | None
    suffix: str
    index: int = 0
    count: int = 1


def parts(model_type: str, name: str, deepstack: tuple[int, ...]) -> tuple[bool, list[Part]] | None:
    """Where a tensor of the model goes.

    Args:
        model_type: A key of :data:`ARCHITECTURES`.
        name: The tensor by its module path.
        deepstack: After which blocks of the tower features are taken out.

    Returns:
        Whether it belongs to the vision tower's file, and its parts there; None if llama.cpp has no
        place for it.
    """
    module, _, suffix = name.rpartition(".")
    if module == "lm_head":
        return False, [Part("OUTPUT", None, suffix)]
    if module.startswith("model.language_model."):
        found = _look_up(_TEXT, module.removeprefix("model.language_model."))
        return (False, [Part(*found, suffix)]) if found else None
    if not module.startswith("model.visual."):
        return None
    module = module.removeprefix("model.visual.")
    if module.startswith("merger.") and module.removeprefix("merger.") in _MERGER:
        return True, [Part("V_MMPROJ", _MERGER[module.removeprefix("merger.")], suffix)]
    found = _look_up(_VISION, module)
    if found is None:
        return None
    tensor, block = found
    if tensor.startswith("V_DS") and block is not None:
        return True, [Part(tensor, deepstack[block], suffix)]
    if tensor == "V_ENC_ATTN_QKV" and model_type not in _FUSED_QKV:
        return True, [Part(own, block, suffix, index, 3) for index, own in enumerate(_QKV)]
    if tensor == "V_ENC_EMBD_PATCH" and suffix == "weight":
        return True, [
            Part(tensor, block, ending, index, 2)
            for index, ending in enumerate(("weight", "weight.1"))
        ]
    return True, [Part(tensor, block, suffix)]


def _look_up(table: Mapping[str, str], module: str) -> tuple[str, int | None] | None:
    for pattern, tensor in table.items():
        if match := re.fullmatch(pattern, module):
            return tensor, int(match[1]) if match.groups() else None
    return None
