"""Small random models of text alone, saved as real checkpoints, and how they are looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tiny_vlm
import torch

from prismquant.models.arch_files import known_archs
from prismquant.models.config import import_transformers
from prismquant.storage import write_tensors

if TYPE_CHECKING:
    from pathlib import Path

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text")
SPARSE = ("qwen3_moe", "deepseek_v3")

# A sliding window that the texts of the tests are longer than.
WINDOW = 6
# One block of each kind; heads of values are of another size than those of queries.
_LATENT = {
    "num_key_value_heads": tiny_vlm.HEADS,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "n_group": 2,
    "topk_group": 1,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 4


def build(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    llm_blocks: int = 2,
    dtype: torch.dtype = torch.float32,
    tie: bool = False,
    chat: bool = True,
    **values: Any,
) -> Path:
    """Write a random checkpoint.

    Args:
        family: One of :data:`FAMILIES` or :data:`SPARSE`.
        folder: Where it goes.
        seed: Of the weights.
        llm_blocks: Depth.
        dtype: Of the weights.
        tie: Tie the head to the embedding.
        chat: Whether the tokenizer has a chat template.
        values: Of its configuration, in place of the usual ones.
    """
    transformers = import_transformers()
    arch = known_archs()[family]
    kind = getattr(transformers, arch.hf_class)
    config = kind.config_class(**(_values(family, llm_blocks, tie) | values))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        tiny_vlm.randomize(model)
        if tie:
            model.tie_weights()
    model.to(dtype)
    config.dtype = dtype
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model.state_dict()
    if tie:
        del tensors["lm_head.weight"]
    write_tensors(folder / "model.safetensors", tensors)
    tiny_vlm.write_tokenizer(folder, family, transformers, chat=chat)
    model.config.architectures = [arch.hf_class]
    model.config.save_pretrained(folder)
    return folder


def _values(family: str, blocks: int, tie: bool) -> dict[str, Any]:
    """Values of a family's config."""
    values: dict[str, Any] = {
        "vocab_size": tiny_vlm.VOCABULARY,
        "hidden_size": tiny_vlm.HIDDEN,
        "intermediate_size": tiny_vlm.INTERMEDIATE,
        "num_hidden_layers": blocks,
        "num_attention_heads": tiny_vlm.HEADS,
        "num_key_value_heads": tiny_vlm.KV_HEADS,
        # The heads together are wider than the stream, as in Qwen3 and Gemma.
        "head_dim": 2 * tiny_vlm.HIDDEN // tiny_vlm.HEADS,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": tie,
    }
    if family == "qwen2":
        del values["head_dim"]
    if family == "qwen3_moe":
        values |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    if family == "deepseek_v3":
        del values["head_dim"]
        values |= _LATENT
    if family in ("mistral", "gemma2", "gemma3_text"):
        values["sliding_window"] = WINDOW
    if family.startswith("gemma"):
        values |= {"query_pre_attn_scalar": 64, "layer_types": _ALTERNATING[:blocks]}
    return values
