"""An architecture file that is given with a call, for models that lie elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny_text
from typer.testing import CliRunner

import prismquant as pq
from prismquant.cli import app
from prismquant.errors import ModelError, PrismQuantError
from prismquant.models.arch_files import BESIDE
from prismquant.models.config import identify
from prismquant.models.given_arch import described_by

if TYPE_CHECKING:
    from collections.abc import Callable

RTN: dict[str, Any] = {"version": 1, "rules": [{"weights": "int8-channel", "solver": "rtn"}]}
COMMANDS = ("inspect", "quantize", "analyze", "eval", "search", "export", "check")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_text.build("llama", tmp_path / "model")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file that extends another one of its folder."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "base.toml").write_text('extends = "llama"\ntitle = "Base"\n')
    path = tmp_path / "files" / "mine.toml"
    path.write_text('extends = "base"\ntitle = "My own"\n')
    return path


def test_it_comes_before_all_others_and_only_while_it_lasts(model: Path, mine: Path) -> None:
    (model / BESIDE).write_text('extends = "llama"\ntitle = "Beside"\n')
    assert identify(model).title == "Beside"
    with described_by(mine):
        assert identify(model).title == "My own"
        with described_by(None):
            assert identify(model).title == "My own"
    assert identify(model).title == "Beside"


def test_a_run_uses_it_keeps_it_and_says_so(model: Path, mine: Path, tmp_path: Path) -> None:
    """The result is that of the same file beside the model, and is read without the flag."""
    plan = pq.inspect(model, RTN, arch=mine)
    assert "mine.toml describes it" in plan.remarks
    out = tmp_path / "out"
    result = pq.quantize(model, RTN, out, arch=mine)
    assert (out / BESIDE).read_bytes() == mine.read_bytes()
    assert (out / "base.toml").is_file()
    assert not any("has not written" in line for line in result.notes)
    assert "mine.toml describes it" in result.plan.remarks
    assert result.record.identity.versions["architecture file"]
    assert identify(out).title == "My own"
    pq.load(out)
    beside = shutil.copytree(model, tmp_path / "beside")
    shutil.copy(mine, beside / BESIDE)
    shutil.copy(mine.with_name("base.toml"), beside)
    pq.quantize(beside, RTN, tmp_path / "other")
    for shard in out.glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "other" / shard.name).read_bytes()


def test_a_run_is_resumed_with_the_same_file_alone(model: Path, mine: Path, tmp_path: Path) -> None:
    pq.quantize(model, RTN, tmp_path / "out", arch=mine)
    pq.quantize(model, RTN, tmp_path / "out", arch=mine, resume=True)
    mine.write_text('extends = "base"\ntitle = "Another"\n')
    with pytest.raises(PrismQuantError) as error:
        pq.quantize(model, RTN, tmp_path / "out", arch=mine, resume=True)
    assert "architecture file" in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('extends = "qwen2"\n', "mine.toml describes qwen2, but the checkpoint's model_type is"),
        ("towers = 3\n", "mine.toml"),
        ('extends = "llama"\ntitle = 3\n', "'title' must be a string"),
    ],
)
def test_a_file_of_something_else_is_refused_before_any_work(
    text: str, told: str, model: Path, mine: Path, tmp_path: Path
) -> None:
    mine.write_text(text)
    data = tmp_path / "data.jsonl"
    data.write_text(
        '{"messages": [{"role": "user", "content": "what"}, '
        '{"role": "assistant", "content": "red"}]}\n'
    )
    calls: tuple[Callable[[], Any], ...] = (
        lambda: pq.inspect(model, RTN, arch=mine),
        lambda: pq.quantize(model, RTN, tmp_path / "out", arch=mine),
        lambda: pq.analyze(model, "int8-channel", tmp_path / "s.json", data, arch=mine),
        lambda: pq.measure(model, data, arch=mine),
    )
    for call in calls:
        with pytest.raises(ModelError) as error:
            call()
        assert told in str(error.value)
    assert not (tmp_path / "out").exists() or not [*(tmp_path / "out").glob("*.safetensors")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_takes_a_model_takes_it(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert "--arch" in result.stdout


def test_commands_use_it(model: Path, mine: Path, tmp_path: Path) -> None:
    call = CliRunner().invoke
    shown = call(app, ["inspect", str(model), "--recipe", "w8a16", "--arch", str(mine)])
    assert "mine.toml describes it" in shown.stdout
    out = str(tmp_path / "out")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("version: 1\nrules:\n  - weights: int8-channel\n    solver: rtn\n")
    ran = ["quantize", str(model), "--recipe", str(recipe), "--out", out, "--arch", str(mine)]
    assert call(app, ran).exit_code == 0
    assert call(app, ["check", out, "--arch", str(mine)]).exit_code == 0
    dense = ["export", out, "--format", "dense", "--out", str(tmp_path / "d"), "--arch", str(mine)]
    assert call(app, dense).exit_code == 0
    assert (tmp_path / "d" / BESIDE).read_bytes() == mine.read_bytes()
