"""Findings on a configuration whose parts do not fit each other, which show in no shape."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["config_findings"]


def config_findings(text: Any, modules: Mapping[str, nn.Module]) -> list[str]:
    """Contradictions in the configuration of a language model.

    Args:
        text: The language model's config.
        modules: Of the model. They know the values that transformers fills in.
    """
    return [*_rotary_findings(text, modules), *_window_findings(text)]


def _rotary_findings(text: Any, modules: Mapping[str, nn.Module]) -> list[str]:
    """Findings on the share of each head that times, rows and columns of a position turn."""
    turning = [module for module in modules.values() if hasattr(module, "mrope_section")]
    if not turning:
        return []
    rope = getattr(text, "rope_parameters", None) or {}
    sections: Any = turning[0].mrope_section
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    half = int(width * (rope.get("partial_rotary_factor") or 1)) // 2
    counts = isinstance(sections, list) and all(type(item) is int and item > 0 for item in sections)
    if counts and len(sections) == 3 and sum(sections) == half:
        return []
    said = reprlib.repr(sections)
    default = "" if "mrope_section" in rope else " (by default, as rope_parameters has none)"
    return [
        f"mrope_section of text_config is {said}{default}, not three numbers that add up to {half}"
    ]


def _window_findings(text: Any) -> list[str]:
    """Findings on layers that look back through a window of no width."""
    sliding = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    if not sliding or getattr(text, "sliding_window", None) is not None:
        return []
    return [
        "text_config.sliding_window is null, or use_sliding_window is false, but layer_types has "
        "sliding_attention"
    ]
