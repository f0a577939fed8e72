"""Drafts of architecture files, tried by the check, and compared with the package's files."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tiny_configs
import tiny_families
import tiny_text
import tiny_vlm
import transformers
from typer.testing import CliRunner

from prismquant.cli import app
from prismquant.errors import ModelError, PrismQuantError
from prismquant.families.arch_text import arch_text
from prismquant.families.check_family import check_family
from prismquant.families.draft_family import draft_family
from prismquant.families.sound_draft import require_sound_draft
from prismquant.models.arch_files import PACKAGED, known_archs, load_arch
from prismquant.models.reader_names import GptqNames

if TYPE_CHECKING:
    from collections.abc import Callable

    from prismquant.models.arch import ArchSpec, Tower

# The others are of the same kinds.
_FAST = ("smollm3", "granite", "starcoder2", "nemotron", "olmo", "olmo2", "stablelm", "phi3")
_FAST += ("cohere", "lfm2")
# The package's files of others know of sounds, of norms that are read behind a mask, and more.
_TINY = ("internvl", "qwen3_vl_moe", "qwen3_moe")


@pytest.fixture
def drafted(tmp_path: Path) -> Callable[[Path], ArchSpec]:
    """``drafted(folder)`` drafts a file for a model, checks it untouched, and reads it."""

    def make(folder: Path) -> ArchSpec:
        file = tmp_path / "draft.toml"
        file.write_text(draft_family(folder), encoding="utf-8")
        found = check_family(folder, file)
        assert [claim for claim in found.claims if claim.holds is False] == []
        return load_arch(file)

    return make


def _slow(names: tuple[str, ...], fast: tuple[str, ...]) -> list[object]:
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


# ------------------------------------------------------------------ families without a file


@pytest.mark.parametrize("kind", _slow(tiny_configs.TEXT, _FAST))
def test_a_draft_holds_untouched(
    kind: str, tmp_path: Path, drafted: Callable[[Path], ArchSpec]
) -> None:
    """Whatever its norms, its MLP, the order of its layers."""
    arch = drafted(tiny_configs.build(kind, tmp_path / "model"))
    (tower,) = arch.towers
    roles = {site.role for site in tower.sites}
    assert {"attn.out", "mlp.down"} <= roles
    assert roles & {"attn.qkv", "attn.qkv.q"}
    assert tower.edges
    assert all("DRAFT" in reason for reason in arch.left_alone.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llava", "llava_onevision", "idefics3", "gemma3", "mistral3", "glm4v", "qwen3_5"]
)
def test_a_draft_of_a_model_that_sees_holds_untouched(
    family: str, tmp_path: Path, drafted: Callable[[Path], ArchSpec]
) -> None:
    """Though the package's file says more than one run can show."""
    arch = drafted(tiny_families.build(family, tmp_path / "model"))
    assert {"vision", "llm"} <= {tower.modality for tower in arch.towers}
    assert arch.input_groups[0][0].startswith("pixel_values")
    assert arch.edges


# ------------------------------------------------------------------ beside the package's files


def _facts(tower: Tower) -> dict[str, object]:
    """What a run can show of a tower, whatever tensors are called."""
    inputs: dict[str, set[str]] = {}
    for site in tower.sites:
        inputs.setdefault(site.input, set()).add(site.path)
    labels = ("role", "path", "kind", "stage", "fuse", "parallel", "cache", "online_rotation")
    edges = [
        dataclasses.replace(edge, consumers=tuple(sorted(edge.consumers))) for edge in tower.edges
    ]
    return {
        "sites": {tuple(getattr(site, label) for label in labels) for site in tower.sites},
        "entry": (tower.entry, {(site.path, site.kind) for site in tower.entry_sites}),
        "inputs": sorted(sorted(paths) for paths in inputs.values()),
        "edges": {edge.source: edge for edge in edges},
        "where": (tower.root, tower.blocks, {*tower.modules}, tower.experts),
        "keys": (tower.depth, tower.heads, tower.kv_heads),
    }


@pytest.mark.parametrize(
    "family",
    _slow(
        (*tiny_text.FAMILIES, *tiny_vlm.FAMILIES, *_TINY),
        ("llama", "gemma3_text", "qwen3_moe", "internvl"),
    ),
)
def test_a_draft_is_what_the_package_says(
    family: str, tmp_path: Path, drafted: Callable[[Path], ArchSpec]
) -> None:
    """Of towers, sites, their order, inputs, fusions, edges, streams, names of inputs."""
    makers = (tiny_text, tiny_vlm, tiny_families)
    module = next(one for one in makers if family in (*one.FAMILIES, *getattr(one, "SPARSE", ())))
    folder = module.build(family, tmp_path / "built")
    weightless = shutil.copytree(
        folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")
    )
    draft, ours = drafted(weightless), known_archs()[family]
    assert [_facts(tower) for tower in draft.towers] == [_facts(tower) for tower in ours.towers]
    for key in ("head", "embeddings", "hf_class", "model_types", "vision_token_ids"):
        assert getattr(draft, key) == getattr(ours, key), key
    assert [{*group} for group in draft.input_groups] == [{*group} for group in ours.input_groups]
    assert {*draft.edges} == {*ours.edges}
    streams = [
        {s.modality: ({*s.writers}, {*s.norms}) for s in arch.streams} for arch in (draft, ours)
    ]
    assert streams[0] == streams[1]
    assert draft.layouts[0].rewrites == () or {*draft.layouts[0].rewrites} == {
        *ours.layouts[0].rewrites
    }
    assert draft.left_alone.keys() == ours.left_alone.keys()


@pytest.mark.parametrize("name", sorted(known_archs()))
def test_a_text_says_what_the_architecture_says(name: str, tmp_path: Path) -> None:
    ours = known_archs()[name]
    bare = dataclasses.replace(
        ours,
        name="draft",
        gguf=None,
        vllm=None,
        gptq=GptqNames(),
        config_map=None,
        processor_map=None,
    )
    file = tmp_path / "draft.toml"
    file.write_text(arch_text(bare, {}), encoding="utf-8")
    said = load_arch(file)
    assert said.fused.items() >= bare.fused.items()
    assert dataclasses.replace(said, fused=bare.fused) == bare


def test_the_page_shows_a_file_whole() -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    shown = page.partition("## A file, whole")[2].partition("```toml\n")[2].partition("```")[0]
    assert shown == (PACKAGED / "video_llama_3.toml").read_text(encoding="utf-8")


# ------------------------------------------------------------------ what cannot be drafted


def test_the_command_prints_the_file(tmp_path: Path) -> None:
    folder = tiny_configs.build("smollm3", tmp_path / "model")
    result = CliRunner().invoke(app, ["arch", "draft", str(folder)])
    assert result.exit_code == 0
    (tmp_path / "my.toml").write_text(result.stdout, encoding="utf-8")
    assert load_arch(tmp_path / "my.toml").model_types == ("smollm3",)
    assert sum("DRAFT" in line for line in result.stdout.splitlines()) == 2


def test_a_draft_that_does_not_hold_is_printed_and_fails(tmp_path: Path) -> None:
    """Experts with biases are none that the package can round."""
    folder = tiny_configs.build("smollm3", tmp_path / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    transformers.GptOssConfig(
        vocab_size=128, num_local_experts=4, num_experts_per_tok=2, **sizes, **heads
    ).save_pretrained(folder)
    result = CliRunner().invoke(app, ["arch", "draft", str(folder)])
    assert result.exit_code != 0
    assert 'hf_class = "GptOssForCausalLM"' in result.stdout
    assert isinstance(result.exception, ModelError)
    assert "no set of gated experts without bias" in str(result.exception)
    assert result.exception.where == str(folder)
    with pytest.raises(ModelError, match="the draft does not hold"):
        require_sound_draft(folder, result.stdout)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    folder = tiny_configs.build("smollm3", tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(PrismQuantError, match="it has neither tokenizer") as error:
        draft_family(folder)
    assert str(error.value.where) == str(folder)


def test_a_model_that_writes_no_text_is_an_error(tmp_path: Path) -> None:
    folder = tiny_configs.build("smollm3", tmp_path / "model")
    transformers.ViTConfig().save_pretrained(folder)
    with pytest.raises(ModelError, match="no class that puts out text"):
        draft_family(folder)


def test_a_model_that_transformers_has_not_is_an_error(tmp_path: Path) -> None:
    folder = tiny_configs.build("smollm3", tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "nobodys"}')
    with pytest.raises(ModelError, match="has no such model"):
        draft_family(folder)


def test_a_folder_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        draft_family(tmp_path / "nothing")
