"""Qwen3.5 with experts, and one that is shared, in blocks of linear and of gated attention."""

from __future__ import annotations

from typing import Any

from tiny_families import parts, qwen3_5

TOKENS: dict[str, str] = {}
# Blocks are those of the dense family, and experts those of another.
SPARSE = SLOW = True
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}


def make(transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Its configuration and its processor."""
    values = qwen3_5.values(transformers, tokenizer, "qwen3_5_moe_text", **_EXPERTS)
    config = transformers.Qwen3_5MoeConfig(**values)
    return config, parts.qwen_processor(transformers, tokenizer)
