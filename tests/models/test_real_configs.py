"""Plans of released models from their ``config.json`` alone: every byte, counted independently."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import prismquant as pq

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIGS = Path(__file__).parent / "real_configs"
BFLOAT16 = 2
# Rows and columns of every matrix of the language model's blocks that w4a16 rounds.
Matrices = list[tuple[int, int]]


def text_matrices(text: dict[str, Any]) -> Matrices:
    """Matrices of attention and of MLPs, of all blocks."""
    hidden, head = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    block = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    inner, count = text["intermediate_size"], 1
    if "num_experts" in text:
        inner, count = text["moe_intermediate_size"], text["num_experts"]
    block += [(inner, hidden), (inner, hidden), (hidden, inner)] * count
    return block * text["num_hidden_layers"]


def text_rest(text: dict[str, Any]) -> int:
    """Parameters of a Qwen3 language model outside these matrices, the head among them."""
    hidden = text["hidden_size"]
    block = 2 * hidden + 2 * text["head_dim"] + text.get("num_experts", 0) * hidden
    return text["num_hidden_layers"] * block + hidden + 2 * text["vocab_size"] * hidden


def qwen3_vl_rest(config: dict[str, Any]) -> int:
    """Parameters of the vision tower and of the mergers, biases among them."""
    vision = config["vision_config"]
    width, inner, out = (vision[k] for k in ("hidden_size", "intermediate_size", "out_hidden_size"))

    def linear(rows: int, columns: int) -> int:
        return rows * columns + rows

    patch = linear(width, vision["in_channels"] * vision["temporal_patch_size"] * 16 * 16)
    places = vision["num_position_embeddings"] * width
    block = linear(3 * width, width) + linear(width, width) + 4 * width
    block += linear(inner, width) + linear(width, inner)
    merged = width * vision["spatial_merge_size"] ** 2
    mlp = linear(merged, merged) + linear(out, merged)
    mergers = mlp + 2 * width + len(vision["deepstack_visual_indexes"]) * (mlp + 2 * merged)
    return patch + places + vision["depth"] * block + mergers


def internvl_rest(config: dict[str, Any]) -> int:
    """Parameters of the vision tower and of the projector, biases among them."""
    vision, out = config["vision_config"], config["text_config"]["hidden_size"]
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    patches = (448 // 14) ** 2
    embeddings = width * 3 * 14 * 14 + width + width + (patches + 1) * width
    # Queries, keys and values have no bias; norms have one weight a channel, and so have scales.
    block = 4 * width * width + width + 2 * width * inner + inner + width
    block += 2 * width + 2 * width + 2 * width
    merged = width * 4
    projector = 2 * merged + out * merged + out + out * out + out
    return embeddings + vision["num_hidden_layers"] * block + projector


RESTS = {
    "qwen3-vl-30b-a3b": qwen3_vl_rest,
    "qwen3-vl-235b-a22b": qwen3_vl_rest,
    "internvl3.5-38b": internvl_rest,
}


def packed(rows: int, columns: int) -> int:
    """Bytes of int4 in groups of 128: codes, bfloat16 scales, and the shape."""
    return rows * columns // 2 + rows * columns // 128 * BFLOAT16 + 16


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder with a ``config.json`` and nothing else."""
    shutil.copy(CONFIGS / f"{request.param}.json", tmp_path / "config.json")
    return tmp_path


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param("internvl3.5-38b", marks=pytest.mark.slow),
        pytest.param("qwen3-vl-30b-a3b", marks=pytest.mark.slow),
        pytest.param("qwen3-vl-235b-a22b", marks=pytest.mark.slow),
    ],
    indirect=True,
)
def test_bytes_of_a_released_model(folder: Path, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["folder"]
    config = json.loads((folder / "config.json").read_text())
    plan = pq.inspect(folder, "w4a16")
    matrices = text_matrices(config["text_config"])
    rest = text_rest(config["text_config"]) + RESTS[name](config)
    weights = sum(rows * columns for rows, columns in matrices)
    assert sum(row.quantized for row in plan.rows) == len(matrices)
    assert plan.float_bytes == (weights + rest) * BFLOAT16
    assert plan.total_bytes == rest * BFLOAT16 + sum(packed(*one) for one in matrices)
