"""Small random models of every family, saved as real checkpoints, and small calibration files.

The models are built from a config, so that their code is that of transformers; widths are multiples
of 128 where a group size of 128 is to fit. Weights are drawn so that nothing is trivially zero or
one: biases are non-zero and norms scatter around one. A local word-level tokenizer with Qwen's
    special
tokens, a chat template and real image and video processors lie beside the weights.
"""

from __future__ import annotations

import json
import random
import re
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw
from torch import nn

from prismquant.models.arch_files import known_archs
from prismquant.models.config import import_transformers
from prismquant.models.names import NameMap
from prismquant.storage import write_json, write_tensors, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llama_3")

HIDDEN = 128
INTERMEDIATE = 256
HEADS = 4
KV_HEADS = 2
PATCH = 4
VOCABULARY = 128

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image>",
)
_COLOURS = ("red", "green", "blue", "yellow", "black", "white")
_SHAPES = ("square", "circle", "bar")
_WORDS = (
    *("system", "user", "assistant", "Time", "s", "seconds", "what", "is", "the", "colour", "of"),
    *("shape", "how", "many", "are", "there", "a", "in", "this", "picture", "video", "moves"),
    *("left", "right", "up", "down", "yes", "no", "and", "it", "count", "say", "which", "one"),
    *("two", "three", "word", "answer", "with", "see", "you", "do", "an", "object", "on", "to"),
    *_COLOURS,
    *_SHAPES,
)
_SIGNS = ("\n", ".", ",", ":", "?", "<", ">", "-", *"0123456789")

_CHAT_TEMPLATE = """
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}
{{- IMAGE -}}
{%- elif item['type'] == 'video' -%}
{{- VIDEO -}}
{%- elif item['type'] == 'audio' -%}
{{- AUDIO -}}
{%- else -%}
{{- item['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""


def build(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    llm_blocks: int = 2,
    vision_blocks: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str | None = None,
    tie: bool = False,
) -> Path:
    """Write a random checkpoint.

    Args:
        family: One of :data:`FAMILIES`.
        folder: Where it goes.
        seed: Of the weights.
        llm_blocks, vision_blocks: Depths; Qwen3-VL has three vision blocks unless told, others two.
        dtype: Of the weights.
        layout: ``native`` (names are module paths), ``old`` (``visual.*``, ``model.layers.*``),
            ``remote`` (VideoLLaMA3 only), or None for what ``save_pretrained`` writes.
        tie: Tie the head to the embedding.
    """
    transformers = import_transformers()
    depth = vision_blocks or (3 if family == "qwen3_vl" else 2)
    config = config_of(family, transformers, llm_blocks, depth, tie)
    arch = known_archs()[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, arch.hf_class)(config)
        randomize(model)
        if tie:
            model.tie_weights()
    model.to(dtype)
    config.dtype = dtype
    folder.mkdir(parents=True, exist_ok=True)
    names = _names(family, layout)
    tensors = {
        names.to_disk(name): tensor
        for name, tensor in model.state_dict().items()
        if not (tie and name == "lm_head.weight")
    }
    write_tensors(folder / "model.safetensors", tensors)
    write_tokenizer(folder, family, transformers)
    if layout == "remote":
        _write_remote(folder, config)
    else:
        model.config.architectures = [arch.hf_class]
        model.config.save_pretrained(folder)
        _write_processors(folder, family, transformers)
    return folder


def samples(
    folder: Path, kinds: Sequence[str] = ("text", "image", "video"), count: int = 6, seed: int = 0
) -> Path:
    """Write a JSONL calibration file with pictures and clips as PNG files beside it.

    Args:
        folder: Where it goes.
        kinds: Cycled through; ``image+image+video`` has two pictures and a clip.
        count: Number of samples.
        seed: Of contents and sizes; picture sizes differ between samples.

    Returns:
        The JSONL file.
    """
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        colour, shape = draw.choice(_COLOURS), draw.choice(_SHAPES)
        size = (8 * draw.randint(2, 4), 8 * draw.randint(2, 4))
        content: list[dict[str, Any]] = []
        for number, part in enumerate(kind.split("+")):
            stem = f"{index}.{number}" if number else f"{index}"
            if part == "image":
                name = f"{stem}.png"
                _picture(size, colour, shape, 0.3).save(folder / name)
                content.append({"type": "image", "image": name})
            elif part == "video":
                frames = [f"{stem}-{frame}.png" for frame in range(4)]
                for frame, name in enumerate(frames):
                    _picture(size, colour, shape, 0.15 * frame).save(folder / name)
                content.append({"type": "video", "video": frames})
        question = f"what is the colour of the {shape} ?"
        content.append({"type": "text", "text": question})
        user = content if kind != "text" else question
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": colour}]
        lines.append(json.dumps({"messages": turns, "id": f"{kind}-{index}"}))
    path = folder / "calibration.jsonl"
    write_text(path, "\n".join(lines) + "\n")
    return path


def _picture(size: tuple[int, int], colour: str, shape: str, position: float) -> Image.Image:
    image = Image.new("RGB", size, "gray")
    pen = ImageDraw.Draw(image)
    left, top = int(size[0] * position), int(size[1] * position)
    box = (left, top, left + size[0] // 2, top + size[1] // 2)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "bar":
        pen.rectangle((box[0], box[1], box[2], box[1] + 4), fill=colour)
    else:
        pen.rectangle(box, fill=colour)
    return image


def config_of(
    family: str, transformers: Any, llm_blocks: int = 2, depth: int = 2, tie: bool = False
) -> Any:
    """A family's configuration, of narrow blocks."""
    ids = {text: index for index, text in enumerate(_SPECIAL)}
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": llm_blocks,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 1024,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": tie,
    }
    # Sections of the rotary frequencies: time, height, width; half of a head in all.
    sections = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    vision: dict[str, Any] = {
        "depth": depth,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_heads": HEADS,
        "patch_size": PATCH,
        "out_hidden_size": HIDDEN,
    }
    top = {
        "tie_word_embeddings": tie,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
    }
    if family == "video_llama_3":
        vision = {
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": depth,
            "num_attention_heads": HEADS,
            "patch_size": PATCH,
        }
        text = {"model_type": "qwen2", **text, "rope_theta": 10000.0}
        return transformers.VideoLlama3Config(text_config=text, vision_config=vision, **top)
    top |= {
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    text["rope_parameters"] = sections
    if family == "qwen2_vl":
        vision = {
            "depth": depth,
            "embed_dim": HIDDEN,
            "hidden_size": HIDDEN,
            "mlp_ratio": INTERMEDIATE // HIDDEN,
            "num_heads": HEADS,
            "patch_size": PATCH,
        }
        return transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **top)
    if family == "qwen2_5_vl":
        # Windows of 2 x 2 merged patches; the last block attends to the whole picture.
        vision |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [depth - 1]}
        return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **top)
    if family == "qwen3_vl":
        text["head_dim"] = HIDDEN // HEADS
        text["rope_parameters"] = {**sections, "mrope_interleaved": True}
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **top)
    raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draw all weights anew, so that nothing is trivially zero or one."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.normal_(0.0, 0.1)
            elif parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
            elif isinstance(module, nn.Embedding):
                parameter.normal_(0.0, 1.0)
            else:
                # Unit gain; a little more in attention, so that it is not uniform.
                stacked = parameter.dim() == 3 and name.endswith("_proj")
                fan_in = parameter.shape[-1] if stacked else parameter[0].numel()
                parameter.normal_(0.0, 1.3 * fan_in**-0.5)


def _names(family: str, layout: str | None) -> NameMap:
    arch = known_archs()["video_llama_3_remote" if layout == "remote" else family]
    by_name = {item.name: item for item in arch.layouts}
    chosen = arch.layouts[0] if layout is None else by_name[layout]
    return NameMap(chosen.name, chosen.rewrites)


def write_tokenizer(folder: Path, family: str, transformers: Any, *, chat: bool = True) -> None:
    """Write a tokenizer of words, with a chat template if it is to have one."""
    fast = word_tokenizer(transformers, {})
    start, end = "<|vision_start|>", "<|vision_end|>"
    if family == "video_llama_3":
        start, end = "", "\\n"
    if chat:
        fast.chat_template = chat_template(
            f"{start}<|image_pad|>{end}", f"{start}<|video_pad|>{end}"
        )
    fast.save_pretrained(folder)


def chat_template(image: str, video: str, audio: str = "") -> str:
    """A chat template that writes this text in the place of a picture, a clip, and a sound."""
    said = {"IMAGE": image, "VIDEO": video, "AUDIO": audio}
    parts = re.split("(IMAGE|VIDEO|AUDIO)", _CHAT_TEMPLATE)
    return "".join(f"'{said[part]}'" if part in said else part for part in parts)


def word_tokenizer(transformers: Any, named: dict[str, str]) -> Any:
    """A tokenizer of words, with special tokens that it has attributes for."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    special = [*_SPECIAL, *named.values()]
    words = [*dict.fromkeys([*special, "<unk>", *_WORDS, *_SIGNS])]
    if len(words) > VOCABULARY:
        raise ValueError(f"{len(words)} words do not fit a vocabulary of {VOCABULARY}")
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split(Regex(r"\n|\d|[^\sA-Za-z\d]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        padding_side="left",
        **({"extra_special_tokens": named} if named else {}),
    )


def _write_processors(folder: Path, family: str, transformers: Any) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor_of(family, transformers, tokenizer).save_pretrained(folder)


def processor_of(family: str, transformers: Any, tokenizer: Any) -> Any:
    """A family's processor of small pictures and clips."""
    title = {
        "qwen2_vl": "Qwen2VL",
        "qwen2_5_vl": "Qwen2_5_VL",
        "qwen3_vl": "Qwen3VL",
        "video_llama_3": "VideoLlama3",
    }[family]
    # Two patches a side at least, some 100 merged patches at most.
    size = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": (64 * PATCH) ** 2}
    common = {"patch_size": PATCH, "size": size}
    llama = family == "video_llama_3"
    image = getattr(transformers, "VideoLlama3ImageProcessor" if llama else "Qwen2VLImageProcessor")
    video_class = {
        "qwen3_vl": "Qwen3VLVideoProcessor",
        "video_llama_3": "VideoLlama3VideoProcessor",
    }.get(family, "Qwen2VLVideoProcessor")
    extra = {} if llama else {"cap_pixels_per_frame": False}
    return getattr(transformers, f"{title}Processor")(
        image_processor=image(**common),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, video_class)(**common, **extra),
        chat_template=tokenizer.chat_template,
    )


def _write_remote(folder: Path, config: Any) -> None:
    """Write both config files as the original VideoLLaMA3 repositories have them."""
    text, vision = config.text_config, config.vision_config
    keys = [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_sliding_window"),
    ]
    vision_keys = [
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        "patch_size",
    ]
    write_json(
        folder / "config.json",
        {
            "architectures": ["Videollama3Qwen2ForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_videollama3.Videollama3Qwen2Config"},
            "model_type": "videollama3_qwen2",
            **{key: getattr(text, key) for key in keys},
            "rope_theta": text.rope_parameters["rope_theta"],
            "tie_word_embeddings": config.tie_word_embeddings,
            "torch_dtype": str(config.dtype).removeprefix("torch."),
            "image_token_index": _SPECIAL.index("<image>"),
            "mm_projector_type": "mlp2x_gelu",
            "use_token_compression": True,
            "vision_encoder": None,
            "vision_encoder_config": {
                "model_type": "videollama3_vision_encoder",
                **{key: getattr(vision, key) for key in vision_keys},
            },
        },
    )
    write_json(
        folder / "preprocessor_config.json",
        {
            "auto_map": {"AutoProcessor": "processing_videollama3.Videollama3Qwen2Processor"},
            "image_processor_type": "Videollama3ImageProcessor",
            "processor_class": "Videollama3Qwen2Processor",
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "min_tokens": 4,
            "max_tokens": 4096,
            "patch_size": PATCH,
            "resample": 3,
            "rescale_factor": 1 / 255,
        },
    )


def encode(processor: Any, path: Path) -> list[dict[str, torch.Tensor]]:
    """Model inputs of every sample of a calibration file, one by one."""
    result = []
    for line in path.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        items = [i for m in messages if isinstance(m["content"], list) for i in m["content"]]
        images = [Image.open(path.parent / i["image"]) for i in items if i["type"] == "image"]
        clips = [i["video"] for i in items if i["type"] == "video"]
        videos = [[Image.open(path.parent / name) for name in clip] for clip in clips]
        metadata = [
            {"fps": 2.0, "total_num_frames": len(clip), "frames_indices": list(range(len(clip)))}
            for clip in clips
        ]
        given: dict[str, Any] = {"images": images} if images else {}
        if videos:
            given |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
        text = processor.apply_chat_template(messages, tokenize=False)
        encoded = processor(text=[text], return_tensors="pt", **given)
        result.append({k: v for k, v in encoded.items() if isinstance(v, torch.Tensor)})
    return result
