"""Small configurations of families that no file of the package describes, with their tokenizers.

There are no weights: whoever needs some draws them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tiny_vlm

from prismquant.models.config import import_transformers

if TYPE_CHECKING:
    from pathlib import Path

# Of text alone; by what is particular about them.
PLAIN = ("smollm3", "granite", "helium", "seed_oss", "ernie4_5")
OTHER_MLP = ("starcoder2", "nemotron", "arcee", "apertus")
OTHER_NORMS = ("olmo", "olmo2", "exaone4", "glm4", "stablelm", "gemma")
FUSED = ("phi3",)
SIDE_BY_SIDE = ("cohere", "phi")
TWO_KINDS = ("lfm2",)
TEXT = (*PLAIN, *OTHER_MLP, *OTHER_NORMS, *FUSED, *SIDE_BY_SIDE, *TWO_KINDS)


def build(kind: str, folder: Path) -> Path:
    """Write the configuration and the tokenizer of a small model of text alone.

    Args:
        kind: One of :data:`TEXT`.
        folder: Where they go.
    """
    transformers = import_transformers()
    values: dict[str, Any] = {
        "vocab_size": tiny_vlm.VOCABULARY,
        "hidden_size": tiny_vlm.HIDDEN,
        "intermediate_size": tiny_vlm.INTERMEDIATE,
        "num_hidden_layers": 2,
        "num_attention_heads": tiny_vlm.HEADS,
        "num_key_value_heads": tiny_vlm.KV_HEADS,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if kind in TWO_KINDS:
        values["layer_types"] = ["conv", "full_attention"]
    config = transformers.AutoConfig.for_model(kind, **values)
    folder.mkdir(parents=True, exist_ok=True)
    tiny_vlm.write_tokenizer(folder, kind, transformers)
    config.save_pretrained(folder)
    return folder
