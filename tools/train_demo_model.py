"""Train the demonstration model from nothing on the scenes of ``prismquant.demo.scenes``.

    python tools/train_demo_model.py --out DIR [--family qwen2_vl] [--steps N] [--resume]

The run writes ``DIR/training/`` (weights and optimizer moments as safetensors, progress as JSON;
``--resume`` continues from it) and, now and then and at the end, ``DIR/checkpoint/``: a complete
checkpoint that ``AutoProcessor`` and ``AutoModelForImageTextToText`` load, with a model card that
states what was measured.

One training row holds one picture, one clip or no picture, followed by as many questions as fit.
Every question sees the picture and itself but no other question, at the positions it would have
alone, so that a row of many questions trains exactly what a single question asks.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import shutil
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from prismquant.demo import board, scenes


def _import_torchvision() -> None:
    """Import torchvision; where its compiled part fails to load, declare the operators it needs.

    The processors use its pure transforms only.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor"
            )
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")


_import_torchvision()
import transformers  # noqa: E402
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from transformers.models.qwen3_5.modeling_qwen3_5 import (  # noqa: E402
    torch_chunk_gated_delta_rule,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prismquant.demo.questions import Turn
    from prismquant.demo.scenes import Kind, SceneSample

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
SPECIALS = (PAD, START, END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
PATCH, MERGE = 8, 2
"""Pixels along a patch, patches merged along each side into one token."""
GRID = board.FRAME_PIXELS // PATCH
"""Patches along each side of a frame."""
SIDE = GRID // MERGE
"""Tokens along each side of a frame."""
HEAD = 32
"""Width of an attention head."""
LONGEST_CLIP = 6
"""Frames of the longest clip."""
FRAME_RATE = 2.0
"""Frames a second of a clip, where a processor writes the time into the prompt."""
WIDTH_UNIT = 128
"""Every Linear's input and output width is a multiple of this."""
KINDS: tuple[Kind, ...] = scenes.KINDS

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' or 'image' in item -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif item['type'] == 'video' or 'video' in item -%}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in item -%}{{- item['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
LINE_TEMPLATE = CHAT_TEMPLATE.replace(VISION_START, "").replace(VISION_END, "\n")
"""A picture or a clip stands on a line of its own, without marks."""


@dataclass(frozen=True)
class Settings:
    """What a run is made of; two runs with equal settings and threads give equal weights.

    A family with experts has ``experts`` in each layer, ``active`` of them for each token, and
    these together are as wide as the MLP of another family. ``balance`` weighs what keeps an
    expert from being chosen by no token.

    Until step ``curriculum`` the scenes grow harder, and long descriptions teach the model to look.
    From step ``settle`` on the scenes are of mixed hardness, more rows are text, and short answers
    count more, so that it learns to compare and to count as well.
    """

    family: str
    steps: int = 4400
    width: int = 128
    layers: int = 5
    inner: int = 256
    experts: int = 8
    active: int = 2
    balance: float = 0.01
    vision_layers: int = 3
    rope_theta: float = 100.0
    rate: float = 2e-3
    warmup: int = 150
    decay: float = 0.4
    curriculum: int = 1000
    settle: int = 1500
    rows: int = 24
    weight_decay: float = 0.01
    seed: int = 0


@dataclass(slots=True)
class Batch:
    """Tensors of a batch of rows.

    Attributes:
        ids: (rows, tokens).
        targets: (rows, tokens), the next token where it belongs to an answer, else -1.
        places: (3, rows, tokens), rotary positions.
        mask: (rows, 1, tokens, tokens), true where attention goes.
        pixels: (views, patches, values); a view is a picture or what one patch holds of a clip,
            a frame or a pair of frames.
        slots: (rows, tokens), true where the vision features go, in order.
        turns: (rows, tokens), the number of a token's question; 0 before the first, -1 for padding.
        lengths: (answer tokens), for each of the targets in order the length of its answer.
        cells: (views, cells, attributes), what each cell shows, see :func:`cell_labels`.
    """

    ids: Tensor
    targets: Tensor
    places: Tensor
    mask: Tensor
    pixels: Tensor
    slots: Tensor
    turns: Tensor
    lengths: Tensor
    cells: Tensor


@dataclass(frozen=True, slots=True)
class Prefix:
    """The part of a row before its questions, which all of them see.

    Attributes:
        ids: token ids.
        places: rotary position of each token: time, row, column.
        slots: for each token whether a vision feature takes its place.
    """

    ids: list[int]
    places: list[tuple[int, int, int]]
    slots: list[bool]


Encode = Callable[[str], list[int]]
"""Turns text into token ids."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What a model makes of a batch.

    Attributes:
        hidden: (rows, tokens, width), the last hidden states.
        features: (views, tokens, width), the vision features.
        routing: for each layer with experts, (rows * tokens, experts), the router's logits.
    """

    hidden: Tensor
    features: Tensor
    routing: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture; another one is another entry of FAMILIES.

    Attributes:
        config: makes its config from the settings, the ids of the special tokens and the number of
            tokens.
        processor: makes its processor from the tokenizer.
        prefix: returns what comes before the question of a sample.
        forward: runs the model on a batch.
        frames: frames in one patch of a clip.
        wording: what its processor writes into prompts, for the tokenizer to learn.
        template: its chat template.
        row_tokens: tokens of a training row.
    """

    config: Callable[[Settings, Mapping[str, int], int], Any]
    processor: Callable[[Any], Any]
    prefix: Callable[[Encode, SceneSample], Prefix]
    forward: Callable[[Any, Batch], Pass]
    frames: int = 2
    wording: tuple[str, ...] = ()
    template: str = CHAT_TEMPLATE
    row_tokens: int = 160


# The tokenizer


def build_tokenizer(family: Family) -> Any:
    """Train a byte-level tokenizer until each word of questions, answers and prompts is a token."""
    corpus = list(family.wording) * 100
    for kind in KINDS:
        for index in range(3000):
            for turn in scenes.make_sample(
                kind, scenes.sample_rng("train", 0, index), 1.0, 4
            ).turns:
                corpus += [turn.question, turn.answer]
    corpus += [f"{role}\n" for role in ("user", "assistant", "system")] * 100
    pattern = Regex(
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(corpus, trainer)
    state = json.loads(raw.to_str())["model"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],
        unk_token=PAD,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(SPECIALS[1:]),
    )
    tokenizer.chat_template = family.template
    return tokenizer


# The families


def text_config(settings: Settings, ids: Mapping[str, int], vocabulary: int) -> dict[str, Any]:
    """Return what the language models of all families have in common.

    With the usual theta of a million the slow rotary frequencies would not tell three columns
    apart, so theta is low.
    """
    return {
        "vocab_size": vocabulary,
        "hidden_size": settings.width,
        "intermediate_size": settings.inner,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.width // HEAD,
        "num_key_value_heads": WIDTH_UNIT // HEAD,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_theta},
        "bos_token_id": None,
        "eos_token_id": ids[END],
        "pad_token_id": ids[PAD],
    }


def qwen_tokens(ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the top-level settings of the Qwen families."""
    return {
        "image_token_id": ids[IMAGE_PAD],
        "video_token_id": ids[VIDEO_PAD],
        "vision_start_token_id": ids[VISION_START],
        "vision_end_token_id": ids[VISION_END],
        "tie_word_embeddings": False,
    }


def vision_processing(frames: int, clip_frames: int) -> dict[str, Any]:
    """Return the settings of an image or video processor; what is larger is resized to the area.

    Args:
        frames: frames in one patch.
        clip_frames: frames whose pixels are counted together.
    """
    return {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": frames,
        "size": {
            "shortest_edge": board.FRAME_PIXELS**2 // 2,
            "longest_edge": board.FRAME_PIXELS**2 * clip_frames,
        },
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


class PrefixWriter:
    """Writes a prefix piece by piece."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._next = 0
        self.prefix = Prefix([], [], [])

    def text(self, text: str) -> None:
        """Add text, a position for each token."""
        self._add(self._encode(text), slots=False)

    def line(self, placeholder: str) -> None:
        """Add the tokens of one view, a position for each."""
        self._add(self._encode(placeholder) * SIDE**2, slots=True)

    def grid(self, placeholder: str, views: int = 1) -> None:
        """Add the tokens of views at time, row and column; text goes on after the largest."""
        first = self._next
        self.prefix.places.extend(
            (first + time, first + row, first + column)
            for time in range(views)
            for row in range(SIDE)
            for column in range(SIDE)
        )
        count = views * SIDE**2
        self.prefix.ids.extend(self._encode(placeholder) * count)
        self.prefix.slots.extend([True] * count)
        self._next += max(views, SIDE)

    def _add(self, ids: list[int], slots: bool) -> None:
        self.prefix.places.extend((self._next + i,) * 3 for i in range(len(ids)))
        self.prefix.ids.extend(ids)
        self.prefix.slots.extend([slots] * len(ids))
        self._next += len(ids)


def input_embeddings(model: Any, batch: Batch, features: Tensor) -> Tensor:
    """Return the embeddings of the batch, (rows, tokens, width), features in their slots."""
    embeds: Tensor = model.get_input_embeddings()(batch.ids)
    return embeds.masked_scatter(batch.slots[:, :, None], features.flatten(0, 1).to(embeds.dtype))


def no_features(model: Any) -> Tensor:
    """Return the vision features of a batch that shows nothing."""
    width = model.config.text_config.hidden_size
    return torch.zeros(0, 1, width, dtype=model.lm_head.weight.dtype)


def patch_features(convolution: Any, pixels: Tensor) -> Tensor:
    """Apply the convolution over whole patches, (views, patches, values), as a matrix product."""
    return functional.linear(pixels, convolution.weight.flatten(1), convolution.bias)


def patch_places() -> Tensor:
    """Return each patch's (row, column), (2, patches), in the processors' order: token by token."""
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    places = torch.stack([rows, columns]).view(2, SIDE, MERGE, SIDE, MERGE)
    return places.transpose(2, 3).reshape(2, -1)


def attend(query: Tensor, key: Tensor, value: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Mix (views, heads, patches, head) by attention within each view; ``turns`` is cos and sin.

    Views never see each other, so a batch axis replaces a tower's loop over sequences.

    Returns:
        (views, patches, width).
    """
    query, key = rotate(query, *turns), rotate(key, *turns)
    mixed = functional.scaled_dot_product_attention(query, key, value.to(query.dtype))
    return mixed.transpose(1, 2).flatten(2)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to (views, heads, patches, head)."""
    first, second = states.float().chunk(2, dim=-1)
    return (states * cos + torch.cat((-second, first), dim=-1) * sin).to(states.dtype)


def qwen_block(block: Any, hidden: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Run a block of the vision tower of Qwen2-VL or Qwen3-VL on (views, patches, width)."""
    attention = block.attn
    views, patches, _ = hidden.shape
    qkv = attention.qkv(block.norm1(hidden)).view(views, patches, 3, attention.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    hidden = hidden + attention.proj(attend(query, key, value, turns))
    result: Tensor = hidden + block.mlp(block.norm2(hidden))
    return result


# Qwen2-VL


def qwen2_vl_config(settings: Settings, ids: Mapping[str, int], vocabulary: int) -> Any:
    """Return a small Qwen2-VL; the columns get the slowest rotary frequencies."""
    text = text_config(settings, ids, vocabulary)
    half = HEAD // 2
    text["rope_parameters"]["mrope_section"] = [half // 4, half * 3 // 8, half * 3 // 8]
    return transformers.Qwen2VLConfig(
        text_config=text,
        vision_config={
            "depth": settings.vision_layers,
            "embed_dim": 128,
            "hidden_size": settings.width,
            "num_heads": 4,
            "mlp_ratio": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
        },
        **qwen_tokens(ids),
    )


def qwen2_vl_processor(tokenizer: Any) -> Any:
    """Return the processor, which counts the pixels of each frame by itself."""
    common = vision_processing(frames=2, clip_frames=1)
    return transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessorPil(**common),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(**common, cap_pixels_per_frame=False),
        chat_template=tokenizer.chat_template,
    )


def qwen2_vl_prefix(encode: Encode, sample: SceneSample) -> Prefix:
    """Return the start of the user's message with the picture or the clip, if there is one."""
    writer = PrefixWriter(encode)
    writer.text(f"{START}user\n")
    if sample.kind != "text":
        writer.text(VISION_START)
        pad = IMAGE_PAD if sample.kind == "image" else VIDEO_PAD
        writer.grid(pad, max(1, len(sample.frames) // 2))
        writer.text(VISION_END)
    return writer.prefix


def qwen2_vl_forward(model: Any, batch: Batch) -> Pass:
    """Put the vision features into the slots and run the language model."""
    features = qwen2_vl_encode(model, batch.pixels) if len(batch.pixels) else no_features(model)
    outputs = model.model.language_model(
        inputs_embeds=input_embeddings(model, batch, features),
        position_ids=batch.places,
        attention_mask={"full_attention": batch.mask},
        use_cache=False,
    )
    return Pass(outputs.last_hidden_state, features)


def qwen2_vl_encode(model: Any, pixels: Tensor) -> Tensor:
    """Run the vision tower on all views at once; return (views, tokens, width)."""
    visual = model.model.visual
    hidden = patch_features(visual.patch_embed.proj, pixels)
    turns = visual.rotary_pos_emb(hidden, patch_places().T)
    for block in visual.blocks:
        hidden = qwen_block(block, hidden, turns)
    tokens: Tensor = visual.merger(hidden)
    return tokens.view(len(pixels), SIDE**2, -1)


# Qwen3-VL


def qwen3_vl_config(settings: Settings, ids: Mapping[str, int], vocabulary: int) -> Any:
    """Return a small Qwen3-VL.

    Its first two vision blocks feed the first two language layers, and its table of positions has
    an entry for each patch of a frame.
    """
    return transformers.Qwen3VLConfig(
        text_config=qwen3_vl_text(settings, ids, vocabulary),
        vision_config=qwen3_vl_vision(settings),
        **qwen_tokens(ids),
    )


def qwen3_vl_text(settings: Settings, ids: Mapping[str, int], vocabulary: int) -> dict[str, Any]:
    """Return the settings of the language model of a small Qwen3-VL."""
    text = text_config(settings, ids, vocabulary)
    text["head_dim"] = HEAD
    text["rope_parameters"] |= {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    return text


def qwen3_vl_vision(settings: Settings) -> dict[str, Any]:
    """Return the settings of the vision tower of a small Qwen3-VL."""
    return {
        "depth": settings.vision_layers,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": settings.width,
        "num_position_embeddings": GRID**2,
        "deepstack_visual_indexes": [0, 1],
    }


def qwen3_vl_processor(tokenizer: Any) -> Any:
    """Return the processor, which counts the pixels of a clip's frames together."""
    image = vision_processing(frames=2, clip_frames=1)
    video = vision_processing(frames=2, clip_frames=LONGEST_CLIP)
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessorPil(**image),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(**video, cap_pixels_per_frame=False),
        chat_template=tokenizer.chat_template,
    )


def qwen3_vl_prefix(encode: Encode, sample: SceneSample) -> Prefix:
    """Return the start of the user's message; before each pair of frames stands its time.

    The processor writes the marks of a pair inside those that the template writes around a clip.
    """
    if sample.kind != "video":
        return qwen2_vl_prefix(encode, sample)
    writer = PrefixWriter(encode)
    writer.text(f"{START}user\n{VISION_START}")
    for pair in range(len(sample.frames) // 2):
        writer.text(qwen3_vl_stamp(pair) + VISION_START)
        writer.grid(VIDEO_PAD)
        writer.text(VISION_END)
    writer.text(VISION_END)
    return writer.prefix


def qwen3_vl_stamp(pair: int) -> str:
    """Return how the processor writes the time of a pair of frames, the mean of the two."""
    return f"<{(2 * pair + 0.5) / FRAME_RATE:.1f} seconds>"


def qwen3_vl_forward(model: Any, batch: Batch) -> Pass:
    """Put the vision features into the slots and run the language model with the early ones."""
    features, early = no_features(model), None
    if len(batch.pixels):
        features, early = qwen3_vl_encode(model, batch.pixels)
    experts = hasattr(model.config.text_config, "num_experts")
    outputs = model.model.language_model(
        inputs_embeds=input_embeddings(model, batch, features),
        position_ids=batch.places,
        attention_mask=batch.mask,
        use_cache=False,
        visual_pos_masks=batch.slots,
        deepstack_visual_embeds=early,
        **({"output_router_logits": True} if experts else {}),
    )
    return Pass(outputs.last_hidden_state, features, outputs.get("router_logits") or ())


def qwen3_vl_encode(model: Any, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run the vision tower on all views at once.

    Returns:
        The features, (views, tokens, width), and those of the early blocks, if it gives any,
        (tokens of all views, width) for each of the first language layers.
    """
    visual = model.model.visual
    places = patch_places()
    hidden = patch_features(visual.patch_embed.proj, pixels)
    hidden = hidden + visual.pos_embed(places[0] * GRID + places[1])
    turns = visual.rotary_pos_emb(hidden, places.T)
    early: list[Tensor] = []
    for index, block in enumerate(visual.blocks):
        hidden = qwen_block(block, hidden, turns)
        if index in getattr(visual, "deepstack_visual_indexes", ()):
            early.append(visual.deepstack_merger_list[len(early)](hidden))
    tokens: Tensor = visual.merger(hidden)
    return tokens.view(len(pixels), SIDE**2, -1), early


# Qwen3-VL with experts


def qwen3_vl_moe_config(settings: Settings, ids: Mapping[str, int], vocabulary: int) -> Any:
    """Return a small Qwen3-VL whose every language layer has experts in the place of its MLP."""
    experts = {
        "num_experts": settings.experts,
        "num_experts_per_tok": settings.active,
        "moe_intermediate_size": settings.inner // settings.active,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": settings.balance,
    }
    return transformers.Qwen3VLMoeConfig(
        text_config=qwen3_vl_text(settings, ids, vocabulary) | experts,
        vision_config=qwen3_vl_vision(settings),
        **qwen_tokens(ids),
    )


# Qwen3.5


def qwen3_5_config(settings: Settings, ids: Mapping[str, int], vocabulary: int) -> Any:
    """Return a small Qwen3.5: every third language layer and the last have full attention.

    The others have linear attention, with two heads of values for each of keys. The rotary
    positions turn half of a head.
    """
    text = text_config(settings, ids, vocabulary)
    text["head_dim"] = HEAD
    text["rope_parameters"] |= {
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
    }
    last = settings.layers - 1
    text["layer_types"] = [
        "full_attention" if layer % 3 == 2 or layer == last else "linear_attention"
        for layer in range(settings.layers)
    ]
    heads = settings.width // HEAD
    text |= {"linear_key_head_dim": HEAD, "linear_num_key_heads": heads // 2}
    text |= {"linear_value_head_dim": HEAD, "linear_num_value_heads": heads}
    vision = qwen3_vl_vision(settings)
    del vision["deepstack_visual_indexes"]
    return transformers.Qwen3_5Config(text_config=text, vision_config=vision, **qwen_tokens(ids))


@dataclass(frozen=True, slots=True)
class Sequences:
    """Tokens of some rows of a batch, each sequence from its start, padded at the end.

    Attributes:
        rows: (sequences), the row of each.
        tokens: (sequences, longest), the places of its tokens in the row.
        real: (sequences, longest), false for padding.
    """

    rows: Tensor
    tokens: Tensor
    real: Tensor

    def take(self, values: Tensor) -> Tensor:
        """Return what belongs to the tokens, (sequences, longest, ..), of (rows, tokens, ..)."""
        return values[self.rows[:, None], self.tokens]


@dataclass(frozen=True, slots=True)
class Forks:
    """Where the questions of a batch start from the state after what comes before them.

    Attributes:
        prefix: what comes before the questions of each row.
        questions: those of about the same length together.
        early: (2, early tokens), row and place of the questions' first tokens, which see less of
            their question than a convolution spans.
        before: (early tokens, kernel), the places of what they see, the latest last; -1 for none.
    """

    prefix: Sequences
    questions: list[Sequences]
    early: Tensor
    before: Tensor


CHUNK = 16
"""Tokens that linear attention mixes at once."""


def find_forks(turns: Tensor, kernel: int) -> Forks:
    """Find the questions of a batch, whose tokens are consecutive.

    Args:
        turns: (rows, tokens), as of a batch.
        kernel: tokens that a convolution spans.
    """
    sizes = (turns == 0).sum(1)
    counts = turns.amax(1)
    rows = torch.repeat_interleave(torch.arange(len(turns)), counts)
    numbers = torch.cat([torch.arange(1, int(count) + 1) for count in counts])
    mine = turns[rows] == numbers[:, None]
    starts, lengths = mine.int().argmax(1), mine.sum(1)
    chunks = (lengths + CHUNK - 1) // CHUNK
    questions = [
        _sequences(rows[chunks == size], starts[chunks == size], lengths[chunks == size])
        for size in chunks.unique()
    ]
    offsets = torch.arange(kernel - 1)
    short = offsets < lengths[:, None]
    back = offsets[:, None] - torch.arange(kernel - 1, -1, -1)
    inside, outside = starts[:, None, None] + back, sizes[rows][:, None, None] + back
    before = torch.where(back >= 0, inside, outside.clamp(min=-1))
    return Forks(
        prefix=_sequences(torch.arange(len(turns)), torch.zeros_like(sizes), sizes),
        questions=questions,
        early=torch.stack([rows[:, None].expand_as(short), starts[:, None] + offsets])[:, short],
        before=before[short],
    )


def _sequences(rows: Tensor, starts: Tensor, lengths: Tensor) -> Sequences:
    steps = torch.arange(int(lengths.max()))
    real = steps < lengths[:, None]
    return Sequences(rows, torch.where(real, starts[:, None] + steps, 0), real)


def linear_attention(layer: Any, hidden: Tensor, forks: Forks) -> Tensor:
    """Run linear attention on (rows, tokens, width), each question from the state of its prefix."""
    mixed = functional.silu(convolve(layer.in_proj_qkv(hidden), layer.conv1d.weight[:, 0].T, forks))
    parts = mixed.float().split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    widths = (layer.head_k_dim, layer.head_k_dim, layer.head_v_dim)
    heads = [part.unflatten(-1, (-1, size)) for part, size in zip(parts, widths, strict=True)]
    steps = functional.softplus(layer.in_proj_a(hidden).float() + layer.dt_bias)
    heads += [-layer.A_log.float().exp() * steps, layer.in_proj_b(hidden).float().sigmoid()]
    result = torch.zeros_like(heads[2])
    with torch.autocast("cpu", enabled=False):
        found, states = delta_rule(heads, forks.prefix, None)
        result[forks.prefix.real.nonzero(as_tuple=True)] = found
        for some in forks.questions:
            found, _ = delta_rule(heads, some, states[some.rows])
            places = some.rows[:, None].expand_as(some.tokens)[some.real], some.tokens[some.real]
            result = result.index_put(places, found)
    gate = layer.in_proj_z(hidden).unflatten(-1, (-1, layer.head_v_dim))
    output: Tensor = layer.out_proj(layer.norm(result, gate).flatten(2))
    return output


def convolve(values: Tensor, weight: Tensor, forks: Forks) -> Tensor:
    """Convolve each channel of (rows, tokens, channels) with (kernel, channels), causally."""
    weight, count = weight.to(values.dtype), values.shape[1]
    padded = functional.pad(values, (0, 0, len(weight) - 1, 0))
    shifts = [padded[:, tap : tap + count] * weight[tap] for tap in range(len(weight))]
    seen = values[forks.early[0][:, None], forks.before] * (forks.before >= 0)[..., None]
    plain = sum(shifts[1:], start=shifts[0])
    return plain.index_put((forks.early[0], forks.early[1]), (seen * weight).sum(1))


def delta_rule(
    heads: Sequence[Tensor], some: Sequences, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mix the values of sequences by the gated delta rule.

    Args:
        heads: queries, keys and values, (rows, tokens, heads, size); logarithms of decay, and
            strengths of writing, (rows, tokens, heads).
        some: the sequences.
        state: (sequences, heads, key size, value size) at their starts, or None for zero.

    Returns:
        For the sequences' real tokens, (tokens, heads, size); and the states after the last ones.
    """
    query, key, value, decay, strength = (some.take(part) for part in heads)
    # Padding neither decays a state nor writes to it.
    mixed, after = torch_chunk_gated_delta_rule(
        query,
        key,
        value,
        g=decay * some.real[..., None],
        beta=strength * some.real[..., None],
        chunk_size=CHUNK,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return mixed[some.real], after


def qwen3_5_forward(model: Any, batch: Batch) -> Pass:
    """Put the vision features into the slots and run the language model layer by layer."""
    features = no_features(model)
    if len(batch.pixels):
        features, _ = qwen3_vl_encode(model, batch.pixels)
    hidden = input_embeddings(model, batch, features)
    language = model.model.language_model
    turns = language.rotary_emb(hidden, batch.places)
    forks = find_forks(batch.turns, model.config.text_config.linear_conv_kernel_dim)
    for layer in language.layers:
        normed = layer.input_layernorm(hidden)
        if layer.block_type == "linear_attention":
            hidden = hidden + linear_attention(layer.linear_attn, normed, forks)
        else:
            hidden = hidden + layer.self_attn(normed, turns, batch.mask)[0]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return Pass(language.norm(hidden), features)


# VideoLLaMA3


def video_llama_3_config(settings: Settings, ids: Mapping[str, int], vocabulary: int) -> Any:
    """Return a small VideoLLaMA3, whose language model is a Qwen2 with positions in one line."""
    return transformers.VideoLlama3Config(
        text_config={"model_type": "qwen2", **text_config(settings, ids, vocabulary)},
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": settings.vision_layers,
            "num_attention_heads": 4,
            "patch_size": PATCH,
        },
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        tie_word_embeddings=False,
    )


def video_llama_3_processor(tokenizer: Any) -> Any:
    """Return the processor, which counts the pixels of a clip's frames together.

    Unlike the released models it merges the patches of pictures as well, for short prompts.
    """
    image = vision_processing(frames=1, clip_frames=1)
    video = vision_processing(frames=1, clip_frames=LONGEST_CLIP)
    return transformers.VideoLlama3Processor(
        image_processor=transformers.VideoLlama3ImageProcessorPil(**image),
        tokenizer=tokenizer,
        video_processor=transformers.VideoLlama3VideoProcessor(**video),
        chat_template=tokenizer.chat_template,
    )


def video_llama_3_prefix(encode: Encode, sample: SceneSample) -> Prefix:
    """Return the start of the user's message; before each frame of a clip stands its time.

    The processor drops the tokens of a frame that hardly differ from the frame before. The grain
    of the drawn frames always makes a difference, so that none are dropped.
    """
    writer = PrefixWriter(encode)
    writer.text(f"{START}user\n")
    if sample.kind == "image":
        writer.line(IMAGE_PAD)
    for frame in range(len(sample.frames) if sample.kind == "video" else 0):
        writer.text(video_llama_3_stamp(frame))
        writer.line(VIDEO_PAD)
    if sample.kind != "text":
        writer.text("\n")
    return writer.prefix


def video_llama_3_stamp(frame: int) -> str:
    """Return how the processor writes the time of a frame."""
    return f"{',' if frame else ''}Time {frame / FRAME_RATE:.1f}s:"


def video_llama_3_forward(model: Any, batch: Batch) -> Pass:
    """Put the vision features into the slots and run the language model."""
    features = no_features(model)
    if len(batch.pixels):
        features = video_llama_3_encode(model, batch.pixels)
    outputs = model.model.language_model(
        inputs_embeds=input_embeddings(model, batch, features),
        position_ids=batch.places[0],
        attention_mask={"full_attention": batch.mask},
        use_cache=False,
    )
    return Pass(outputs.last_hidden_state, features)


def video_llama_3_encode(model: Any, pixels: Tensor) -> Tensor:
    """Run the vision tower and the projector on all views; return (views, tokens, width).

    Halving the grid by bilinear interpolation is the mean of the four patches of a token.
    """
    tower = model.model.vision_model
    hidden = patch_features(tower.embeddings.patch_embedding, pixels)
    turns = tower.rotary_pos_emb(hidden, patch_places().T)
    for layer in tower.encoder.layers:
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        query, key, value = (
            projection(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        hidden = hidden + attention.out_proj(attend(query, key, value, turns))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    merged = tower.post_layernorm(hidden).unflatten(1, (SIDE**2, MERGE**2)).mean(2)
    tokens: Tensor = model.model.projector(merged)
    return tokens


FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(qwen2_vl_config, qwen2_vl_processor, qwen2_vl_prefix, qwen2_vl_forward),
    "qwen3_vl": Family(
        qwen3_vl_config,
        qwen3_vl_processor,
        qwen3_vl_prefix,
        qwen3_vl_forward,
        wording=tuple(qwen3_vl_stamp(pair) for pair in range(LONGEST_CLIP // 2)),
    ),
    "qwen3_vl_moe": Family(
        qwen3_vl_moe_config,
        qwen3_vl_processor,
        qwen3_vl_prefix,
        qwen3_vl_forward,
        wording=tuple(qwen3_vl_stamp(pair) for pair in range(LONGEST_CLIP // 2)),
    ),
    "qwen3_5": Family(
        qwen3_5_config,
        qwen3_vl_processor,
        qwen3_vl_prefix,
        qwen3_5_forward,
        wording=tuple(qwen3_vl_stamp(pair) for pair in range(LONGEST_CLIP // 2)),
    ),
    "video_llama_3": Family(
        video_llama_3_config,
        video_llama_3_processor,
        video_llama_3_prefix,
        video_llama_3_forward,
        frames=1,
        wording=tuple(video_llama_3_stamp(frame) for frame in range(LONGEST_CLIP)),
        template=LINE_TEMPLATE,
        row_tokens=192,
    ),
}


def initialise(model: nn.Module, layers: int, vision_layers: int) -> None:
    """Draw weights with standard deviation 1 / sqrt(inputs), less at the ends of residual branches.

    The usual 0.02 is far too small for layers this narrow. Linear attention starts with steps
    between 0.001 and 0.1, evenly in their logarithms, as Mamba does, so that it remembers.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            inputs = module.weight[0].numel()
            std = inputs**-0.5
            if name.endswith(("o_proj", "down_proj", "linear_attn.out_proj")):
                std /= math.sqrt(2 * layers)
            elif name.endswith(("attn.proj", "out_proj", "mlp.fc2", "mlp.linear_fc2")):
                std /= math.sqrt(2 * vision_layers)
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif name.endswith("linear_attn"):
            steps = torch.empty_like(module.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
            module.dt_bias.data.copy_(steps.expm1().log())
        elif name.endswith("experts"):
            for key, weight in module.named_parameters(recurse=False):
                ends = math.sqrt(2 * layers) if key == "down_proj" else 1.0
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5 / ends)


# Batches


PROBED = (
    len(board.PLACES),
    len(board.SIZES) + 1,
    len(board.COLOURS) + 1,
    len(board.SHAPES) + 1,
)
"""Values of each attribute of a cell: its place; size, colour and shape of its object, or none."""


def cell_labels(sample: SceneSample, frames: int) -> np.ndarray:
    """Return the attributes of each cell, (views, cells, len(PROBED)); -1 where one moves.

    A view of a clip has ``frames`` frames.
    """
    scene = sample.scene
    if scene is None:
        raise ValueError("a sample without a scene has no cells")
    labels = np.zeros((len(board.PLACES), len(PROBED)), dtype=np.int64)
    labels[:, 0] = np.arange(len(labels))
    colours = tuple(board.COLOURS)
    for index, thing in enumerate(scene.things):
        row, column = thing.cell
        number = row * board.BOARD_CELLS + column
        if scene.motion is None or scene.motion.index != index:
            words = (
                board.SIZES.index(thing.size),
                colours.index(thing.colour),
                board.SHAPES.index(thing.shape),
            )
            labels[number, 1:] = [1 + word for word in words]
            continue
        end_row, end_column = scene.motion.end
        for way_row in range(min(row, end_row), max(row, end_row) + 1):
            for way_column in range(min(column, end_column), max(column, end_column) + 1):
                labels[way_row * board.BOARD_CELLS + way_column, 1:] = -1
    return np.repeat(labels[None], max(1, len(sample.frames) // frames), axis=0)


class Packer:
    """Builds batches without the processor; :func:`check_against_processor` compares the two."""

    def __init__(self, tokenizer: Any, family: Family) -> None:
        self._tokenizer = tokenizer
        self._family = family
        self._cache: dict[str, list[int]] = {}
        levels = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
        self._levels = (levels - np.float32(0.5)) / np.float32(0.5)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``; short texts are remembered."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            if len(text) < 60:
                self._cache[text] = ids
        return ids

    def patches(self, frames: Sequence[board.Frame]) -> np.ndarray:
        """Return the frames as (views, patches, values); a picture fills a patch's frames."""
        depth = self._family.frames
        stack = np.stack(frames if len(frames) > 1 else [frames[0]] * depth)
        pixels = self._levels[stack].reshape(-1, depth, SIDE, MERGE, PATCH, SIDE, MERGE, PATCH, 3)
        ordered = pixels.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        return ordered.reshape(ordered.shape[0], GRID * GRID, -1)

    def turn(self, turn: Turn) -> tuple[list[int], list[int]]:
        """Return the ids from the question up to the answer, and the answer's with its end."""
        question = self.encode(turn.question) + self.encode(f"{END}\n{START}assistant\n")
        return question, self.encode(turn.answer) + self.encode(END)

    def pack(self, samples: Sequence[SceneSample], tokens: int | None = None) -> Batch:
        """Pack one sample a row, with those of its questions that fit into ``tokens``, if given."""
        rows = []
        lengths: list[int] = []
        for sample in samples:
            prefix = self._family.prefix(self.encode, sample)
            ids, places = list(prefix.ids), list(prefix.places)
            targets, turns = [-1] * len(ids), [0] * len(ids)
            start = max(places[-1]) + 1
            for number, turn in enumerate(sample.turns, start=1):
                question, answer = self.turn(turn)
                length = len(question) + len(answer)
                if tokens is not None and len(ids) + length > tokens:
                    continue
                ids += question + answer
                targets += [-1] * (len(question) - 1) + answer + [-1]
                turns += [number] * length
                lengths += [len(answer)] * len(answer)
                places += [(start + i, start + i, start + i) for i in range(length)]
            rows.append((ids, targets, places, prefix.slots, turns))
        width = tokens or max(len(row[0]) for row in rows)
        shape = (len(rows), width)
        ids_array = np.full(shape, self.encode(PAD)[0], dtype=np.int64)
        targets_array, turns_array = (
            np.full(shape, -1, dtype=np.int64),
            np.full(shape, -1, dtype=np.int64),
        )
        places_array, slots_array = (
            np.zeros((*shape, 3), dtype=np.int64),
            np.zeros(shape, dtype=bool),
        )
        for number, (ids, targets, places, slots, turns) in enumerate(rows):
            ids_array[number, : len(ids)] = ids
            targets_array[number, : len(ids)] = targets
            turns_array[number, : len(ids)] = turns
            places_array[number, : len(ids)] = places
            slots_array[number, : len(slots)] = slots
        turn_tensor = torch.from_numpy(turns_array)
        keys, queries = turn_tensor[:, None, None, :], turn_tensor[:, None, :, None]
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        depth = self._family.frames
        cells = [cell_labels(sample, depth) for sample in samples if sample.frames]
        seen = [self.patches(sample.frames) for sample in samples if sample.frames]
        pixels = (
            np.concatenate(seen)
            if seen
            else np.zeros((0, GRID * GRID, 3 * depth * PATCH * PATCH), np.float32)
        )
        return Batch(
            ids=torch.from_numpy(ids_array),
            targets=torch.from_numpy(targets_array),
            places=torch.from_numpy(places_array).permute(2, 0, 1),
            mask=causal & ((keys == queries) | (keys == 0)),
            pixels=torch.from_numpy(pixels),
            slots=torch.from_numpy(slots_array),
            turns=turn_tensor,
            lengths=torch.tensor(lengths),
            cells=torch.from_numpy(
                np.concatenate(cells) if cells else np.zeros((0, 1, 1), dtype=np.int64)
            ),
        )


def answer_logits(model: Any, family: Family, batch: Batch) -> tuple[Tensor, Pass]:
    """Return the logits that predict the answers' tokens, and what else the pass has made.

    Shape of the logits: (answer tokens of the batch, vocabulary).
    """
    made = family.forward(model, batch)
    return model.lm_head(made.hidden[batch.targets >= 0]), made


def choices(logits: Tensor, active: int) -> Tensor:
    """Return how many tokens choose each expert, (experts,), from (tokens, experts)."""
    chosen = logits.topk(active, dim=-1).indices
    return torch.bincount(chosen.flatten(), minlength=logits.shape[-1])


def balance_loss(routing: Sequence[Tensor], real: Tensor, active: int) -> Tensor:
    """Return the mean over layers of the load-balancing loss of Switch Transformers.

    It is 1 where the experts of each layer share the tokens evenly, more where they do not. See
    equations 4 to 6 of "Switch Transformers" (Fedus, Zoph, Shazeer, 2021).

    Args:
        routing: for each layer, (tokens, experts).
        real: (tokens), false for padding.
        active: experts of a token.
    """
    losses = []
    for logits in routing:
        counts = choices(logits[real], active)
        likely = logits[real].float().softmax(-1).mean(0)
        losses.append((counts / counts.sum() * likely).sum() * len(likely))
    return torch.stack(losses).mean()


def probe_loss(probe: nn.Module, features: Tensor, cells: Tensor) -> Tensor:
    """Return how badly a linear probe reads the cells from their vision tokens, in nats.

    Without it the language model finds nothing in the features to look at for thousands of steps.
    """
    normed = functional.rms_norm(features.float(), features.shape[-1:])
    parts = probe(normed).float().split(PROBED, dim=-1)
    losses = [
        functional.cross_entropy(part.flatten(0, 1), cells[:, :, index].flatten(), ignore_index=-1)
        for index, part in enumerate(parts)
    ]
    return torch.stack(losses).mean()


# Measurement


@dataclass(slots=True)
class Scores:
    """What one model did on the held-out questions.

    Attributes:
        loss: mean over answer tokens, in nats.
        exact: share of questions whose every answer token is the likeliest, by ``all``, by kind and
            by ``kind/topic``.
        counts: number of questions behind each share.
        logits: (answer tokens, vocabulary).
        shares: for each layer with experts, (experts,), the share of the tokens' choices.
    """

    loss: float
    exact: dict[str, float]
    counts: dict[str, int]
    logits: Tensor
    shares: list[list[float]]


@torch.no_grad()
def score(
    model: Any, family: Family, packer: Packer, samples: Sequence[SceneSample], rows: int = 100
) -> Scores:
    """Ask each sample's first question in a row of its own; compare the answers token by token."""
    logits, targets, chosen = [], [], []
    active = getattr(model.config.text_config, "num_experts_per_tok", 0)
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(samples), rows):
        chunk = samples[start : start + rows]
        batch = packer.pack(chunk)
        found, made = answer_logits(model, family, batch)
        logits.append(found.float())
        real = batch.turns.flatten() >= 0
        chosen.append([choices(layer[real], active) for layer in made.routing])
        targets.append(batch.targets[batch.targets >= 0])
        hits = logits[-1].argmax(-1) == targets[-1]
        owners = (batch.targets >= 0).nonzero()[:, 0]
        for number, sample in enumerate(chunk):
            exact = bool(hits[owners == number].all())
            for key in ("all", sample.kind, f"{sample.kind}/{sample.turns[0].topic}"):
                right[key].append(exact)
    everything = torch.cat(logits)
    loss = functional.cross_entropy(everything, torch.cat(targets)).item()
    exact_share = {key: sum(values) / len(values) for key, values in sorted(right.items())}
    totals = [torch.stack(layer).sum(0) for layer in zip(*chosen, strict=True)]
    return Scores(
        loss,
        exact_share,
        {key: len(values) for key, values in right.items()},
        everything,
        [(total / total.sum()).tolist() for total in totals],
    )


@torch.no_grad()
def round_language_weights(model: Any, bits: int, group: int = 128) -> None:
    """Round the language layers' projections to nearest, a symmetric scale for each group."""
    top = 2 ** (bits - 1) - 1
    for name, module in model.model.language_model.layers.named_modules():
        weights = [module.weight] if isinstance(module, nn.Linear) else []
        if name.endswith("experts"):
            weights = list(module.parameters(recurse=False))
        for weight in weights:
            grouped = weight.unflatten(-1, (-1, group))
            scale = grouped.abs().amax(-1, keepdim=True) / top
            weight.copy_(((grouped / scale).round().clamp(-top, top) * scale).flatten(-2))


def divergence(reference: Tensor, other: Tensor) -> float:
    """Return the mean KL(reference || other) in nats, from logits (tokens, vocabulary)."""
    first, second = reference.log_softmax(-1), other.log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1).mean().item()


def measure(model: Any, family: Family, packer: Packer, seed: int, per_kind: int) -> dict[str, Any]:
    """Measure the weights as shipped, in bfloat16, and the harm of rounding to 4 and 3 bits."""
    samples = [
        scenes.make_sample(kind, scenes.sample_rng("evaluation", seed, index))
        for kind in KINDS
        for index in range(per_kind)
    ]
    shipped = copy.deepcopy(model).eval().to(torch.bfloat16).float()
    plain = score(shipped, family, packer, samples)
    result: dict[str, Any] = {
        "loss": plain.loss,
        "exact": plain.exact,
        "counts": plain.counts,
        "shares": plain.shares,
    }
    for bits in (4, 3):
        rounded = copy.deepcopy(shipped)
        round_language_weights(rounded, bits)
        scores = score(rounded, family, packer, samples)
        result[f"w{bits}"] = {
            "kl": divergence(plain.logits, scores.logits),
            "exact": scores.exact["all"],
        }
    return result


@torch.no_grad()
def check_against_processor(
    model: Any, family: Family, packer: Packer, processor: Any, seed: int
) -> None:
    """Raise unless packed batches equal what the processor and the model's own forward make."""
    exact_model = copy.deepcopy(model).eval().float()
    for kind in KINDS:
        for index in range(6):
            sample = scenes.make_sample(kind, scenes.sample_rng("evaluation", seed, index))
            batch = packer.pack([sample])
            content = [{"type": kind}] if sample.frames else []
            turn = sample.turns[0]
            messages = [
                {"role": "user", "content": [*content, {"type": "text", "text": turn.question}]},
                {"role": "assistant", "content": [{"type": "text", "text": turn.answer}]},
            ]
            count = len(sample.frames)
            clip = {"fps": FRAME_RATE, "total_num_frames": count, "frames_indices": [*range(count)]}
            inputs = processor(
                text=[processor.apply_chat_template(messages).removesuffix("\n")],
                images=list(sample.frames) if kind == "image" else None,
                videos=[np.stack(sample.frames)] if kind == "video" else None,
                do_sample_frames=False,
                video_metadata=[clip] if kind == "video" else None,
                return_tensors="pt",
            )
            if not torch.equal(inputs["input_ids"], batch.ids):
                raise RuntimeError(
                    f"the packed ids of {kind} sample {index} differ from the processor's"
                )
            pixels = inputs.get("pixel_values" if kind == "image" else "pixel_values_videos")
            if pixels is not None:
                torch.testing.assert_close(pixels, batch.pixels.flatten(0, 1), atol=2e-6, rtol=0)
            logits = exact_model(**inputs).logits[batch.targets >= 0]
            torch.testing.assert_close(
                answer_logits(exact_model, family, batch)[0], logits, atol=1e-4, rtol=0
            )


# Training


def rate_factor(step: int, settings: Settings) -> float:
    """Return the share of the peak rate: warm-up, a plateau, then a cosine down to zero."""
    start = round(settings.steps * (1 - settings.decay))
    if step < start:
        return min(1.0, (step + 1) / settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - start) / (settings.steps - start)))


EARLY_ROWS: tuple[Kind, ...] = ("image", "video", "text", "image", "video", "image")
LATE_ROWS: tuple[Kind, ...] = ("image", "text", "video", "image", "text", "image")
"""Kinds of the rows of a step, over and over, before and after the run settles."""


def training_samples(step: int, settings: Settings) -> list[SceneSample]:
    """Return the rows of a step, ten questions each; they depend on the seed and the step only."""
    hardness = min(1.0, step / settings.curriculum)
    kinds = EARLY_ROWS if step < settings.settle else LATE_ROWS
    rows = []
    for row in range(settings.rows):
        rng = scenes.sample_rng("train", settings.seed, step * settings.rows + row)
        if step >= settings.settle:
            hardness = rng.uniform(0.3, 1.0)
        rows.append(scenes.make_sample(kinds[row % len(kinds)], rng, hardness, 10))
    return rows


def answer_loss(logits: Tensor, batch: Batch, balanced: bool) -> Tensor:
    """Return the mean loss of answer tokens; balanced, an answer weighs its length's root."""
    targets = batch.targets[batch.targets >= 0]
    if not balanced:
        return functional.cross_entropy(logits.float(), targets)
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    weights = batch.lengths.float().rsqrt()
    return (losses * weights).sum() / weights.sum()


class Run:
    """A training run and its files."""

    def __init__(self, settings: Settings, out: Path) -> None:
        self.settings, self.out = settings, out
        self.family = FAMILIES[settings.family]
        self.tokenizer = build_tokenizer(self.family)
        self.packer = Packer(self.tokenizer, self.family)
        self.processor = self.family.processor(self.tokenizer)
        ids = {token: self.tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
        vocabulary = math.ceil(len(self.tokenizer) / WIDTH_UNIT) * WIDTH_UNIT
        torch.manual_seed(settings.seed)
        config = self.family.config(settings, ids, vocabulary)
        self.model: Any = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=torch.float32
        )
        initialise(self.model, settings.layers, settings.vision_layers)
        self.probe = nn.Linear(settings.width, sum(PROBED))
        self.model.generation_config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=ids[END], pad_token_id=ids[PAD], max_new_tokens=96
        )
        self.trained = nn.ModuleDict({"model": self.model, "probe": self.probe})
        decayed = [value for value in self.trained.parameters() if value.ndim > 1]
        plain = [value for value in self.trained.parameters() if value.ndim == 1]
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98))
        self.step, self.seconds = 0, 0.0

    def train(
        self, report_every: int, save_every: int, measure_every: int, per_kind: int = 700
    ) -> None:
        """Train to the last step, reporting, saving and measuring on the way.

        The last measurement asks ``per_kind`` questions of each kind.
        """
        check_against_processor(
            self.model, self.family, self.packer, self.processor, self.settings.seed
        )
        losses: list[float] = []
        while self.step < self.settings.steps:
            begin = time.monotonic()
            losses.append(self._advance())
            self.seconds += time.monotonic() - begin
            if self.step % report_every == 0:
                pace = self.seconds / self.step
                print(
                    f"step {self.step}: loss {np.mean(losses):.4f}, {pace:.3f} s a step", flush=True
                )
                losses.clear()
            if self.step % save_every == 0:
                self.save_training()
            if self.step % measure_every == 0 and self.step < self.settings.steps:
                self.publish(per_kind=200)
        self.save_training()
        self.publish(per_kind)

    def _advance(self) -> float:
        """Take one step; return the mean loss of its answer tokens, in nats."""
        settings = self.settings
        batch = self.packer.pack(training_samples(self.step, settings), self.family.row_tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate * rate_factor(self.step, settings)
        with torch.autocast("cpu", torch.bfloat16):
            logits, made = answer_logits(self.model, self.family, batch)
        loss = answer_loss(logits, batch, balanced=self.step >= settings.settle)
        help_factor = max(0.0, 1 - self.step / (2 * settings.curriculum))
        whole = loss + help_factor * probe_loss(self.probe, made.features, batch.cells)
        if made.routing:
            real = batch.turns.flatten() >= 0
            whole = whole + settings.balance * balance_loss(made.routing, real, settings.active)
        whole.backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def save_training(self) -> None:
        """Write the weights, the optimizer's moments and the progress."""
        folder = self.out / "training"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"weight/{name}": value.detach() for name, value in self.trained.named_parameters()
        }
        for name, value in self.trained.named_parameters():
            for key, moment in self.optimizer.state.get(value, {}).items():
                tensors[f"{key}/{name}"] = moment
        partial = folder / "state.safetensors.partial"
        progress = {"step": self.step, "seconds": self.seconds, "settings": asdict(self.settings)}
        save_file(tensors, partial, metadata={"progress": json.dumps(progress)})
        partial.replace(folder / "state.safetensors")
        (folder / "progress.json").write_text(
            json.dumps(progress, indent=2) + "\n", encoding="utf-8"
        )

    def resume(self) -> None:
        """Continue from the saved training state; only the number of steps may have changed."""
        with safe_open(self.out / "training" / "state.safetensors", "pt") as file:
            progress = json.loads(file.metadata()["progress"])
            mine, theirs = asdict(self.settings), progress["settings"]
            changed = [name for name in mine if name != "steps" and mine[name] != theirs.get(name)]
            if changed:
                raise SystemExit(
                    f"cannot resume: the interrupted run had other values of {', '.join(changed)}"
                )
            for name, value in self.trained.named_parameters():
                value.data.copy_(file.get_tensor(f"weight/{name}"))
                self.optimizer.state[value] = {
                    key: file.get_tensor(f"{key}/{name}")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self.step, self.seconds = progress["step"], progress["seconds"]

    def publish(self, per_kind: int) -> None:
        """Measure the model and write it as a checkpoint with its card."""
        measured = measure(self.model, self.family, self.packer, self.settings.seed, per_kind)
        kinds = ", ".join(f"{kind} {measured['exact'][kind]:.3f}" for kind in KINDS)
        print(
            f"step {self.step}: exact match {measured['exact']['all']:.3f} ({kinds}),"
            f" loss {measured['loss']:.4f},"
            f" KL W4 {measured['w4']['kl']:.5f}, W3 {measured['w3']['kl']:.5f}",
            flush=True,
        )
        fresh, target, old = (
            self.out / name for name in ("checkpoint.partial", "checkpoint", "checkpoint.old")
        )
        shutil.rmtree(fresh, ignore_errors=True)
        shipped = copy.deepcopy(self.model).to(torch.bfloat16)
        for part in (shipped.config.text_config, shipped.config.vision_config):
            part.dtype = torch.bfloat16
        shipped.save_pretrained(fresh)
        self.processor.save_pretrained(fresh)
        (fresh / "README.md").write_text(self._card(measured), encoding="utf-8")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def _card(self, measured: Mapping[str, Any]) -> str:
        settings = self.settings
        values = sum(value.numel() for value in self.model.parameters())
        language = sum(
            value.numel() for value in self.model.model.language_model.layers.parameters()
        )
        exact, counts = measured["exact"], measured["counts"]
        text = self.model.config.text_config
        inside = f"{settings.inner} in the MLP"
        if measured["shares"]:
            inside = f"{settings.experts} experts of {text.moe_intermediate_size} in each,"
            inside += f" {settings.active} for a token"
        mixing = getattr(text, "layer_types", None) or []
        linear = mixing.count("linear_attention")
        inside += f", {linear} of the layers with linear attention" if linear else ""
        state = "" if self.step == settings.steps else " (an intermediate state of the run)"
        topics = "".join(
            f"| {key.replace('/', ': ')} | {counts[key]} | {share:.1%} |\n"
            for key, share in exact.items()
            if key != "all"
        )
        facts = (
            f"- Architecture: language model {settings.width} wide, {settings.layers} layers,"
            f" {inside} ({language / 1e6:.2f} M parameters in its layers);"
            f" vision tower 128 wide, {settings.vision_layers} blocks,"
            f" patches of {PATCH} x {PATCH} pixels on"
            f" {board.FRAME_PIXELS} x {board.FRAME_PIXELS} frames, {SIDE**2} tokens for a picture"
            f" or {'a pair of frames' if self.family.frames == 2 else 'a frame'}. The inputs and"
            f" outputs of every Linear are multiples of {WIDTH_UNIT}"
            f"{', but for the gates of linear attention' if linear else ''}.",
            f"- Training: {self.step} steps{state} of {settings.rows} rows of"
            f" {self.family.row_tokens} tokens, AdamW, peak rate {settings.rate:g},"
            f" {self.seconds / 60:.0f} minutes on {torch.get_num_threads()} CPU thread(s), bfloat16"
            " arithmetic, float32 weights;"
            " stored in bfloat16. Repeat it with:",
        )
        options = "" if settings.family == "qwen2_vl" else f" --family {settings.family}"
        options += "" if settings.steps == Settings.steps else f" --steps {settings.steps}"
        options += "" if settings.rows == Settings.rows else f" --rows {settings.rows}"
        shares = "".join(
            f"| {layer} | {' | '.join(f'{share:.1%}' for share in row)} |\n"
            for layer, row in enumerate(measured["shares"])
        )
        if shares:
            numbers = range(settings.experts)
            shares = (
                "\nShare of the tokens' choices of each expert, by layer, on these questions:\n\n"
                f"| layer | {' | '.join(str(number) for number in numbers)} |\n"
                f"|---|{'---|' * settings.experts}\n{shares}"
            )
        listed = "\n".join(textwrap.fill(fact, 100, subsequent_indent="  ") for fact in facts)
        return f"""# PrismQuant demonstration model ({settings.family})

A {values / 1e6:.2f} million parameter vision-language model, trained from nothing on the drawn
scenes of `prismquant.demo.scenes`: pictures, short clips and plain text, with questions that have
one right answer. It is small so that every method can be tried on a laptop, and near its capacity
so that quantization shows. It knows nothing but these scenes.

{listed}

      python tools/train_demo_model.py --out DIR{options}

## Measured

On {counts["all"]} held-out questions of hardness {scenes.DEFAULT_HARDNESS}, the highest, with the
stored weights in float32 arithmetic. The loss is the mean over answer tokens, in nats. Exact match
counts a question when every token of the answer, its end included, is the likeliest one. Divergence
is the mean over answer tokens of KL(stored || rounded), in nats, when the projections of the
language layers are rounded to nearest, symmetrically, with one scale for each 128 inputs.

| | loss | exact match | divergence |
|---|---|---|---|
| stored | {measured["loss"]:.4f} | {exact["all"]:.1%} | |
| rounded to 4 bits | | {measured["w4"]["exact"]:.1%} | {measured["w4"]["kl"]:.5f} |
| rounded to 3 bits | | {measured["w3"]["exact"]:.1%} | {measured["w3"]["kl"]:.5f} |

| questions | number | exact match |
|---|---|---|
{topics}{shares}"""


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the demonstration model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--family", choices=sorted(FAMILIES), default="qwen2_vl", help="architecture"
    )
    parser.add_argument(
        "--steps", type=int, default=Settings.steps, help="number of training steps"
    )
    parser.add_argument("--rows", type=int, default=Settings.rows, help="rows of a step")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="seed of weights and data")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument(
        "--measure-every", type=int, default=1000, help="steps between measurements"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = Settings(arguments.family, arguments.steps, rows=arguments.rows, seed=arguments.seed)
    run = Run(chosen, arguments.out)
    if arguments.resume:
        run.resume()
    run.train(report_every=100, save_every=500, measure_every=arguments.measure_every)


if __name__ == "__main__":
    main()
