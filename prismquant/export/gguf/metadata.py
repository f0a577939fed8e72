"""Metadata of GGUF files, all besides their tensors.

Keys and their meaning are llama.cpp's; they are written through the gguf package, so that they are
spelled as its readers expect.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismquant.errors import FormatError
from prismquant.export.companions import own_file
from prismquant.export.gguf.language_models import rope_base, text_config
from prismquant.export.gguf.vocabulary import Vocabulary
from prismquant.opening import read_json
from prismquant.version import __version__

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Of OpenAI's CLIP, which all Qwen-VL processors use.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
# What llama.cpp assumes of Qwen2.5-VL, whatever the file says.
WINDOW = 112


def write_text(writer: GGUFWriter, config: Any, name: str, file_type: int) -> None:
    """The language model's hyperparameters.

    Args:
        writer: Of the language model's file.
        config: The whole model's configuration, in its native class.
        name: What the model is called.
        file_type: A member of ``gguf.LlamaFileType``.
    """
    text = text_config(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantized_by(f"prismquant {__version__}")
    writer.add_quantization_version(2)
    writer.add_file_type(file_type)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(rope_base(text))
    sections = list(text.rope_parameters.get("mrope_section") or [])
    if sections:
        # Of time, height and width; the fourth kind of position is not used here.
        writer.add_rope_dimension_sections((sections + [0] * 4)[:4])
    if getattr(text, "head_dim", None):
        writer.add_key_length(text.head_dim)
        writer.add_value_length(text.head_dim)
    levels = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None)
    if levels is not None:
        writer.add_num_deepstack_layers(len(levels))


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary | None, size: int) -> None:
    """The tokenizer, or that there is none."""
    writer.add_vocab_size(size)
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.words)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    writer.add_token_merges(list(vocabulary.merges))
    add = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "pad": writer.add_pad_token_id,
    }
    for role, number in vocabulary.ids.items():
        add[role](number)
    writer.add_add_bos_token(vocabulary.begins)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)


def write_vision(
    writer: GGUFWriter, config: Any, folder: Path, projector: str, name: str, file_type: int
) -> None:
    """The vision tower's hyperparameters and how pictures are normalized.

    Args:
        writer: Of the vision tower's file.
        config: The whole model's configuration, in its native class.
        folder: The checkpoint, for the processor's settings.
        projector: llama.cpp's name for the kind of tower.
        name: What the model is called.
        file_type: A member of ``gguf.LlamaFileType``.
    """
    vision = config.vision_config
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    middle = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
    writer.add_type("mmproj")
    writer.add_name(name)
    writer.add_quantized_by(f"prismquant {__version__}")
    writer.add_quantization_version(2)
    writer.add_file_type(file_type)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(projector)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(_image_size(vision))
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_spatial_merge_size(vision.spatial_merge_size)
    writer.add_vision_embedding_length(width)
    writer.add_vision_feed_forward_length(middle)
    writer.add_vision_block_count(vision.depth)
    writer.add_vision_head_count(vision.num_heads)
    writer.add_vision_attention_layernorm_eps(1e-6)
    mean, std = _normalization(folder)
    writer.add_vision_image_mean(mean)
    writer.add_vision_image_std(std)
    if projector == "qwen2.5vl_merger":
        writer.add_vision_use_silu(True)
        writer.add_vision_n_wa_pattern(window_pattern(vision))
        writer.add_vision_window_size(vision.window_size)
    if projector == "qwen3vl_merger":
        writer.add_vision_use_gelu(True)
        levels = set(vision.deepstack_visual_indexes)
        writer.add_vision_is_deepstack_layers([n in levels for n in range(vision.depth)])


def window_pattern(vision: Any) -> int:
    """After how many blocks one attends to the whole picture.

    Raises:
        FormatError: Such blocks are not evenly spaced.
    """
    whole = list(vision.fullatt_block_indexes)
    step = whole[0] + 1 if whole else 0
    if not whole or whole != list(range(step - 1, whole[-1] + 1, step)):
        raise FormatError(
            f"blocks {whole} attend to the whole picture; GGUF can only say `every n-th`",
            where="vision_config.fullatt_block_indexes",
            remedy="choose another --format",
        )
    return step


def _image_size(vision: Any) -> int:
    """The side of the picture that the learned positions are made for; without any, a usual one."""
    positions = getattr(vision, "num_position_embeddings", None)
    patches = math.isqrt(positions) if positions else 40
    return patches * int(vision.patch_size)


def _normalization(folder: Path) -> tuple[list[float], list[float]]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path := own_file(folder, name)) is None:
            continue
        content = read_json(path)
        content = content.get("image_processor") or content if isinstance(content, dict) else {}
        found: list[Any] = [content.get(key) for key in ("image_mean", "image_std")]
        if all(_are_three(values) for values in found):
            mean, std = found
            return list(mean), list(std)
    return list(_MEAN), list(_STD)


def _are_three(values: Any) -> bool:
    """True if a value is one finite number a colour."""
    return (
        isinstance(values, list)
        and len(values) == 3
        and all(isinstance(x, (int, float)) and math.isfinite(x) for x in values)
    )
