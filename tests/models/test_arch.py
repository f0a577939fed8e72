"""Architectures are data, read strictly."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import tiny_families
import tiny_vlm
from hypothesis import given
from hypothesis import strategies as st

from prismquant.errors import ModelError
from prismquant.models import arch_files
from prismquant.models.arch import EdgeKind, Layout, Modality, SiteKind
from prismquant.models.arch_files import known_archs, load_arch
from prismquant.models.names import NameMap, choose_layout

ALL = sorted(known_archs())
# Qwen2-VL without parts: all towers, sites, edges and streams written out.
WHOLE = Path(__file__).parent / "archs" / "whole.toml"
SEEING = [name for name in ALL if known_archs()[name].sees]
TEXT = [name for name in ALL if not known_archs()[name].sees]
DENSE = [name for name in ALL if not known_archs()[name].experts]
SPARSE = [name for name in ALL if known_archs()[name].experts]


@pytest.fixture
def broken(tmp_path: Path):
    """``broken(name, old, new)`` loads a copy of an architecture file with one text replaced."""

    def load(name: str, old: str, new: str) -> None:
        for path in (*arch_files.PACKAGED.glob("*.toml"), WHOLE):
            shutil.copy(path, tmp_path / path.name)
        target = tmp_path / f"{name}.toml"
        text = target.read_text()
        assert old in text
        target.write_text(text.replace(old, new, 1))
        load_arch(target)

    return load


def test_every_architecture_is_tested():
    tested = {*tiny_vlm.FAMILIES, *tiny_families.FAMILIES, *tiny_families.SPARSE}
    # The original layouts of two families have tests of their own.
    assert set(SEEING) <= tested | {"video_llama_3_remote", "internvl_chat"}
    dense = ["gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"]
    assert sorted([*dense, "qwen3_moe", "deepseek_v3"]) == TEXT


@pytest.mark.parametrize("name", TEXT)
def test_a_model_of_text_alone_has_one_tower_and_no_placeholders(name):
    arch = known_archs()[name]
    assert [tower.modality for tower in arch.towers] == [Modality.LLM]
    assert arch.vision_token_ids == ()
    assert {stream.modality for stream in arch.streams} <= {Modality.LLM}


def test_no_model_type_belongs_to_two_architectures():
    kinds = [kind for arch in known_archs().values() for kind in arch.model_types]
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("name", SEEING)
def test_every_architecture_that_sees_has_the_three_modalities_with_the_language_model_last(name):
    towers = known_archs()[name].towers
    # The projector of Gemma 3 is one bare matrix.
    projector = [Modality.PROJECTOR] * (name != "gemma3")
    modalities = [*dict.fromkeys(tower.modality for tower in towers)]
    assert modalities == [Modality.VISION, *projector, Modality.LLM]


@pytest.mark.parametrize("name", [name for name in DENSE if "glm" not in name])
def test_every_language_model_has_seven_sites_in_four_stages(name):
    """Beside them, linear attention has three in some blocks."""
    every = known_archs()[name].tower(Modality.LLM).sites
    sites = [site for site in every if not site.role.startswith("attn.linear")]
    assert len(every) - len(sites) == 3 * (name == "qwen3_5")
    assert [(site.role, site.stage, site.fuse) for site in sites] == [
        ("attn.qkv.q", 0, "qkv"),
        ("attn.qkv.k", 0, "qkv"),
        ("attn.qkv.v", 0, "qkv"),
        ("attn.out", 1, None),
        ("mlp.gate", 2, "gate_up"),
        ("mlp.up", 2, "gate_up"),
        ("mlp.down", 3, None),
    ]
    # one input per stage
    assert len({site.input for site in sites}) == 4


@pytest.mark.parametrize("name", SPARSE)
def test_experts_have_an_input_each_and_no_router_is_a_site(name):
    sites = [s for s in known_archs()[name].tower(Modality.LLM).sites if "*" in s.path]
    assert [(site.role, site.input, site.fuse, site.parallel) for site in sites] == [
        ("mlp.experts.gate", "expert_in", "gate_up", "column"),
        ("mlp.experts.up", "expert_in", "gate_up", "column"),
        ("mlp.experts.down", "expert_mid", None, "row"),
    ]
    assert sites[0].stage == sites[1].stage == sites[2].stage - 1
    assert all("experts.*." in site.path for site in sites)
    routers = (".mlp.gate", ".router.proj", ".feed_forward.router")
    assert any(path.endswith(routers) for path in known_archs()[name].left_alone)


@pytest.mark.parametrize("name", DENSE)
def test_what_a_role_means_is_said_of_every_site(name):
    """Servers, caches, rotations and streams go by these, never by the name of a role."""
    closing = ("attn.out", "attn.linear.out", "mlp.down")
    column = ("attn.qkv", "attn.qkv.q", "attn.linear.qkv", "attn.linear.z", "mlp.gate", "mlp.up")
    column += ("mlp.gate_up", "projector.fc1", "projector.gate", "projector.up")
    parallel = dict.fromkeys((*closing, "projector.fc2", "projector.down"), "row")
    parallel |= dict.fromkeys(column, "column")
    cached = {"attn.qkv.k": "keys", "attn.qkv.v": "values"}
    for tower in known_archs()[name].towers:
        for site in tower.sites:
            alone = site.role == "projector.fc1" and len(tower.sites) == 1
            assert site.parallel == (None if alone else parallel.get(site.role)), site.role
            assert site.closes_stream == (site.role in closing), site.role
            assert site.elementwise == site.role.startswith("mlp."), site.role
            assert site.online_rotation == (site.role == "mlp.down"), site.role
            assert site.cache == (cached.get(site.role) if tower.modality == "llm" else None)


def test_names_of_readers_lie_beside_the_family():
    archs = known_archs()
    seen = [name for name in ALL if archs[name].vllm and archs[name].gguf]
    assert [one for one in seen if archs[one].sees] == ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"]
    assert [one for one in seen if not archs[one].sees] == [o for o in DENSE if o in TEXT]
    for arch in archs.values():
        labels = {site.fuse for tower in arch.towers for site in tower.sites if site.fuse}
        assert labels == arch.fused.keys(), arch.name


@pytest.mark.parametrize("name", [name for name in ALL if known_archs()[name].gguf])
def test_llama_cpp_has_every_name_that_a_file_gives_to_a_tensor(name):
    gguf = pytest.importorskip("gguf")
    names = known_archs()[name].gguf
    assert hasattr(gguf.MODEL_ARCH, names.architecture)
    assert bool(names.projector) == known_archs()[name].sees
    assert not names.projector or hasattr(gguf.VisionProjectorType, names.projector)
    for tensors in names.tensors.values():
        for tensor in tensors:
            assert hasattr(gguf.MODEL_TENSOR, tensor.partition(":")[0]), tensor


@pytest.mark.parametrize("name", SEEING)
def test_the_patch_embedding_is_a_convolution_or_a_layer_of_flat_patches(name):
    (site,) = known_archs()[name].tower("vision").entry_sites
    assert site.kind is (SiteKind.LINEAR if name in ("gemma4", "llama4") else SiteKind.PATCH_CONV)
    assert site.role == "patch_embed"


@pytest.mark.parametrize("name", SEEING)
def test_only_gated_blocks_have_linear_edges(name):
    """GELU between fc1 and fc2 does not let a scale through, nor do layers that clip."""
    vision = known_archs()[name].tower("vision")
    gated = name != "gemma4" and any(site.role == "mlp.gate" for site in vision.sites)
    assert any(edge.kind is EdgeKind.LINEAR for edge in vision.edges) == gated


def test_a_fused_gate_and_up_offers_only_its_upper_half():
    sites = known_archs()["glm4v"].tower(Modality.LLM).sites[4:]
    assert [(site.role, site.stage, site.fuse) for site in sites] == [
        ("mlp.gate_up", 2, None),
        ("mlp.down", 3, None),
    ]
    edges = known_archs()["glm4v"].tower(Modality.LLM).edges
    assert [(edge.source, edge.part) for edge in edges if edge.part] == [("mlp.gate_up_proj", "up")]


def test_a_fused_query_key_value_layer_offers_only_its_value_part():
    edges = known_archs()["qwen3_vl"].tower("vision").edges
    (edge,) = [edge for edge in edges if edge.kind is EdgeKind.VALUE]
    assert (edge.producer, edge.part) == ("attn.qkv", "v")


@pytest.mark.parametrize("name", [name for name in SEEING if known_archs()[name].streams])
def test_both_towers_have_a_residual_stream(name):
    """Vision writers come from the patch embedding on; the LLM's include the projector.

    InternVL's vision blocks scale what they add, LLaVA's features come from a block before the
    last, and GLM's patches pass a norm before they enter: no rotation passes that.
    """
    arch = known_archs()[name]
    *vision, llm = arch.streams
    assert [stream.modality for stream in vision] in ([], [Modality.VISION])
    assert llm.modality is Modality.LLM
    assert all("patch_embed" in stream.writers[0] for stream in vision)
    assert llm.writers[0] == known_archs()[name].embeddings
    root = f"{arch.tower(Modality.LLM).root}."
    assert any(not path.startswith(root) for path in llm.writers)
    assert llm.norms[-1] == f"{root}norm"


def test_the_remote_layout_shares_its_towers_with_the_native_one():
    archs = known_archs()
    assert archs["video_llama_3_remote"].towers == archs["video_llama_3"].towers
    assert archs["video_llama_3_remote"].hf_class == archs["video_llama_3"].hf_class


def test_a_missing_tower_is_an_error():
    with pytest.raises(ModelError, match="no audio tower"):
        known_archs()["qwen2_vl"].tower("audio")


def test_an_unknown_key_is_named_with_its_path_and_a_suggestion(broken):
    with pytest.raises(ModelError, match=r"towers\[0\].entry_sites\[0\].stagee") as caught:
        broken("whole", 'input = "pixels"', 'input = "pixels"\nstagee = 1')
    assert "did you mean 'stage'" in str(caught.value)
    assert "whole.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "Qwen2-VL"\n', "", "'title' is missing"),
        ('title = "Qwen2-VL"', "title = 2", "'title' must be a string, not 2"),
        ('model_types = ["qwen2_vl"]', 'model_types = "qwen2_vl"', "list of strings"),
        ("stage = 1\n", "stage = true\n", "whole number"),
        ('parallel = "row"', 'parallel = "rows"', "'rows' is none of column, row"),
        ("closes_stream = true", "closes_stream = false", "must be true, or left out"),
        ('["model.visual.", "visual."],', '["model.visual."],', "list of pairs of strings"),
        ('"lm_head" = "OUTPUT"', '"lm_head" = 3', "'gguf.tensors.lm_head' must be"),
        ('["pixel_values", "image_grid_thw"],', '"pixel_values",', "list of lists"),
        ('modality = "vision"', 'modality = "sight"', "'sight' is none of vision"),
        ('kind = "patch_conv"', 'kind = "patch"', "'patch' is none of linear"),
        ('consumers = ["mlp.fc1"]', 'consumers = ["mlp.fc3"]', "'mlp.fc3', which is no site"),
        ('"self_attn.k_proj", "self_attn.v_proj"]', '"self_attn.k_proj"]', "list all readers"),
        ('part = "v"', 'part = "q"', "part can only be 'v'"),
        ('norm = "norm1"', 'producer = "attn.qkv"', "kind 'norm' has a norm"),
        ('path = "attn.proj"', 'path = "attn.qkv"', "listed twice"),
        ('entry = "model.visual.patch_embed"\n', "", "come together"),
        ('blocks = "model.visual.blocks"\n', "", "either blocks or modules"),
        ('"visual" = "model.visual"', '"visual" = "model.language_model"', "two disk prefixes"),
        ('"visual" = "model.visual"', '"visual" = "model.sight"', "two layouts read one disk"),
        ('depth = "vision_config.depth"\n', "", "blocks and depth come together"),
        ('title = "Qwen2-VL"', "title = ", "not a TOML file"),
        ('title = "Qwen2-VL"', 'title = "Qwen2-VL"\nextends = "nothing"', "nothing.toml"),
        ('title = "Qwen2-VL"', 'title = "Qwen2-VL"\nextends = "whole"', "extends itself"),
        ('title = "Qwen2-VL"', 'title = "Qwen2-VL"\nleft_alone = 3', "must be a table"),
        ("[[edges]]\nkind", "[edges]\nkind", "list of tables"),
        ('[[streams]]\nmodality = "llm"', '[[streams]]\nmodality = "vision"', "two residual"),
        (
            '    "model.visual.blocks.*.mlp.fc2",\n',
            "",
            "stream lacks 'model.visual.blocks.*.mlp.fc2'",
        ),
        ('    "model.visual.blocks.*.norm1",\n', "", "stream lacks 'model.visual.blocks.*.norm1'"),
        ('modality = "vision"\nwriters', 'modality = "vision"\nwriter', "'streams[0].writers' is"),
        (
            'modality = "vision"\nwriters = [',
            'modality = "vision"\nwriters = []\nspare = [',
            "unknown key 'streams[0].spare'",
        ),
    ],
)
def test_a_mistake_in_a_file_is_refused(broken, old, new, message):
    with pytest.raises(ModelError, match=re.escape(message)):
        broken("whole", old, new)


def test_a_stream_has_two_ends(broken):
    with pytest.raises(ModelError, match="a stream has writers and norms"):
        broken(
            "whole",
            "[[streams]]",
            '[[streams]]\nmodality = "vision"\nwriters = []\nnorms = []\n\n[[streams]]',
        )


def test_an_inference_rule_has_one_form(broken):
    with pytest.raises(ModelError, match="exactly one of tensor, count and divide"):
        broken("video_llama_3_remote", "by = 72 }", 'by = 72, count = "model" }')


# ---------------------------------------------------------------------------------------- names

_PART = st.text("abcdefghij_0123456789", min_size=1, max_size=8)


@pytest.mark.parametrize("name", ALL)
@given(parts=st.lists(_PART, min_size=1, max_size=5), data=st.data())
def test_names_translate_there_and_back(name, parts, data):
    """Below every module prefix, to_disk is injective and to_module is its inverse."""
    arch = known_archs()[name]
    for layout in arch.layouts:
        names = NameMap(layout.name, layout.rewrites)
        roots = [tower.root for tower in arch.towers] + [arch.head]
        # Some layers of a list have names of their own, and the list has none.
        roots = [root for root in roots if any(root == module for _, module in names.rewrites)] or (
            roots
        )
        module = ".".join([data.draw(st.sampled_from(roots)), *parts])
        assert names.to_module(names.to_disk(module)) == module


def test_prefixes_are_whole_dotted_parts_and_the_longest_wins():
    names = NameMap("remote", known_archs()["video_llama_3_remote"].layouts[0].rewrites)
    assert names.to_module("model.vision_encoder.x.weight") == "model.vision_model.x.weight"
    assert names.to_module("model.layers.0.mlp") == "model.language_model.layers.0.mlp"
    assert names.to_disk("model.projector.readout.0") == "model.mm_projector.readout.0"
    assert not names.knows("modelling.layers")


def test_names_without_a_place_are_refused():
    names = NameMap("old", known_archs()["qwen2_vl"].layouts[0].rewrites)
    with pytest.raises(ModelError, match=r"no name on disk for 'model.audio.x'"):
        names.to_disk("model.audio.x")
    with pytest.raises(ModelError, match=r"does not know the tensor 'audio.x'"):
        names.to_module("audio.x")


def test_a_name_that_would_not_come_back_is_refused():
    """On disk ``m.b`` would be ``a.b``, which belongs to another module."""
    names = NameMap("odd", (("a", "m"), ("a.b", "n")))
    with pytest.raises(ModelError, match="no name on disk"):
        names.to_disk("m.b.weight")


def test_the_layout_follows_from_the_names():
    layouts = known_archs()["qwen2_vl"].layouts
    modules = {"model.visual.merger", "model.language_model.norm", "lm_head"}
    old = ["visual.merger.weight", "model.norm.weight_packed", "lm_head.weight"]
    new = ["model.visual.merger.weight", "model.language_model.norm.weight", "lm_head.weight"]
    assert choose_layout(layouts, old, modules).layout == "old"
    assert choose_layout(layouts, new, modules).layout == "native"
    assert choose_layout(layouts, [], modules).layout == "old"
    assert choose_layout([Layout("only")], old, modules).to_disk("x.y") == "x.y"


_MODULES = ["model.visual.merger", "model.language_model.norm", "model.language_model.layers.0.mlp"]
_PREFIXES = {
    "model.visual": ["visual", "model.visual"],
    "model.language_model": ["model", "model.language_model", "language_model"],
}


@given(data=st.data())
def test_a_mixture_of_layouts_translates_there_and_back(data):
    """Each tensor may have the prefix of another layout, whatever its neighbours have."""
    modules = ["lm_head", *_MODULES, *(f"{name}.deep.er" for name in _MODULES)]
    disk = {}
    for name in [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]:
        part = next((part for part in _PREFIXES if name.startswith(part)), "lm_head")
        prefix = data.draw(st.sampled_from(_PREFIXES.get(part, [part])))
        disk[name] = prefix + name.removeprefix(part)
    names = choose_layout(known_archs()["qwen2_vl"].layouts, disk.values(), {*modules})
    assert {name: names.to_disk(name) for name in disk} == disk
    assert {names.to_module(name) for name in disk.values()} == disk.keys()
    # Of the quantized checkpoint, too, whose tensors are called after their module.
    stored = {disk[f"{module}.weight"] + "_scale" for module in modules}
    stored |= {disk[f"{module}.bias"] for module in modules}
    again = choose_layout(known_archs()["qwen2_vl"].layouts, stored, {*modules})
    for module in modules:
        assert names.to_disk(f"{module}.weight") == f"{names.to_disk(module)}.weight"
        assert again.to_disk(module) == names.to_disk(module)
        assert again.to_disk(f"{module}.bias") == disk[f"{module}.bias"]
        assert names.to_module(f"{names.to_disk(f'{module}.bias')}.x") == f"{module}.bias.x"


def test_a_tensor_with_two_names_is_refused():
    names = ["visual.merger.weight", "model.visual.merger.weight"]
    with pytest.raises(ModelError, match=r"are one tensor of the model, 'model.visual.merger.we"):
        choose_layout(known_archs()["qwen2_vl"].layouts, names, {"model.visual.merger"})
