"""Processors fit their model, and nothing of a stranger runs or is opened unasked."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch

import prismquant
from prismquant.errors import DataError, ModelError
from prismquant.models.bind import bind
from prismquant.models.processor import load_processor
from prismquant.models.remote_config import added_tokens
from prismquant.storage import write_json

if TYPE_CHECKING:
    from collections.abc import Callable


def _edit(folder: Path, file: str, change: Callable[[Any], object]) -> Path:
    content = json.loads((folder / file).read_text())
    change(content)
    write_json(folder / file, content)
    return folder


def test_the_processor_writes_placeholders_for_every_feature(
    tiny_folder: Path, calibration_file: Path, family: str
):
    """As many placeholder tokens as the vision tower yields, for pictures and for clips."""
    processor = load_processor(tiny_folder)
    image_id, video_id = bind(tiny_folder).vision_token_ids
    for sample in tiny_vlm.encode(processor, calibration_file):
        ids = sample["input_ids"]
        for kind, token in (("image", image_id), ("video", video_id)):
            grid = sample.get(f"{kind}_grid_thw", torch.zeros(0, 3, dtype=torch.long))
            merge = 1 if (family, kind) == ("video_llama_3", "image") else 2
            count = int(grid.prod(-1).sum()) // merge**2
            if family == "video_llama_3" and kind == "video" and count:
                count = int(sample["video_compression_mask"].sum())
            assert int((ids == token).sum()) == count


def test_a_native_processor_is_built_for_the_remote_layout(
    tiny: Callable[..., Path], calibration_file: Path
):
    native = tiny_vlm.encode(load_processor(tiny("video_llama_3")), calibration_file)
    remote = tiny_vlm.encode(
        load_processor(tiny("video_llama_3", layout="remote")), calibration_file
    )
    for a, b in zip(native, remote, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor": {"resample": 99}}, "cannot process any picture"),
        ({"video_processor": {"resample": 99}}, "cannot process any clip"),
        (
            {"image_processor": {"size": {"shortest_edge": -9, "longest_edge": -3}}},
            "cannot process any picture",
        ),
        ({"image_processor": {"image_mean": "x"}}, "cannot process any picture"),
        ({"processor_class": "FooProcessor"}, "without image_processor .* processor_class"),
    ],
)
def test_a_broken_processor_is_no_fault_of_the_data(
    tiny: Callable[..., Path], tmp_path: Path, change: dict[str, Any], message: str
):
    def spoil(content: dict[str, Any]) -> None:
        for key, value in change.items():
            content[key] = content[key] | value if isinstance(value, dict) else value

    folder = shutil.copytree(tiny("qwen2_vl"), tmp_path / "copy")
    _edit(folder, "processor_config.json", spoil)
    with pytest.raises(DataError, match=message) as caught:
        load_processor(folder)
    assert caught.value.where == str(folder / "processor_config.json")
    assert "from the original checkpoint" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("tokenizer.json",), "neither tokenizer.json nor vocab.json"),
        (("processor_config.json",), "neither processor_config.json nor preprocessor_config.json"),
    ],
)
def test_missing_processor_files_are_named(
    tiny: Callable[..., Path], tmp_path: Path, names: tuple[str, ...], message: str
):
    folder = shutil.copytree(tiny("qwen2_vl"), tmp_path / "copy")
    for name in names:
        (folder / name).unlink()
    with pytest.raises(DataError, match=message):
        load_processor(folder)


def test_a_broken_processor_file_is_a_data_error(tiny: Callable[..., Path], tmp_path: Path):
    folder = shutil.copytree(tiny("qwen2_vl"), tmp_path / "copy")
    (folder / "processor_config.json").write_text("{")
    with pytest.raises(DataError, match="processor cannot be loaded"):
        load_processor(folder)


def test_a_missing_torchvision_is_named(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchvision" else find(name)
    )
    with pytest.raises(DataError, match="torchvision, which is not installed"):
        load_processor(tiny("qwen2_vl"))


# ----------------------------------------------------------------------------- what does not fit


def test_an_id_without_an_embedding_is_refused(tiny: Callable[..., Path], tmp_path: Path):
    """What lies behind the table would be taken for its vector."""
    folder = shutil.copytree(tiny("qwen2_vl"), tmp_path / "copy")
    _edit(folder, "tokenizer.json", lambda t: t["model"]["vocab"].update(zebra=128))
    with pytest.raises(DataError, match=r"token 'zebra' has the id 128, but .*vocab_size is 128"):
        load_processor(folder)


def test_an_id_that_only_surrounds_texts_is_refused_too(tiny: Callable[..., Path], tmp_path: Path):
    folder = shutil.copytree(tiny("qwen2_vl"), tmp_path / "copy")
    around = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "x", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"x": {"id": "x", "ids": [999], "tokens": ["x"]}},
    }
    _edit(folder, "tokenizer.json", lambda t: t.update(post_processor=around))
    with pytest.raises(DataError, match="'put around each text' has the id 999"):
        load_processor(folder)


def test_embeddings_may_have_more_rows_than_the_tokenizer_has_tokens(tiny_folder: Path):
    assert len(load_processor(tiny_folder).tokenizer) < tiny_vlm.VOCABULARY


@pytest.mark.parametrize("part", ["image_processor", "video_processor"])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("merge_size", "spatial_merge_size"),
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
    ],
)
def test_a_processor_that_cuts_other_pieces_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, part: str, name: str, key: str
):
    folder = shutil.copytree(tiny("qwen2_5_vl"), tmp_path / "copy")
    _edit(folder, "processor_config.json", lambda c: c[part].update({name: 8}))
    with pytest.raises(DataError, match=rf"{part}.{name} is 8, but vision_config.{key} is \d"):
        load_processor(folder)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_placeholders_that_the_model_does_not_know_are_refused(
    tiny: Callable[..., Path], tmp_path: Path, kind: str
):
    folder = shutil.copytree(tiny("qwen3_vl"), tmp_path / "copy")
    _edit(folder, "config.json", lambda c: c.update({f"{kind}_token_id": 9}))
    with pytest.raises(DataError, match=rf"marks media by the id \d, but {kind}_token_id is 9"):
        load_processor(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["model"].update(type="Fancy"),
        lambda t: t.update(pre_tokenizer={"type": "Quantum"}),
    ],
)
def test_a_tokenizer_of_a_newer_library_is_named_with_the_version(
    tiny: Callable[..., Path], tmp_path: Path, change: Callable[[Any], object]
):
    folder = _edit(shutil.copytree(tiny("qwen2_vl"), tmp_path / "copy"), "tokenizer.json", change)
    with pytest.raises(DataError, match=r"tokenizer.json is not what tokenizers \d.* reads: "):
        load_processor(folder)


@pytest.mark.parametrize(
    "added", [3, [1], [{"content": "x"}], {"a": 1}, {"a": {"content": "x"}}, "text"]
)
def test_added_tokens_of_an_unknown_form_are_an_error(tmp_path: Path, added: object):
    for file, key in (
        ("tokenizer_config.json", "added_tokens_decoder"),
        ("tokenizer.json", "added_tokens"),
    ):
        write_json(tmp_path / file, {key: added})
        with pytest.raises(ModelError, match=rf"{file} lists its added tokens in an unknown way"):
            added_tokens(tmp_path)
        (tmp_path / file).unlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "vocab.json", "additional_chat_templates/x.jinja"]
)
def test_a_named_pipe_in_the_folder_is_never_opened(
    tiny: Callable[..., Path], tmp_path: Path, name: str
):
    """It would wait for ever."""
    folder = shutil.copytree(tiny("qwen2_vl"), tmp_path / "copy")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(DataError, match=rf"{Path(name).name} cannot be read: it is a named pipe"):
        load_processor(folder)


# ------------------------------------------------------------------------------------ remote code


_CODE = """
from pathlib import Path
Path(__file__).with_name("mark").touch()
Path({mark!r}).touch()
from transformers import PretrainedConfig, ProcessorMixin

class Videollama3Qwen2Config(PretrainedConfig):
    model_type = "videollama3_qwen2"

class Videollama3Qwen2Processor(ProcessorMixin):
    pass
"""


@pytest.fixture
def hostile(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint in the original layout whose Python files leave a mark when they run."""
    folder = shutil.copytree(tiny("video_llama_3", layout="remote"), tmp_path / "copy")
    for name in ("configuration_videollama3", "processing_videollama3", "tokenization"):
        (folder / f"{name}.py").write_text(_CODE.format(mark=str(tmp_path / "mark")))
    # Without this, transformers asks the config for the tokenizer's class.
    _edit(folder, "tokenizer_config.json", lambda c: c.pop("tokenizer_class"))
    return folder


def test_code_of_the_checkpoint_does_not_run_and_nobody_is_asked(hostile: Path, tmp_path: Path):
    """The native processor is built, though the folder describes its own by code."""
    program = (
        "import sys\n"
        "from prismquant.models.bind import bind\n"
        "from prismquant.models.processor import load_processor\n"
        "bind(sys.argv[1])\n"
        "print(type(load_processor(sys.argv[1])).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(hostile)],
        capture_output=True,
        text=True,
        input="y\n" * 9,
    )
    assert (done.stdout, done.returncode) == ("VideoLlama3Processor\n", 0), done.stderr
    assert not (tmp_path / "mark").exists()


def test_only_code_that_is_needed_is_asked_for(
    hostile: Path, tiny: Callable[..., Path], tmp_path: Path
):
    """Where transformers has a class of its own, that is used; the refusal names the flag."""
    native = shutil.copytree(tiny("qwen2_vl"), tmp_path / "native")
    for file in ("config.json", "tokenizer_config.json", "processor_config.json"):
        entries = {
            f"Auto{kind}": "tokenization.X" for kind in ("Config", "Processor", "ImageProcessor")
        }
        entries["AutoTokenizer"] = ["tokenization.X", None]
        _edit(native, file, lambda c, entries=entries: c.update(auto_map=entries))
    shutil.copy(hostile / "tokenization.py", native)
    assert type(load_processor(native)).__name__ == "Qwen2VLProcessor"
    assert bind(native).arch.name == "qwen2_vl"
    _edit(native, "processor_config.json", lambda c: c.update(processor_class="OwnProcessor"))
    with pytest.raises(DataError, match="is Python code in its folder, which is not run") as caught:
        load_processor(native)
    assert "--trust-remote-code" in str(caught.value.remedy)
    assert not (tmp_path / "mark").exists()


def test_every_loader_of_transformers_is_told_what_it_may_do():
    """Nothing is fetched, no code runs, and nothing asks on standard input."""
    calls = []
    for path in sorted(Path(prismquant.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name != "input", f"{path.name} asks"
            if name.endswith(".from_pretrained"):
                calls.append((path.name, {keyword.arg: keyword.value for keyword in node.keywords}))
    assert len(calls) >= 3
    for file, keywords in calls:
        assert keywords.keys() >= {"trust_remote_code", "local_files_only"}, file
        assert ast.unparse(keywords["local_files_only"]) == "True", file
        assert ast.unparse(keywords["trust_remote_code"]) in ("False", "trust_remote_code"), file
