"""An architecture file, tried on a small model: right ones hold, wrong ones are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny_text
import torch
from typer.testing import CliRunner

import prismquant as pq
from prismquant.cli import app
from prismquant.engine.streamed_model import StreamedModel
from prismquant.errors import ModelError
from prismquant.families import true_replay
from prismquant.families.check_family import check_family
from prismquant.families.true_replay import require_true_replay
from prismquant.models import arch_files
from prismquant.models.arch_files import BESIDE
from prismquant.models.bind import bind

if TYPE_CHECKING:
    from collections.abc import Callable

    from prismquant.families.family_claims import FamilyCheck

ARCHS = Path(arch_files.__file__).parent / "archs"
# Qwen2-VL without parts: every passage of it stands in the file.
WHOLE = Path(__file__).parents[1] / "models" / "archs" / "whole.toml"
UP_EDGE = {'producer = "mlp.up_proj"': 'producer = "mlp.gate_proj"'}
WRONG = UP_EDGE | {
    '    "model.visual.merger.mlp.2",\n': "",
    '"lm_head" = "OUTPUT"': '"head" = "OUTPUT"',
}


def without_weights(folder: Path, out: Path) -> Path:
    """A model's folder as it is before its weights have come."""
    return shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))


def altered(file: Path, folder: Path, passages: dict[str, str]) -> Path:
    """A family's file with some passages replaced."""
    text = file.read_text(encoding="utf-8")
    for old, new in passages.items():
        assert old in text
        text = text.replace(old, new, 1)
    path = folder / file.name
    path.write_text(text, encoding="utf-8")
    return path


def wrong(check: FamilyCheck) -> list[str]:
    return [claim.what for claim in check.claims if claim.holds is False]


# --------------------------------------------------------------------- files that are right


def test_all_claims_hold_for_pictures_clips_and_texts(
    tiny_folder: Path, family: str, tmp_path: Path
) -> None:
    found = check_family(without_weights(tiny_folder, tmp_path / "model"))
    assert (found.arch, wrong(found)) == (family, [])
    assert found.sound
    tried = [claim.what for claim in found.claims if claim.holds]
    for kind in ("text", "image", "video", "text and image and video"):
        assert f"units are run as by the model itself: {kind}" in tried
    for tower in ("vision", "llm"):
        assert f"the {tower} tower's values can be rotated" in tried
        assert f"the {tower} tower's residual stream can be rotated" in tried
    assert sum("scale moves" in what for what in tried) >= 6


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_all_claims_hold_for_text_alone(
    family: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Of Gemma: scaled embeddings, windows, bounded logits, and norms of one plus a weight."""
    assert family in tiny_text.FAMILIES
    found = check_family(without_weights(tiny(family, tie=family != "llama"), tmp_path / "model"))
    assert wrong(found) == []
    assert [claim.what for claim in found.claims if claim.holds is None] == []
    norms = [claim for claim in found.claims if "input_layernorm" in claim.what]
    assert [claim.holds for claim in norms] == [True]


@pytest.mark.slow
def test_a_remote_layout_is_tried_as_transformers_writes_it(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = without_weights(tiny("video_llama_3", layout="remote"), tmp_path / "model")
    found = check_family(folder)
    assert found.sound
    assert "what video_llama_3_remote calls tensors and settings is not tried" in found.notes[0]


# --------------------------------------------------------------------- files that are wrong


def test_wrong_claims_are_told(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """An edge that starts at the wrong layer, a stream without a writer, a name of nothing."""
    found = check_family(tiny("qwen2_vl"), altered(WHOLE, tmp_path, WRONG))
    assert not found.sound
    blocks = "model.language_model.layers.*.mlp"
    assert wrong(found) == [
        "patterns of gguf.tensors match something",
        f"scale moves from {blocks}.gate_proj to {blocks}.down_proj",
        "the llm tower's residual stream can be rotated",
        "the llm tower's inputs of the last MLP layers can be rotated",
    ]


def test_a_transform_that_would_change_the_model_is_refused(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Of a file of one's own, whose stream lacks a writer; without the rotation it is no matter."""
    file = altered(WHOLE, tmp_path, {'    "model.visual.merger.mlp.2",\n': ""})
    rules = [{"match": {"role": "mlp.down"}, "weights": "int8-g32", "solver": "rtn"}]
    rotation = {"name": "rotation", "match": {"modality": "llm"}}
    rotated = {"rules": rules, "transforms": [rotation]}
    with pytest.raises(ModelError, match="a transform of the recipe would change"):
        pq.quantize(tiny("qwen2_vl"), rotated, tmp_path / "rotated", arch=file)
    assert not (tmp_path / "rotated").exists()
    pq.quantize(tiny("qwen2_vl"), {"rules": rules}, tmp_path / "plain", arch=file)


def test_a_gate_that_is_not_said_and_a_reader_that_is_forgotten_are_told(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Attention whose outputs a gate multiplies, and a norm read by a layer that is left alone."""
    readers = [f"self_attn.{part}_proj" for part in "qkv"]
    readers += [f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b")]
    like = 'like = "qwen_hybrid"\n'
    edges = f"""edges = [
        {{ kind = "norm", norm = "input_layernorm", consumers = {readers} }},
        {{ kind = "value", producer = "self_attn.v_proj", consumers = ["self_attn.o_proj"] }},
    ]
    """
    file = altered(ARCHS / "qwen3_5.toml", tmp_path, {like: like + edges})
    found = check_family(tiny("qwen3_5"), file)
    block = "model.language_model.layers.*"
    ends = ", ".join(f"{block}.{path}" for path in readers[3:])
    assert wrong(found) == [
        f"scale moves from {block}.input_layernorm to {ends}",
        "the llm tower's residual stream can be rotated",
        "the llm tower's values can be rotated",
    ]
    (said,) = [claim.said for claim in found.claims if "llm tower's values" in claim.what]
    assert "gated = true" in said


def test_a_gate_that_is_not_there_is_told(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Values that can be rotated would stay as they are for nothing."""
    value = 'producer = "self_attn.v_proj", consumers = ["self_attn.o_proj"]'
    gated = f'edges = [{{ kind = "value", {value}, gated = true }}]'
    like = 'like = "llama"\n'
    found = check_family(
        tiny("llama"), altered(ARCHS / "llama.toml", tmp_path, {like: f"{like}{gated}\n"})
    )
    assert wrong(found) == ["a gate multiplies the llm tower's values"]


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that looks up embeddings by itself forgets that some models scale them."""

    def raw(self: StreamedModel) -> Any:
        name = self.bound.arch.embeddings
        table = self._reader.read(self.bound.names.to_disk(f"{name}.weight"))
        return {name: lambda ids: torch.nn.functional.embedding(ids, table)}

    monkeypatch.setattr(StreamedModel, "lookups", raw)


@pytest.mark.usefixtures("forgetful")
def test_units_that_see_something_else_are_told(tiny: Callable[..., Path]) -> None:
    assert wrong(check_family(tiny("gemma2"))) == ["units are run as by the model itself: text"]


@pytest.mark.usefixtures("forgetful")
def test_no_run_begins_whose_units_would_see_something_else(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large models, and of all that a file of one's own describes; with calibration data."""
    data = tmp_path / "data.txt"
    data.write_text("what is the colour of the bar ? " * 20, encoding="utf-8")
    own = shutil.copytree(tiny("gemma2"), tmp_path / "own")
    (own / BESIDE).write_text('extends = "gemma2"\n', encoding="utf-8")
    monkeypatch.setattr(true_replay, "_LARGE", 0)
    for folder in (own, tiny("gemma2")):
        with pytest.raises(ModelError, match="calibration would see other activations than this"):
            pq.quantize(folder, "w8a16", tmp_path / "out", data)
        assert not list((tmp_path / "out").glob("*.safetensors"))
        with pytest.raises(ModelError, match="calibration would see other activations than this"):
            pq.analyze(folder, "int4-g64", tmp_path / "s.json", data)
    recipe = {"rules": [{"match": {"role": "mlp"}, "weights": "int8-channel", "solver": "rtn"}]}
    pq.quantize(own, recipe, tmp_path / "free")


def test_a_run_of_a_true_family_begins(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(true_replay, "_LARGE", 0)
    require_true_replay(bind(tiny("qwen2_5_vl")))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('path = "mlp.down_proj"', 'path = "mlp.down"', "'mlp.down_proj', which is no site"),
        ('path = "attn.proj"\nstage = 1', 'path = "attn.proj"\nstage = "1"', "a whole number"),
        ('["qwen2_vl"]', '["other"]', "describes other, but the checkpoint's model_type"),
        ('modality = "vision"', 'modality = "vision', "not a TOML file"),
        (
            'entry = "model.visual.patch_embed"',
            'entry = "model.visual.patch"',
            "does not fit Qwen2-VL",
        ),
    ],
    ids=["path", "number", "type", "syntax", "module"],
)
def test_a_file_that_does_not_fit_is_an_error_with_its_name(
    old: str, new: str, told: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    file = altered(WHOLE, tmp_path, {old: new})
    with pytest.raises(ModelError, match=told) as error:
        check_family(tiny("qwen2_vl"), file)
    assert Path(str(error.value.where)).name == file.name
    assert BESIDE not in str(error.value)


# --------------------------------------------------------------------- a file beside the checkpoint


def test_a_family_of_ones_own_is_a_file_beside_the_checkpoint(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """It is checked, quantizes, goes along with the result, and its result is loaded by it."""
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    (folder / BESIDE).write_text('extends = "llama"\ntitle = "My own"\n', encoding="utf-8")
    found = check_family(folder)
    assert (found.sound, found.title) == (True, "My own")
    recipe = {"version": 1, "rules": [{"weights": "int8-channel", "solver": "rtn"}]}
    result = pq.quantize(folder, recipe, tmp_path / "out")
    assert any(BESIDE in line for line in result.plan.remarks)
    assert (tmp_path / "out" / BESIDE).read_bytes() == (folder / BESIDE).read_bytes()
    pq.load(tmp_path / "out")


def test_a_file_beside_another_model_is_an_error(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    (folder / BESIDE).write_text('extends = "qwen2"\n', encoding="utf-8")
    with pytest.raises(ModelError, match="describes qwen2, but the checkpoint's"):
        pq.inspect(folder, "w4a16")


def test_a_file_may_extend_one_of_its_own_folder(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('extends = "llama"\ntitle = "Base"\n', encoding="utf-8")
    (tmp_path / "mine.toml").write_text('extends = "base"\n', encoding="utf-8")
    assert check_family(tiny("llama"), tmp_path / "mine.toml").title == "Base"
    (tmp_path / "mine.toml").write_text('extends = "../base"\n', encoding="utf-8")
    with pytest.raises(ModelError, match="not the name of an architecture file"):
        check_family(tiny("llama"), tmp_path / "mine.toml")


# --------------------------------------------------------------------------------- the command line


def test_the_command_tells_by_its_exit_status(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder, call = str(tiny("llama")), CliRunner().invoke
    good = call(app, ["arch", "check", folder, "--json"])
    assert good.exit_code == 0
    assert json.loads(good.stdout)["sound"] is True
    edge = '{ kind = "linear", producer = "self_attn.k_proj", consumers = ["self_attn.o_proj"] }'
    place = 'like = "llama"\n'
    file = altered(ARCHS / "llama.toml", tmp_path, {place: f"{place}edges = [{edge}]\n"})
    bad = call(app, ["arch", "check", folder, "--arch", str(file)])
    assert bad.exit_code == 1
    assert "claims are wrong" in bad.stdout


@pytest.mark.slow
def test_an_empty_table_of_names_is_no_claim_that_holds(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copy(WHOLE, tmp_path)
    own = tmp_path / "mine.toml"
    own.write_text(
        'extends = "whole"\n[gguf]\narchitecture = "QWEN2VL"\nprojector = ""\ntensors = {}\n'
    )
    found = check_family(tiny("qwen2_vl"), own)
    assert wrong(found) == ["patterns of gguf.tensors match something"]
    assert found.arch == "mine"


def test_the_list_names_every_file() -> None:
    listed = json.loads(CliRunner().invoke(app, ["arch", "list", "--json"]).stdout)
    assert {one["name"] for one in listed} == {path.stem for path in ARCHS.glob("*.toml")}
