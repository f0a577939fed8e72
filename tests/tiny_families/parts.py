"""Parts of configurations that several families share."""

from __future__ import annotations

from typing import Any

import tiny_vlm

# Of square pictures, in pixels; a patch has four on each side.
SIDE = 32
SQUARE = {"height": SIDE, "width": SIDE}
GRIDS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
PATCHES = (SIDE // tiny_vlm.PATCH) ** 2


def text(tokenizer: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": tiny_vlm.VOCABULARY,
        "hidden_size": tiny_vlm.HIDDEN,
        "intermediate_size": tiny_vlm.INTERMEDIATE,
        "num_hidden_layers": 2,
        "num_attention_heads": tiny_vlm.HEADS,
        "num_key_value_heads": tiny_vlm.KV_HEADS,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def vision() -> dict[str, Any]:
    return {
        "hidden_size": tiny_vlm.HIDDEN,
        "intermediate_size": tiny_vlm.INTERMEDIATE,
        "num_hidden_layers": 2,
        "num_attention_heads": tiny_vlm.HEADS,
    }


def square_vision(model_type: str) -> dict[str, Any]:
    """A tower of pictures of one size."""
    sizes = {"image_size": SIDE, "patch_size": tiny_vlm.PATCH}
    return {"model_type": model_type, **vision(), **sizes}


def cropped(title: str, transformers: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Configuration and processor of a family that cuts pictures into crops, as Idefics3 does."""
    config = getattr(transformers, f"{title}Config")(
        text_config=text(tokenizer) | {"model_type": "llama"},
        vision_config=vision() | {"image_size": SIDE, "patch_size": tiny_vlm.PATCH},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    largest = {"longest_edge": SIDE}
    own = {}
    if title == "SmolVLM":
        own["video_processor"] = transformers.SmolVLMVideoProcessor(
            size=largest, max_image_size=largest, num_frames=4, fps=1
        )
    image_processor = getattr(transformers, f"{title}ImageProcessor")
    processor = getattr(transformers, f"{title}Processor")(
        image_processor=image_processor(size={"longest_edge": 2 * SIDE}, max_image_size=largest),
        tokenizer=tokenizer,
        image_seq_len=PATCHES // 4,
        chat_template=tiny_vlm.chat_template("<image>", "<video>"),
        **own,
    )
    return config, processor


def qwen_processor(transformers: Any, tokenizer: Any) -> Any:
    """The processor of Qwen3-VL."""
    start, end = "<|vision_start|>", "<|vision_end|>"
    pads = (f"{start}<|{kind}_pad|>{end}" for kind in ("image", "video"))
    tokenizer.chat_template = tiny_vlm.chat_template(*pads)
    return tiny_vlm.processor_of("qwen3_vl", transformers, tokenizer)
