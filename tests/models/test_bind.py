"""Binding: every layer is claimed, every mistake is found, and no weight is read."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import tiny_vlm
import torch
from torch import nn

from prismquant.errors import ModelError, StorageError
from prismquant.models import bind as bind_module
from prismquant.models import config as config_module
from prismquant.models.arch import EdgeKind, Modality, SiteKind
from prismquant.models.arch_files import known_archs
from prismquant.models.bind import bind
from prismquant.models.bound import LeftAlone
from prismquant.models.config import identify, import_transformers, native_config
from prismquant.models.float_model import load_float
from prismquant.models.load import empty_model
from prismquant.models.processor import load_processor
from prismquant.shards import ShardReader
from prismquant.storage import write_json, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

_CONFIG_72B = {
    "model_type": "qwen2_vl",
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "torch_dtype": "bfloat16",
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 8192, "num_heads": 16},
}


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A writable copy of a checkpoint."""
    return lambda folder: shutil.copytree(folder, tmp_path / "copy")


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    reader = ShardReader(folder)
    tensors = {name: reader.read(name) for name in reader.names}
    change(tensors)
    write_tensors(folder / "model.safetensors", tensors)
    return folder


def _edit_config(folder: Path, **values: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, **values})
    return folder


# ------------------------------------------------------------------------------------ what is bound


def test_every_linear_and_convolution_is_a_site(tiny_folder: Path):
    bound = bind(tiny_folder)
    model = empty_model(bound.config, bound.arch)
    matrices = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))
    }
    assert {site.name for site in bound.sites} == matrices.keys()
    for site in bound.sites:
        weight = matrices[site.name].weight
        assert site.weight_shape == tuple(weight.shape)
        assert (site.out_features, site.in_features) == tuple(weight.flatten(1).shape)
        assert site.has_bias == (matrices[site.name].bias is not None)


def test_every_embedding_is_left_alone_with_a_reason(tiny_folder: Path):
    bound = bind(tiny_folder)
    model = empty_model(bound.config, bound.arch)
    embeddings = {n for n, module in model.named_modules() if isinstance(module, nn.Embedding)}
    assert {item.name for item in bound.left_alone} == embeddings
    assert all("embedding" in reason for reason in (item.reason for item in bound.left_alone))


def test_steps_are_in_calibration_order(tiny: Callable[..., Path]):
    steps = bind(tiny("qwen3_vl")).steps
    assert [(step.kind, step.name.removeprefix("model.")) for step in steps] == [
        ("entry", "visual.patch_embed"),
        ("block", "visual.blocks.0"),
        ("block", "visual.blocks.1"),
        ("block", "visual.blocks.2"),
        ("projector", "visual.deepstack_merger_list.0"),
        ("projector", "visual.deepstack_merger_list.1"),
        ("projector", "visual.merger"),
        ("block", "language_model.layers.0"),
        ("block", "language_model.layers.1"),
        ("head", "lm_head"),
    ]
    assert [step.index for step in steps] == list(range(len(steps)))


def test_a_site_knows_its_step_and_its_keys(tiny_folder: Path):
    bound = bind(tiny_folder)
    by_name = {s.name: s for s in bound.sites}
    for step in bound.steps:
        assert [site.stage for site in step.sites] == sorted(site.stage for site in step.sites)
        for site in step.sites:
            assert site.step == step.index
            assert site.modality is step.modality
            assert bound.site(site.name) is by_name[site.name]
    fused = Counter(site.fuse_key for site in bound.sites if site.fuse_key)
    assert set(fused.values()) <= {2, 3}
    # whoever shares a fused layer reads the same tensor
    for key in fused:
        assert len({site.input_key for site in bound.sites if site.fuse_key == key}) == 1


def test_sites_with_one_input_key_read_the_same_tensor(
    tiny_folder: Path, calibration_file: Path, family: str
):
    """The claim of the data file, checked against a run: the objects are identical."""
    bound = bind(tiny_folder)
    model = load_float(tiny_folder)
    seen: dict[str, list[int]] = {}
    keep = []

    def hook(key: str):
        def record(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            keep.append(args[0])
            seen.setdefault(key, []).append(id(args[0]))

        return record

    for site in bound.sites:
        model.get_submodule(site.name).register_forward_pre_hook(hook(site.input_key))
    image = tiny_vlm.encode(load_processor(tiny_folder), calibration_file)[1]
    with torch.no_grad():
        model(**image)
    sizes = Counter(site.input_key for site in bound.sites)
    assert seen.keys() == sizes.keys(), family
    for key, ids in seen.items():
        assert len(ids) == sizes[key]
        assert len(set(ids)) == 1, key


def test_an_unknown_site_is_refused(tiny: Callable[..., Path]):
    bound = bind(tiny("qwen2_vl"))
    with pytest.raises(ModelError, match="no quantizable layer of Qwen2-VL"):
        bound.site("model.visual.blocks.7")


def test_ids_of_vision_tokens_come_from_the_config(tiny_folder: Path):
    assert bind(tiny_folder).vision_token_ids == (5, 6)


def test_names_on_disk_are_those_of_the_headers(tiny_folder: Path):
    bound = bind(tiny_folder)
    names = ShardReader(tiny_folder).names
    for site in bound.sites:
        assert f"{site.disk_name}.weight" in names
    assert {bound.names.to_module(name) for name in names} == bound.shapes.keys()


def test_a_tied_head_is_marked(tiny: Callable[..., Path], family: str):
    bound = bind(tiny(family, tie=True))
    assert bound.tied
    assert [site.name for site in bound.sites if site.tied] == ["lm_head"]


def test_a_stored_head_is_not_tied_whatever_the_config_says(
    tiny: Callable[..., Path], copy: Callable[[Path], Path]
):
    folder = _edit_config(copy(tiny("qwen3_vl")), tie_word_embeddings=True)
    assert not bind(folder).tied


def test_the_dtype_is_that_of_the_tensors(tiny: Callable[..., Path]):
    assert bind(tiny("qwen2_vl", dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert bind(tiny("qwen2_vl")).dtype == torch.float32


@pytest.mark.parametrize("tie", [False, True])
def test_each_site_has_the_dtype_of_its_own_weight(
    tiny: Callable[..., Path], copy: Callable[[Path], Path], tie: bool
):
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if not name.startswith("visual."):
                tensors[name] = tensors[name].to(torch.bfloat16)

    for site in bind(_rewrite(copy(tiny("qwen2_vl", tie=tie)), narrow)).sites:
        llm = site.modality is Modality.LLM
        assert site.dtype == (torch.bfloat16 if llm else torch.float32), site.name


# --------------------------------------------------------------------------------- names on disk


_PREFIXES = {
    "model.visual": ("visual", "model.visual"),
    "model.language_model": ("model", "model.language_model", "language_model"),
}


def _mixture(names: Iterable[str], seed: int | None) -> dict[str, str]:
    """Module name -> name on disk; some prefixes by tower, some by tensor."""
    draw = random.Random(seed)
    # What releases 5.4.0 to 5.5.4 of transformers wrote.
    towers = {"model.visual": "model.visual", "model.language_model": "model"}
    if seed is not None:
        towers = {part: draw.choice(prefixes) for part, prefixes in _PREFIXES.items()}
    result = {}
    for name in names:
        part = next((part for part in towers if name.startswith(f"{part}.")), "")
        strays = seed is not None and part and draw.random() < 0.1
        prefix = draw.choice(_PREFIXES[part]) if strays else towers.get(part, "")
        result[name] = prefix + name.removeprefix(part)
    return result


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_any_mixture_of_prefixes_is_read_as_transformers_reads_it(
    tiny: Callable[..., Path], copy: Callable[[Path], Path], family: str, seed: int | None
):
    usual = bind(tiny(family))
    mixture = _mixture(sorted(usual.shapes), seed)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name, disk in mixture.items():
            tensors[disk] = tensors.pop(usual.names.to_disk(name))

    folder = _rewrite(copy(tiny(family)), rename)
    bound = bind(folder)
    assert {name: bound.names.to_disk(name) for name in bound.shapes} == mixture
    assert {name: bound.names.to_module(disk) for name, disk in mixture.items()} == {
        name: name for name in mixture
    }
    ours = load_float(folder).state_dict()
    auto = import_transformers().AutoModelForImageTextToText
    theirs, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("family", tiny_vlm.FAMILIES)
def test_a_model_that_was_saved_without_its_head_is_read(
    tiny: Callable[..., Path], tmp_path: Path, family: str
):
    """By transformers itself; the head is tied."""
    folder = tiny(family, tie=True)
    auto = import_transformers().AutoModelForImageTextToText
    auto.from_pretrained(folder).model.save_pretrained(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    bound = bind(tmp_path)
    assert bound.tied
    theirs, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    ours = load_float(tmp_path).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.state_dict().items())


def test_one_tensor_under_two_names_is_refused(
    tiny: Callable[..., Path], copy: Callable[[Path], Path]
):
    def double(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.visual.merger.ln_q.bias"] = tensors["visual.merger.ln_q.bias"] + 1

    with pytest.raises(ModelError, match=r"'visual.merger.ln_q.bias' are one tensor of the model"):
        bind(_rewrite(copy(tiny("qwen2_vl")), double))


# ------------------------------------------------------------------------------------------ edges


@torch.no_grad()
def test_scale_moved_along_any_edge_leaves_the_function(
    tiny_folder: Path, calibration_file: Path, family: str
):
    """In float64, with factors that are no powers of two, for norms, gated products and values."""
    bound = bind(tiny_folder)
    model = load_float(tiny_folder, torch.float64)
    inputs = [
        {k: v.double() if v.is_floating_point() else v for k, v in sample.items()}
        for sample in tiny_vlm.encode(load_processor(tiny_folder), calibration_file)[:3]
    ]
    before = [model(**sample).logits for sample in inputs]
    kinds = Counter(edge.kind for edge in bound.edges)
    assert kinds[EdgeKind.NORM] > 4, family
    assert kinds[EdgeKind.VALUE] == len([s for s in bound.steps if s.kind == "block"])
    generator = torch.Generator().manual_seed(1)
    for edge in bound.edges:
        scale = 0.5 + torch.rand(edge.size, generator=generator, dtype=torch.float64)
        source = model.get_submodule(edge.source)
        rows = slice(edge.first_row, edge.first_row + edge.size)
        source.weight[rows] *= scale if source.weight.dim() == 1 else scale[:, None]
        if getattr(source, "bias", None) is not None:
            source.bias[rows] *= scale
        columns = scale.repeat(edge.tile)
        if edge.kind is EdgeKind.VALUE:
            heads = scale.view(edge.kv_heads, -1)
            columns = heads.repeat_interleave(edge.heads // edge.kv_heads, 0).flatten()
        for consumer in edge.consumers:
            model.get_submodule(consumer).weight.div_(columns)
    for sample, expected in zip(inputs, before, strict=True):
        torch.testing.assert_close(model(**sample).logits, expected, rtol=1e-8, atol=1e-8)


def test_a_merger_repeats_the_channels_of_its_norm(tiny: Callable[..., Path]):
    edges = {edge.source: edge for edge in bind(tiny("qwen3_vl")).edges}
    assert edges["model.visual.merger.norm"].tile == 4
    # deepstack mergers normalize after the concatenation
    assert edges["model.visual.deepstack_merger_list.0.norm"].tile == 1


# ----------------------------------------------------------------------------------------- streams


def test_every_norm_edge_starts_at_a_residual_stream(tiny_folder: Path, family: str):
    bound = bind(tiny_folder)
    vision, llm = bound.streams
    assert (vision.modality, llm.modality) == (Modality.VISION, Modality.LLM)
    assert vision.width == llm.width == tiny_vlm.HIDDEN
    assert vision.centred == (family != "qwen2_5_vl")  # which has RMSNorm there
    assert not llm.centred
    assert llm.embeddings == (bound.arch.embeddings,)
    assert vision.embeddings == (("model.visual.pos_embed",) if family == "qwen3_vl" else ())
    norms = [*vision.norms, *llm.norms]
    assert sorted(norms) == sorted(edge.norm for edge in bound.edges if edge.norm)


def test_the_writers_of_a_stream_are_what_the_blocks_and_their_neighbours_add(tiny_folder: Path):
    bound = bind(tiny_folder)
    for stream in bound.streams:
        roles = Counter(bound.site(name).role for name in stream.writers)
        blocks = [s for s in bound.steps if s.kind == "block" and s.modality is stream.modality]
        mergers = [step for step in bound.steps if step.kind == "projector"]
        vision = stream.modality is Modality.VISION
        entries = {"patch_embed": 1} if vision else {"projector.fc2": len(mergers)}
        assert roles == {"attn.out": len(blocks), "mlp.down": len(blocks), **entries}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norms": ("model.visual.blocks.*.norm1",)}, "merger.ln_q: read from no residual streams"),
        ({"writers": ("model.visual.blocks.*.mlp.fc9",)}, "fc9: a residual stream names it"),
        ({"writers": ("model.visual.patch_embed",)}, "patch_embed: expected a writer"),
        ({"norms": ("model.visual.blocks.*.attn",)}, "attn: expected a norm of 128 channels"),
        (
            {"writers": ("model.visual.patch_embed.proj", "model.visual.blocks.*.mlp.fc1")},
            r"vision stream differ in width: \[128, 256\]",
        ),
        (
            {"norms": ("model.visual.blocks.*.norm?", "model.language_model.norm")},
            "norm.: a residual stream names it",
        ),
        ({"norms": ("model.language_model.norm",)}, "model.norm: read from 2 residual streams"),
    ],
)
def test_mistakes_in_a_stream_are_found(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, change, message: str
):
    arch = known_archs()["qwen2_vl"]
    vision, llm = arch.streams
    odd = dataclasses.replace(arch, streams=(dataclasses.replace(vision, **change), llm))
    monkeypatch.setattr(config_module, "known_archs", lambda: {"qwen2_vl": odd})
    with pytest.raises(ModelError, match=message):
        bind(tiny("qwen2_vl"))


def test_a_norm_of_a_stream_without_an_edge_is_found(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    arch = known_archs()["qwen2_vl"]
    odd = dataclasses.replace(arch, edges=())
    monkeypatch.setattr(config_module, "known_archs", lambda: {"qwen2_vl": odd})
    with pytest.raises(ModelError, match=r"language_model.norm: no edge starts at this norm"):
        bind(tiny("qwen2_vl"))


def test_a_merger_list_without_members_is_no_mistake(tmp_path: Path):
    """A Qwen3-VL whose language model takes no features from the middle of the vision tower."""
    vision = {"deepstack_visual_indexes": [], "out_hidden_size": 4096}
    write_json(tmp_path / "config.json", {"model_type": "qwen3_vl", "vision_config": vision})
    llm = bind(tmp_path, headers_required=False).streams[1]
    assert [name for name in llm.writers if "deepstack" in name] == []


# --------------------------------------------------------------------------------------- identify


def test_families_are_identified(tiny_folder: Path, family: str):
    assert identify(tiny_folder).name == family


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"no model folder '.*nowhere'"):
        identify(tmp_path / "nowhere")


def test_a_folder_without_config_lists_what_it_holds(tmp_path: Path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelError, match=r"no config.json; it holds weights.bin"):
        identify(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "qwen2_vl"', "not valid JSON"),
        ("[1]", "holds a list"),
        ("{}", "has no model_type"),
        ('{"model_type": "gpt2"}', "no architecture describes model_type 'gpt2'"),
        ('{"model_type": "qwen9_vl", "vision_config": {"depth": 1}}', "model_type 'qwen9_vl'"),
    ],
)
def test_a_config_that_is_no_known_model_says_what_it_is(tmp_path: Path, text: str, message: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message) as caught:
        identify(tmp_path)
    assert caught.value.remedy
    assert "config.json" in str(caught.value)


def test_the_nearest_known_architecture_is_suggested(tmp_path: Path):
    write_json(tmp_path / "config.json", {"model_type": "qwen25_vl", "vision_config": {"depth": 1}})
    with pytest.raises(ModelError) as caught:
        identify(tmp_path)
    assert "did you mean 'qwen2_5_vl'" in str(caught.value)
    write_json(tmp_path / "config.json", {"model_type": "gpt2", "vision_config": {"depth": 2}})
    with pytest.raises(ModelError, match="no architecture describes") as caught:
        bind(tmp_path)
    assert "did you mean" not in str(caught.value)
    assert "video_llama_3" in str(caught.value)


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        *(
            ("text_config", key, 0, f"text_config.{key} is 0, not a whole number from 1")
            for key in ("intermediate_size", "num_attention_heads", "num_key_value_heads")
        ),
        ("text_config", "hidden_size", "wide", "hidden_size is 'wide', not a whole number"),
        ("text_config", "vocab_size", True, "vocab_size is True, not a whole number"),
        ("text_config", "num_hidden_layers", -1, "num_hidden_layers is -1, not a whole number"),
        ("vision_config", "depth", 10**9, "depth is 1000000000, not a whole number from 1 to 500"),
        ("vision_config", "depth", 400, "vision_config.depth is 400, but the shards hold 2 blocks"),
        ("vision_config", "depth", 1, "vision_config.depth is 1, but the shards hold 2 blocks"),
        ("vision_config", "spatial_merge_size", 0, "spatial_merge_size is 0, not a whole number"),
        ("vision_config", "patch_size", [4, 0], r"patch_size is \[4, 0\], not a whole number"),
        ("text_config", "layer_types", ["full_attention"] * 2000, "layer_types lists 2000 values"),
        ("text_config", "num_attention_heads", 3, "transformers cannot build this Qwen2-VL: .*by"),
        ("text_config", "hidden_act", "mish9", "cannot build this Qwen2-VL: KeyError 'mish9'"),
        ("text_config", "rms_norm_eps", "x", "transformers refuses the config of this Qwen2-VL"),
        ("text_config", "rope_parameters", 3, "transformers refuses the config of this Qwen2-VL"),
        (
            "vision_config",
            "num_heads",
            3,
            r"visual.blocks.\*.attn.qkv: 128 value channels do not fit",
        ),
        *(
            (
                "text_config",
                "rope_parameters",
                {**_ROPE, "mrope_section": sections},
                "mrope_section",
            )
            for sections in ([4, 6, 7], [16], [4, 6, "6"], None, [-4, 14, 6])
        ),
        ("text_config", "rope_parameters", None, r"is \[16, 24, 24\] \(by default.*add up to 16"),
        (
            "text_config",
            "layer_types",
            ["sliding_attention"] * 2,
            "text_config.sliding_window is null",
        ),
        ("text_config", "sub_config", [1], "text_config.sub_config holds a list, not an object"),
    ],
)
def test_a_config_that_describes_no_model_is_refused(
    tiny: Callable[..., Path],
    copy: Callable[[Path], Path],
    part: str,
    key: str,
    value: object,
    message: str,
):
    folder = copy(tiny("qwen2_vl"))
    config = json.loads((folder / "config.json").read_text())
    config[part][key] = value
    write_json(folder / "config.json", config)
    with pytest.raises(ModelError, match=message):
        bind(folder)


def test_all_impossible_counts_come_in_one_error(tmp_path: Path):
    config = {**_CONFIG_72B, "num_hidden_layers": 100000, "num_key_value_heads": 0}
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ModelError) as caught:
        bind(tmp_path, headers_required=False)
    assert "num_hidden_layers is 100000" in caught.value.what
    assert "num_key_value_heads is 0" in caught.value.what


# --------------------------------------------------------------------------------- what goes wrong


def test_all_findings_come_in_one_error(tiny: Callable[..., Path], copy: Callable[[Path], Path]):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["visual.merger.mlp.0.bias"]
        tensors["model.norm.weight"] = torch.ones(7)
        tensors["model.layers.0.mlp.extra"] = torch.ones(1)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)

    with pytest.raises(ModelError) as caught:
        bind(_rewrite(copy(tiny("qwen2_vl")), spoil))
    message = str(caught.value)
    assert "does not fit Qwen2-VL: 4 findings" in message
    assert "visual.merger.mlp.0.bias: missing on disk" in message
    assert "model.norm.weight: shape (7,) on disk, the config says (128,)" in message
    assert "model.layers.0.mlp.extra: not a tensor of this model" in message
    assert "lm_head.weight: dtype torch.int8 on disk" in message


def test_what_all_layers_lack_is_one_line(tiny: Callable[..., Path], copy: Callable[[Path], Path]):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for index in range(2):
            del tensors[f"model.layers.{index}.input_layernorm.weight"]

    with pytest.raises(ModelError) as caught:
        bind(_rewrite(copy(tiny("qwen2_vl")), spoil))
    assert "does not fit Qwen2-VL: 2 findings" in caught.value.what
    line = "model.layers.*.input_layernorm.weight: missing on disk (2 layers: 0-1)"
    assert caught.value.what.splitlines()[1:] == [f"  - {line}"]


def test_findings_fit_on_one_screen(tiny: Callable[..., Path], copy: Callable[[Path], Path]):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {f"stray_{number}": torch.ones(1) for number in range(37)}

    with pytest.raises(ModelError, match=r"37 findings(.|\n)* and 7 more") as caught:
        bind(_rewrite(copy(tiny("qwen2_vl")), spoil))
    assert len(caught.value.findings) == 37


def test_layers_that_no_site_claims_are_found(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    arch = known_archs()["qwen2_vl"]
    towers = list(arch.towers)
    first, *rest = towers[0].sites
    towers[0] = dataclasses.replace(
        towers[0],
        sites=(dataclasses.replace(first, path="attn.qvk"), *rest),
        blocks="model.visual.blocks",
        edges=(),
    )
    towers[1] = dataclasses.replace(towers[1], modules=("model.visual.mergers.*",), edges=())
    odd = dataclasses.replace(
        arch, towers=tuple(towers), left_alone={"model.visual.merger.mlp.2": "for the test"}
    )
    monkeypatch.setattr(config_module, "known_archs", lambda: {"qwen2_vl": odd})
    with pytest.raises(ModelError) as caught:
        bind(tiny("qwen2_vl"))
    message = str(caught.value)
    assert "blocks.*.attn.qvk: expected a linear (attn.qkv), found nothing (2 layers" in message
    assert "blocks.*.attn.qkv: Linear that no site of qwen2_vl.toml claims" in message
    assert "model.visual.mergers: expected a list of modules, found nothing" in message
    assert "model.visual.merger.mlp.0: Linear that no site" in message
    assert "model.visual.merger.mlp.2" not in message


def test_layers_left_alone_are_listed_with_their_reason(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    arch = known_archs()["qwen2_vl"]
    vision, projector, llm = arch.towers
    projector = dataclasses.replace(projector, sites=projector.sites[:1])
    odd = dataclasses.replace(
        arch, towers=(vision, projector, llm), left_alone={"*.mlp.2": "too small"}
    )
    monkeypatch.setattr(config_module, "known_archs", lambda: {"qwen2_vl": odd})
    expected = LeftAlone("model.visual.merger.mlp.2", "too small", is_linear=True)
    assert expected in bind(tiny("qwen2_vl")).left_alone


def test_a_convolution_that_is_no_reshape_is_refused(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    def overlapping(config: object, arch: object) -> nn.Module:
        model = empty_model(config, arch)
        model.get_submodule("model.visual.patch_embed.proj").stride = (2, 2, 2)
        return model

    monkeypatch.setattr(bind_module, "empty_model", overlapping)
    with pytest.raises(ModelError, match=r"patch_embed.proj: kernel .* differs from stride"):
        bind(tiny("qwen2_vl"))


@pytest.mark.parametrize("method", ["compressed-tensors", "modelopt"])
def test_a_quantized_checkpoint_is_refused_unless_asked_for(
    tiny: Callable[..., Path], copy: Callable[[Path], Path], method: str
):
    folder = _edit_config(copy(tiny("qwen2_vl")), quantization_config={"quant_method": method})
    with pytest.raises(ModelError, match="quantized already") as caught:
        bind(folder)
    assert "delete quantization_config from config.json" in str(caught.value.remedy)
    assert bind(folder, quantized=True).names.layout == "old"


@pytest.mark.parametrize("section", [{"quant_method": "bitsandbytes"}, {"load_in_4bit": True}])
def test_a_section_that_quantization_left_behind_is_passed_over_with_a_note(
    tiny: Callable[..., Path], copy: Callable[[Path], Path], section: object
):
    """A merged model in 16 bits that still says how it was trained."""
    folder = _edit_config(copy(tiny("qwen2_vl")), quantization_config=section)
    (note,) = bind(folder).notes
    assert "quantization_config of config.json" in note
    assert bind(tiny("qwen2_vl")).notes == ()

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    with pytest.raises(ModelError, match="quantized already"):
        bind(_rewrite(folder, quantize))


def test_a_cut_shard_is_a_storage_error(tiny: Callable[..., Path], copy: Callable[[Path], Path]):
    folder = copy(tiny("qwen2_vl"))
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(StorageError, match="not a whole safetensors file"):
        bind(folder)


# ------------------------------------------------------------------------------- without any weight


def test_binding_reads_no_weight(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    def forbidden(self: ShardReader, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(ShardReader, "read", forbidden)
    assert bind(tiny_folder).has_weights


def test_a_config_alone_is_enough_for_inspection(tmp_path: Path):
    """A 72B model binds without memory for its weights."""
    write_json(tmp_path / "config.json", _CONFIG_72B)
    with pytest.raises(ModelError, match=r"no readable \*.safetensors"):
        bind(tmp_path)
    bound = bind(tmp_path, headers_required=False)
    assert not bound.has_weights
    assert bound.dtype == torch.bfloat16
    assert bound.names.layout == "old"
    assert sum(site.out_features * site.in_features for site in bound.sites) > 72e9
    assert all(p.is_meta for p in empty_model(bound.config, bound.arch).parameters())


def test_an_index_without_shards_shows_the_layout(tiny: Callable[..., Path], tmp_path: Path):
    source = tiny("qwen2_vl", layout="native")
    shutil.copy(source / "config.json", tmp_path)
    names = dict.fromkeys(ShardReader(source).names, "model-00001-of-00001.safetensors")
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": names})
    assert bind(tmp_path, headers_required=False).names.layout == "native"


def test_what_the_index_does_not_name_is_told(
    tiny: Callable[..., Path], copy: Callable[[Path], Path]
):
    folder = copy(tiny("qwen2_vl"))
    names = sorted(ShardReader(folder).names)
    forgotten, *named = names
    write_json(
        folder / "model.safetensors.index.json",
        {"weight_map": dict.fromkeys(named, "model.safetensors")},
    )
    write_tensors(folder / "consolidated.safetensors", {"w": torch.ones(2)})
    assert bind(folder).notes == (
        f"tensors that the index does not name are read from their shards: {forgotten}",
        "shards that the index does not name are not read: consolidated.safetensors",
    )
    weight_map = dict.fromkeys(named[4:], "model.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    assert bind(folder).notes[0].endswith(f"{', '.join(names[:3])} and 2 more")


def test_the_model_is_built_for_evaluation(tiny_folder: Path, family: str):
    config = native_config(identify(tiny_folder), tiny_folder)
    model = empty_model(config, known_archs()[family])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.config.text_config.use_cache is False
    assert model.config._attn_implementation == "sdpa"
    assert config.text_config.use_cache is True  # the caller's config is left as it was


# ---------------------------------------------------------------------------- remote-code configs


def test_a_remote_config_becomes_the_native_one(tiny: Callable[..., Path]):
    remote = bind(tiny("video_llama_3", layout="remote"))
    native = bind(tiny("video_llama_3"))
    assert remote.arch.name == "video_llama_3_remote"
    assert remote.names.layout == "remote"
    assert remote.vision_token_ids == native.vision_token_ids
    assert remote.shapes == native.shapes
    for part in ("text_config", "vision_config"):
        ours, theirs = (getattr(bound.config, part).to_dict() for bound in (remote, native))
        for key in ("dtype", "transformers_version"):
            ours.pop(key, None)
            theirs.pop(key, None)
        assert ours == theirs


def test_an_absent_vision_config_is_inferred_from_the_headers(
    tiny: Callable[..., Path], copy: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
):
    folder = _edit_config(
        copy(tiny("video_llama_3", layout="remote")),
        vision_encoder_config=None,
        vision_encoder="somewhere/else",
    )
    # 128 channels are no multiple of 72: the head count does not follow
    with pytest.raises(ModelError, match="the tensors do not show num_attention_heads"):
        bind(folder)
    arch = known_archs()["video_llama_3_remote"]
    text, vision = arch.config_map.sections
    infer = dict(vision.infer)
    infer["num_attention_heads"] = dataclasses.replace(infer["num_attention_heads"], by=32)
    sections = (text, dataclasses.replace(vision, infer=infer))
    odd = dataclasses.replace(
        arch, config_map=dataclasses.replace(arch.config_map, sections=sections)
    )
    monkeypatch.setattr(config_module, "known_archs", lambda: {arch.name: odd})
    config = bind(folder).config.vision_config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (128, 256, 2)
    assert (config.num_attention_heads, config.patch_size, config.num_channels) == (4, 4, 3)


def test_a_projector_of_another_kind_is_refused(
    tiny: Callable[..., Path], copy: Callable[[Path], Path]
):
    folder = _edit_config(
        copy(tiny("video_llama_3", layout="remote")), mm_projector_type="mlp3x_gelu"
    )
    with pytest.raises(ModelError, match="mm_projector_type is 'mlp3x_gelu'; only 'mlp2x_gelu'"):
        bind(folder)


def test_the_roles_are_those_of_recipes(tiny_folder: Path, family: str):
    roles = {site.role for site in bind(tiny_folder).sites}
    expected = {"patch_embed", "attn.out", "mlp.up", "mlp.down", "mlp.gate", "lm_head"}
    expected |= {"projector.fc1", "projector.fc2", "attn.qkv.q", "attn.qkv.k", "attn.qkv.v"}
    assert roles == expected | ({"attn.qkv"} if family != "video_llama_3" else set())
    by_kind = {site.role for site in bind(tiny_folder).sites if site.kind is SiteKind.PATCH_CONV}
    assert by_kind == {"patch_embed"}
    head = bind(tiny_folder).site("lm_head")
    assert (head.modality, head.role) == (Modality.LLM, "lm_head")


def test_importing_the_package_does_not_import_transformers():
    """In a fresh interpreter, as the command line starts."""
    code = "import sys, prismquant.models.load; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("family", tiny_vlm.FAMILIES)
def test_a_key_of_the_config_that_nobody_reads_is_told(
    family: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny(family), tmp_path / "model")
    assert bind(folder).notes == ()
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text["rms_norm_ep"] = text.pop("rms_norm_eps")
    text["a_note_of_the_trainer"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    told = "config.json: text_config.rms_norm_ep (did you mean 'rms_norm_eps'?) is not used"
    assert bind(folder).notes == (told,)
    text["num_key_value_head"] = text.pop("num_key_value_heads")
    text["num_attention_heads"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="did you mean 'num_key_value_heads'"):
        bind(folder)


def test_of_a_config_that_is_converted_every_key_has_its_place(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny("video_llama_3", layout="remote"), tmp_path / "model")
    assert bind(folder).notes == ()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"memory_bank": True}))
    assert bind(folder).notes == ("config.json: memory_bank is not used",)
