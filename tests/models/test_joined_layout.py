"""A layout in which queries, keys and values are one tensor, and blocks are renamed inside."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

import prismquant as pq
from prismquant.errors import PlanError
from prismquant.export.load_quantized import load_model
from prismquant.models.bind import bind
from prismquant.models.float_model import load_float
from prismquant.shards import ShardReader
from prismquant.storage import write_json, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

QUICK = {"solver": "rtn", "tuner": "none", "weight_range": "minmax"}
# As the released conversion from this layout to transformers' renames, the other way round.
NAMES = [
    (r"^(model\.)?vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"^(model\.)?vision_tower\.", "vision_model."),
    (r"embeddings\.cls_token", "embeddings.class_embedding"),
    (r"embeddings\.position_embeddings", "embeddings.position_embedding"),
    (r"patch_embeddings\.projection", "patch_embedding"),
    (r"\.lambda_", ".ls"),
    (r"attention\.projection_layer", "attn.proj"),
    (r"(vision.*)\.attention\.", r"\1.attn."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"^(model\.)?multi_modal_projector\.layer_norm", "mlp1.0"),
    (r"^(model\.)?multi_modal_projector\.linear_1", "mlp1.1"),
    (r"^(model\.)?multi_modal_projector\.linear_2", "mlp1.3"),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head", "language_model.lm_head"),
]


def original(source: Path, folder: Path) -> Path:
    """A checkpoint of transformers' layout in the original one."""
    shutil.copytree(source, folder)
    reader, found = ShardReader(source), {}
    for name in reader.names:
        renamed = name
        for pattern, new in NAMES:
            renamed = re.sub(pattern, new, renamed)
        found[renamed] = reader.read(name)
    for name in [name for name in found if ".attn.q_proj." in name]:
        three = [found.pop(name.replace("q_proj", f"{one}_proj")) for one in "qkv"]
        found[name.replace("q_proj", "qkv")] = torch.cat(three)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    write_tensors(folder / "model.safetensors", found)
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"]
    vision["qk_normalization"] = vision.pop("use_qk_norm", False)
    vision["qkv_bias"] = vision.pop("attention_bias", False)
    vision |= {"model_type": "intern_vit_6b", "image_size": vision["image_size"][0]}
    vision["patch_size"] = vision["patch_size"][0]
    write_json(
        folder / "config.json",
        {
            "model_type": "internvl_chat",
            "architectures": ["InternVLChatModel"],
            "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
            "downsample_ratio": config["downsample_ratio"],
            "force_image_size": vision["image_size"],
            "llm_config": config["text_config"],
            "ps_version": "v2",
            "select_layer": -1,
            "template": "internvl2_5",
            "tie_word_embeddings": False,
            "torch_dtype": config.get("dtype", "bfloat16"),
            "vision_config": vision,
        },
    )
    return folder


@pytest.fixture(scope="module")
def both(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small checkpoint in transformers' layout, and in the original one."""
    source = tiny("internvl", dtype=torch.bfloat16)
    return source, original(source, tmp_path_factory.mktemp("original") / "model")


def test_every_tensor_of_the_model_is_found(both: tuple[Path, Path]) -> None:
    source, other = (load_float(folder).state_dict() for folder in both)
    assert source.keys() == other.keys()
    assert all(torch.equal(source[name], other[name]) for name in source)


def test_names_lead_there_and_back(both: tuple[Path, Path]) -> None:
    bound = bind(both[1])
    stored = ShardReader(both[1]).names
    for name in bound.shapes:
        disk = bound.names.to_disk(name)
        assert bound.names.to_module(disk) == name
        view = bound.views.get(disk)
        assert (disk if view is None else view.source) in stored
    joined = {view.source for view in bound.views.values()}
    assert len(joined) * 3 == len(bound.views)


def test_what_is_joined_stays_joined(both: tuple[Path, Path], tmp_path: Path) -> None:
    """The language model is rounded as in the other layout, all else is as it was."""
    results: list[Any] = []
    for place, folder in enumerate(both):
        out = tmp_path / str(place)
        pq.quantize(folder, pq.load_recipe("w4a16").with_rules(QUICK), out)
        results.append(ShardReader(out))
    stored, (first, second) = ShardReader(both[1]), results
    layers = bind(both[0]).names, bind(both[1]).names
    for name in second.names:
        if name in stored.names:
            assert torch.equal(second.read(name), stored.read(name))
        else:
            other = layers[0].to_disk(layers[1].to_module(name))
            assert torch.equal(second.read(name), first.read(other))
    assert "vision_model.encoder.layers.0.attn.qkv.weight" in second.names
    assert not [name for name in second.names if "attn.q_proj" in name and "vision" in name]
    loaded = [load_model(tmp_path / place).state_dict() for place in ("0", "1")]
    assert all(torch.equal(loaded[0][name], loaded[1][name]) for name in loaded[0])
    found = json.loads((tmp_path / "1" / "config.json").read_text())
    targets = found["quantization_config"]["config_groups"]["group_0"]["targets"]
    assert "language_model.model.layers.0.mlp.down_proj" in targets


def test_a_joined_weight_is_not_rounded_apart(both: tuple[Path, Path]) -> None:
    recipe = pq.load_recipe("w8a8-all")
    with pytest.raises(PlanError, match=r"a part of vision_model.*\.attn\.qkv\.weight"):
        pq.inspect(both[1], recipe)
    skipped = recipe.with_rules({"match": {"modality": "vision", "role": "attn.qkv"}, "skip": True})
    plan = pq.inspect(both[1], skipped)
    assert {str(row.site.modality) for row in plan.quantized} == {"vision", "projector", "llm"}


def test_a_config_alone_is_planned(both: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copy(both[1] / "config.json", tmp_path / "config.json")
    assert pq.inspect(tmp_path, "w4a16").total_bytes == pq.inspect(both[1], "w4a16").total_bytes
