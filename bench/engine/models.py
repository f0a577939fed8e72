"""Random checkpoints with the dimensions of released models.

Weights are drawn block by block, each shard on its way to the disk as soon as it is drawn, so that
a model of any size takes the memory of its largest shard. They are normal with unit gain, norms are
one: what passes keeps its size. Tokenizer and chat template are the embedded model's (ids of the
true vocabulary that it does not know are never asked for), image sizes those of the family.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from prismquant.demo.main_job import CHECKPOINT
from prismquant.demo.scenes import write_dataset
from prismquant.headers import read_header
from prismquant.models.arch_files import known_archs
from prismquant.models.config import import_transformers
from prismquant.models.experts import ExpertLayers
from prismquant.models.load import empty_model
from prismquant.models.names import NameMap
from prismquant.shards import INDEX_NAME
from prismquant.storage import write_json, write_tensors

TOKENS_OF_A_PICTURE = 256
_MOST_TOKENS_OF_A_PICTURE = 1280


@dataclass(frozen=True)
class Dimensions:
    """What a released configuration says, as far as it decides shapes.

    Attributes:
        family: An architecture's name, e.g. ``qwen2_vl``.
        text, vision: Fields of the two configurations, without depths and ids.
        blocks: Blocks of the language model.
        vision_blocks: Blocks of the vision tower.
        tied: Whether the head is the embedding.
        rope: Rotary embeddings of the language model.
        special_blocks: The field of the vision configuration that lists blocks (those with full
            attention, those that feed the language model's first blocks), and the list.
    """

    family: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    blocks: int
    vision_blocks: int
    tied: bool
    rope: Mapping[str, Any]
    special_blocks: tuple[str, tuple[int, ...]] | None = None

    def cut(self, blocks: int) -> Dimensions:
        """The same model with no more than so many blocks in each tower.

        Special blocks are then the last ones, as many as there were if they fit.
        """
        depth = min(blocks, self.vision_blocks)
        special = self.special_blocks
        if special is not None and depth < self.vision_blocks:
            # Full attention in every block would leave no window; one block of four has it.
            count = 1 if self.family == "qwen2_5_vl" else len(special[1])
            special = (special[0], tuple(range(depth)[-count:]))
        return replace(
            self,
            blocks=min(blocks, self.blocks),
            vision_blocks=depth,
            special_blocks=special,
        )

    @property
    def patch(self) -> int:
        """Pixels along each side of a patch."""
        return int(self.vision["patch_size"])

    @property
    def picture_side(self) -> int:
        """Pixels along each side of a picture of :data:`TOKENS_OF_A_PICTURE` tokens."""
        return math.isqrt(TOKENS_OF_A_PICTURE) * 2 * self.patch


_QWEN2_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}

_RELEASED: dict[str, Dimensions] = {
    "qwen2-vl-2b": Dimensions(
        "qwen2_vl",
        text={
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
        },
        vision={
            "embed_dim": 1280,
            "hidden_size": 1536,
            "mlp_ratio": 4,
            "num_heads": 16,
            "patch_size": 14,
        },
        blocks=28,
        vision_blocks=32,
        tied=True,
        rope=_QWEN2_ROPE,
    ),
    "qwen2.5-vl-7b": Dimensions(
        "qwen2_5_vl",
        text={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
        },
        vision={
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "out_hidden_size": 3584,
            "window_size": 112,
        },
        blocks=28,
        vision_blocks=32,
        tied=False,
        rope=_QWEN2_ROPE,
        special_blocks=("fullatt_block_indexes", (7, 15, 23, 31)),
    ),
    "qwen3-vl-8b": Dimensions(
        "qwen3_vl",
        text={
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
        },
        vision={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": 4096,
            "num_position_embeddings": 2304,
        },
        blocks=36,
        vision_blocks=27,
        tied=False,
        rope={
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
        special_blocks=("deepstack_visual_indexes", (8, 16, 24)),
    ),
}
_RELEASED |= {
    "qwen3-vl-30b-a3b": replace(
        _RELEASED["qwen3-vl-8b"],
        family="qwen3_vl_moe",
        text={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 262144,
        },
        vision={**_RELEASED["qwen3-vl-8b"].vision, "out_hidden_size": 2048},
        blocks=48,
    )
}
MODELS: Mapping[str, Dimensions] = {
    **_RELEASED,
    "qwen2.5-vl-7b-cut": _RELEASED["qwen2.5-vl-7b"].cut(4),
    "qwen3-vl-8b-cut": _RELEASED["qwen3-vl-8b"].cut(4),
    "qwen3-vl-30b-a3b-cut": _RELEASED["qwen3-vl-30b-a3b"].cut(1),
}
"""By name; those that end in ``-cut`` have four blocks in each tower, or one that has experts."""

# A block of a tower; everything of one goes into one shard.
_BLOCK = re.compile(r"(.*\.(?:blocks|layers)\.\d+)\.")
# A loose tensor of so many elements, such as the embedding, has a shard of its own.
_LARGE = 1 << 24
_BIAS_DEVIATION = 0.02
_NOISE_DEVIATION = 24.0


def config_of(dimensions: Dimensions) -> Any:
    """The transformers configuration of a model of these dimensions, in bfloat16."""
    transformers = import_transformers()
    known = transformers.AutoConfig.from_pretrained(str(CHECKPOINT), local_files_only=True)
    text = {
        **dimensions.text,
        "num_hidden_layers": dimensions.blocks,
        "rope_parameters": dict(dimensions.rope),
        "eos_token_id": known.text_config.eos_token_id,
        "pad_token_id": known.text_config.pad_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": dimensions.tied,
    }
    vision = {**dimensions.vision, "depth": dimensions.vision_blocks}
    if dimensions.special_blocks is not None:
        name, blocks = dimensions.special_blocks
        vision[name] = list(blocks)
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    arch = known_archs()[dimensions.family]
    config = getattr(transformers, arch.hf_class).config_class(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=dimensions.tied,
        **{name: getattr(known, name) for name in tokens},
    )
    config.architectures = [arch.hf_class]
    config.dtype = torch.bfloat16
    return config


def write_model(folder: Path, dimensions: Dimensions, seed: int = 0) -> Path:
    """Write a random checkpoint; one that is there already, whole and of these dimensions, stays.

    Args:
        folder: Where it goes.
        dimensions: Of the model.
        seed: Of the weights.

    Returns:
        The folder.
    """
    config = config_of(dimensions)
    if not _is_there(folder, config):
        shutil.rmtree(folder, ignore_errors=True)
        copy_companions(folder)
        _write_processor(folder, dimensions)
        write_weights(folder, config, dimensions.family, seed)
    return folder


def copy_companions(folder: Path) -> None:
    """Copy what lies beside the embedded model's weights, without its configuration and card."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in CHECKPOINT.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", "README.md"):
            shutil.copy(path, folder / path.name)


def write_weights(folder: Path, config: Any, family: str, seed: int = 0) -> None:
    """Write random bfloat16 shards, their index, and the configuration last.

    Args:
        folder: Where they go.
        config: The model's configuration.
        family: An architecture's name.
        seed: Of the weights.
    """
    arch = known_archs()[family]
    names = NameMap(arch.layouts[0].name, arch.layouts[0].rewrites)
    shards: dict[str, dict[str, torch.Size]] = {}
    # Tied ends are one parameter, which is told by one name.
    for name, shape in _stored_shapes(empty_model(config, arch)):
        shards.setdefault(_shard_of(name, shape), {})[name] = shape
    generator = torch.Generator().manual_seed(seed)
    index: dict[str, str] = {}
    size = 0
    for number, shapes in enumerate(shards.values(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {names.to_disk(n): _drawn(n, shape, generator) for n, shape in shapes.items()}
        write_tensors(folder / file, tensors)
        index |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        folder / INDEX_NAME,
        {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))},
    )
    write_json(folder / "config.json", json.loads(config.to_json_string()))


def _stored_shapes(model: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    """Names and shapes of parameters; of experts, those of the stacks of released checkpoints."""
    stacked = tuple(n for n, m in model.named_modules() if isinstance(m, ExpertLayers))
    for name, parameter in model.named_parameters():
        owner = next((path for path in stacked if name.startswith(f"{path}.")), None)
        if owner is None:
            yield name, parameter.shape
        elif name == f"{owner}.0.gate_proj.weight":
            inner, width = parameter.shape
            count = len(list(model.get_submodule(owner).children()))
            yield f"{owner}.gate_up_proj", torch.Size((count, width, 2 * inner))
            yield f"{owner}.down_proj", torch.Size((count, inner, width))


def write_samples(folder: Path, *, count: int, side: int, seed: int = 0) -> Path:
    """Write conversations about single pictures, as JSON lines; files that are there are reused.

    Args:
        folder: Where they go.
        count: Number of conversations.
        side: Pixels along each side of a picture.
        seed: Of contents.

    Returns:
        The JSONL file.
    """
    target = folder / "calibration.jsonl"
    if target.exists():
        return target
    drawn = write_dataset(
        folder / "drawn", split="calibration", seed=seed, count=count, mix={"image": 1.0}
    )
    random = np.random.default_rng(seed)
    lines = []
    for line in drawn.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        (picture,) = (i for i in sample["messages"][0]["content"] if i["type"] == "image")
        small = Image.open(drawn.parent / picture["image"]).resize((side, side))
        # Enlarged alone, its patches would be flat, and what the model sees of low rank.
        noisy = np.asarray(small) + random.normal(0.0, _NOISE_DEVIATION, (side, side, 3))
        name = f"{sample['id']}.png"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name)
        picture["image"] = name
        lines.append(json.dumps(sample) + "\n")
    target.write_text("".join(lines), encoding="utf-8")
    return target


def weight_files_bytes(folder: Path) -> int:
    """Bytes of the tensors in a folder's shards."""
    return sum(
        info.nbytes for file in folder.glob("*.safetensors") for info in read_header(file).values()
    )


def _is_there(folder: Path, config: Any) -> bool:
    """The configuration is written last: where it is there, all else is."""
    path = folder / "config.json"
    return path.is_file() and json.loads(path.read_text()) == json.loads(config.to_json_string())


def _shard_of(name: str, shape: torch.Size) -> str:
    block = _BLOCK.match(name)
    if block is not None:
        return block.group(1)
    return name if shape.numel() >= _LARGE else ""


def _drawn(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A parameter: normal with unit gain; norms one."""
    values = torch.empty(shape, dtype=torch.bfloat16)
    if name.endswith(".bias"):
        return values.normal_(0.0, _BIAS_DEVIATION, generator=generator)
    if len(shape) == 1:
        return values.fill_(1.0)
    # Released stacks of experts have the sides of each matrix the other way round.
    fan_in = shape[1] if len(shape) == 3 and name.endswith("_proj") else shape[1:].numel()
    return values.normal_(0.0, fan_in**-0.5, generator=generator)


def _write_processor(folder: Path, dimensions: Dimensions) -> None:
    """The family's processor, with its patches and limits, and the embedded model's tokenizer."""
    transformers = import_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(CHECKPOINT), local_files_only=True)
    title = getattr(transformers, known_archs()[dimensions.family].hf_class).__name__
    title = title.removesuffix("ForConditionalGeneration").removesuffix("Moe")
    pixels = (2 * dimensions.patch) ** 2
    common = {
        "patch_size": dimensions.patch,
        "size": {"shortest_edge": 4 * pixels, "longest_edge": _MOST_TOKENS_OF_A_PICTURE * pixels},
    }
    video = "Qwen3VLVideoProcessor" if title == "Qwen3VL" else "Qwen2VLVideoProcessor"
    getattr(transformers, f"{title}Processor")(
        image_processor=transformers.Qwen2VLImageProcessorPil(**common),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, video)(**common, cap_pixels_per_frame=False),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
