"""Keys of a GGUF file that are a language model's own, and what llama.cpp takes for granted.

Its code has one graph a family. What a configuration may say otherwise is either a key of the file,
or the same in all released models and built in: another value cannot be told, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Every n-th layer looks at everything, the others through a window.
_PERIODS = {"GEMMA2": 2, "GEMMA3": 6}
# Depth of the one size whose scores are scaled by the stream's width over the heads.
_WIDE = {"GEMMA2": 46, "GEMMA3": 62}
_GELU = "gelu_pytorch_tanh"
_LOCAL_BASE = 10_000.0
_ROPES = ("default", "linear", "llama3")


def text_config(config: Any) -> Any:
    """The language model's configuration, within that of a model that sees, or by itself."""
    return getattr(config, "text_config", config)


def impossible(architecture: str, config: Any) -> list[str]:
    """Values of a language model's configuration that llama.cpp cannot be told, in words.

    Args:
        architecture: Member of ``gguf.MODEL_ARCH``.
        config: The language model's configuration.
    """
    found = []
    gemma = architecture in _PERIODS
    wanted = _GELU if gemma else "silu"
    said = getattr(config, "hidden_activation", None) if gemma else None
    activation = said or getattr(config, "hidden_act", wanted)
    if activation != wanted:
        found.append(f"its activation is {activation}, and {wanted} is built in")
    kind = _rope(config).get("rope_type", "default")
    if kind not in _ROPES or (kind == "llama3" and architecture != "LLAMA"):
        found.append(f"its rotary embedding is of type {kind}")
    if getattr(config, "use_bidirectional_attention", None):
        found.append("its tokens look ahead")
    if gemma:
        found += _gemma(architecture, config)
    return found


def _gemma(architecture: str, config: Any) -> list[str]:
    found, period = [], _PERIODS[architecture]
    kinds = ("sliding_attention", "full_attention")
    layers = range(config.num_hidden_layers)
    if list(config.layer_types) != [kinds[(layer + 1) % period == 0] for layer in layers]:
        found.append(f"other layers than every {period}th look at everything")
    wide = config.num_hidden_layers == _WIDE[architecture]
    scale = config.hidden_size / config.num_attention_heads if wide else config.head_dim
    if config.query_pre_attn_scalar != scale:
        found.append(
            f"its scores are divided by the root of {config.query_pre_attn_scalar}, and of "
            f"{scale:g} is built in"
        )
    local = _local_base(config)
    if architecture == "GEMMA3" and local != _LOCAL_BASE:
        found.append(f"its windows have the rotary base {local:g}, and {_LOCAL_BASE:g} is built in")
    return found


def remarks_of(architecture: str, config: Any) -> list[str]:
    """Remarks on what the file's model does otherwise on long texts."""
    window = getattr(config, "sliding_window", None)
    used = window and getattr(config, "use_sliding_window", True)
    if not used or architecture in _PERIODS or window >= config.max_position_embeddings:
        return []
    return [
        f"llama.cpp has no windows for this family: beyond {window} tokens it looks at everything"
    ]


def write_language(writer: GGUFWriter, library: ModuleType, architecture: str, config: Any) -> None:
    """Keys that are the family's own.

    Args:
        writer: Of the language model's file.
        library: The gguf package.
        architecture: Member of its ``MODEL_ARCH``.
        config: The language model's configuration.
    """
    rope = _rope(config)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(library.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if architecture == "LLAMA":
        writer.add_rope_dimension_count(head_width(config))
    if architecture not in _PERIODS:
        return
    writer.add_sliding_window(config.sliding_window)
    for bound, write in (
        (getattr(config, "attn_logit_softcapping", None), writer.add_attn_logit_softcapping),
        (getattr(config, "final_logit_softcapping", None), writer.add_final_logit_softcapping),
    ):
        if bound:
            write(float(bound))


def head_width(config: Any) -> int:
    """Columns of a head."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def rope_base(config: Any) -> float:
    """Base of the rotary embedding of layers that look at everything."""
    return float(_rope(config)["rope_theta"])


def rope_factors(config: Any) -> Tensor | None:
    """Divisors of the rotary frequencies, float32 ``[head_width / 2]``, of Llama 3.1 and later.

    Short waves stay, long ones are stretched by ``factor``, and those between by something between
    (https://github.com/meta-llama/llama-models, ``apply_scaling``).
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    width, factor = head_width(config), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    length = float(rope["original_max_position_embeddings"])
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    waves = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    smooth = ((length / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).to(torch.float32)


def _rope(config: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = config.rope_parameters
    return found.get("full_attention") or found


def _local_base(config: Any) -> float:
    local = config.rope_parameters.get("sliding_attention") or _rope(config)
    return float(local["rope_theta"])
