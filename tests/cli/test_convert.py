"""Recipes of other tools on the command line, and in the record of a run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from toy_dialect import TOY, install

import prismquant as pq
from prismquant.diagnostics.translation import Translation
from prismquant.opening import read_json
from prismquant.recipe.importers.import_recipe import import_recipe
from prismquant.recipe.plain_yaml import read_yaml
from prismquant.recipe.schema import load_recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


# From file to record


def test_a_run_tells_keeps_and_shows_what_became_of_it(
    tiny: Callable[..., Path], tmp_path: Path, run: Cli
) -> None:
    (tmp_path / "toy.json").write_text(json.dumps(TOY))
    out, words = str(tmp_path / "out"), ["--recipe", str(tmp_path / "toy.json"), "--json"]
    status, said, told = run("quantize", str(tiny("qwen3_vl")), *words, "--out", out)
    assert status == 0, told
    record = json.loads(said)["record"]
    wanted = import_recipe(tmp_path / "toy.json").translation
    assert isinstance(wanted, Translation)
    assert record == read_json(tmp_path / "out" / "prismquant" / "record.json")
    assert record["translation"]["dialect"] == "toy"
    assert record["translation"]["changed"] == [vars(one) for one in wanted.changed]
    assert "note: changed: toy_order: true -> rules[0].solver: rtn (no order is kept)" in told
    assert "note: dropped: toy_speed: fast" in told
    # And the same record is read back, whole.
    result = pq.quantize(tiny("qwen3_vl"), TOY, tmp_path / "again")
    assert result.record.translation is not None
    assert result.record.translation.honoured == wanted.honoured
    kept = load_recipe(tmp_path / "out" / "prismquant" / "recipe.yaml")
    assert kept == import_recipe(TOY).recipe


def test_a_plan_tells_what_became_of_it(
    tiny: Callable[..., Path], tmp_path: Path, run: Cli
) -> None:
    (tmp_path / "toy.json").write_text(json.dumps(TOY))
    words = "inspect", str(tiny("qwen3_vl")), "--recipe", str(tmp_path / "toy.json")
    status, said, _ = run(*words)
    assert status == 0
    assert "was read as a recipe of toy: settings 1 honoured, 1 changed, 1 dropped" in said
    status, said, _ = run(*words, "--json")
    assert status == 0
    assert json.loads(said)["translation"] == import_recipe(tmp_path / "toy.json").to_dict()
    status, said, _ = run("inspect", words[1], "--recipe", "w8a8", "--json")
    assert "translation" not in json.loads(said)


# The command


def test_convert_writes_a_recipe_that_is_read_back(tmp_path: Path, run: Cli) -> None:
    (tmp_path / "toy.json").write_text(json.dumps(TOY))
    imported = import_recipe(tmp_path / "toy.json")
    status, said, told = run("recipe", "convert", str(tmp_path / "toy.json"))
    assert status == 0
    assert load_recipe(read_yaml(said)) == imported.recipe
    assert "# dropped: toy_speed: fast" in said
    assert "toy_speed" in told
    out = tmp_path / "out.yaml"
    for _ in range(2):  # An earlier one of its own is replaced.
        status, said, told = run("recipe", "convert", str(tmp_path / "toy.json"), "--out", str(out))
        assert (status, said) == (0, "")
        assert load_recipe(out) == imported.recipe
    status, said, _ = run("recipe", "convert", "-8", "--from", "toy", "--json")
    assert status == 0
    assert json.loads(said) == import_recipe("-8").to_dict() | {"out": None}


def test_flags_of_mquant_are_taken_as_one_text(
    tiny: Callable[..., Path], tmp_path: Path, run: Cli
) -> None:
    flags = "--quant --quant_llm --llm_w_bits 4 --llm_w_rtn"
    status, said, _ = run("recipe", "convert", "--from", "mquant", flags)
    assert status == 0
    recipe = import_recipe(flags).recipe
    assert load_recipe(read_yaml(said)) == recipe
    model = str(tiny("qwen2_vl"))
    for number, words in enumerate((["--mquant-args", flags], ["--recipe", flags])):
        out = str(tmp_path / f"out{number}")
        status, said, told = run("quantize", model, *words, "--out", out, "--json")
        assert status == 0, told
        assert json.loads(said)["record"]["translation"]["dialect"] == "mquant"
    for words in ([], ["--mquant-args", flags, "--recipe", "w4a16"]):
        status, said, told = run("quantize", model, *words, "--out", str(tmp_path / "no"))
        assert (status, said) == (2, "")
        assert "give --recipe or --mquant-args" in told
    status, said, told = run("quantize", model, "--mquant-args", "--quant", "--out", "no")
    assert (status, said) == (1, "")
    assert "nothing would be quantized" in told


def test_convert_refuses_what_it_should(tmp_path: Path, run: Cli) -> None:
    toy = tmp_path / "toy.json"
    toy.write_text(json.dumps(TOY))
    status, said, told = run("recipe", "convert", str(toy), "--strict")
    assert (status, said) == (1, "")
    assert "cannot be kept as it is" in told
    assert "leave these settings out, or drop --strict" in told
    assert run("recipe", "convert", "-8", "--strict")[0] == 0
    (tmp_path / "mine.yaml").write_text("rules: []")
    for out in (toy, tmp_path / "mine.yaml", tmp_path):
        before = toy.read_text()
        status, said, _ = run("recipe", "convert", str(toy), "--out", str(out))
        assert (status, said) == (1, "")
        assert toy.read_text() == before
    assert run("recipe", "convert", str(toy), "--out", "")[0] == 2
    assert "there is no dialect" in run("recipe", "convert", "-8", "--from", "x")[2]


# Into other tools' words


MIXED = """
version: 1
rules:
  - {match: {modality: llm, role: [attn, mlp]}, weights: int4-g16, solver: rtn, weight_range: mse}
  - {match: {role: mlp.down, modality: llm}, weights: int8-channel, weight_range: minmax}
"""
SUFFIXES = {"llm-compressor": "yaml", "modelopt": "py", "mi-optimize": "yaml", "mquant": "txt"}


@pytest.mark.parametrize("dialect", SUFFIXES)
def test_a_recipe_is_written_for_another_tool_and_read_again(
    dialect: str, tiny: Callable[..., Path], tmp_path: Path, run: Cli
) -> None:
    mine, out = tmp_path / "mixed.yaml", tmp_path / f"theirs.{SUFFIXES[dialect]}"
    mine.write_text(MIXED)
    words = ["recipe", "convert", str(mine), "--to", dialect]
    for _ in range(2):  # An earlier one of its own is replaced.
        status, said, told = run(*words, "--out", str(out))
        assert (status, said) == (0, ""), told
    assert f"mixed was written as a recipe of {dialect}" in told
    assert "rules[1].weights" in told
    assert "guessed: names of layers are those of all known families" in told
    assert import_recipe(out.read_text().strip() if dialect == "mquant" else out).dialect == dialect
    status, said, told = run(*words, "--model", str(tiny("qwen3_vl")), "--json")
    assert status == 0, told
    exported = json.loads(said)["exported"]
    again = pq.export_recipe(mine, dialect, model=tiny("qwen3_vl"))
    assert exported == again.to_dict()
    assert not any("names of layers" in one for one in exported["guessed"])
    status, said, told = run(*words, "--strict")
    assert (status, said) == (1, "")
    assert f"{dialect} cannot say the recipe as it is" in told
    assert "rules[0].weight" in told


def test_names_of_a_model_are_its_own(tiny: Callable[..., Path], tmp_path: Path) -> None:
    mine = tmp_path / "mixed.yaml"
    mine.write_text(MIXED)
    known = pq.export_recipe(mine, "llm-compressor").text
    own = pq.export_recipe(mine, "llm-compressor", model=tiny("qwen2_vl")).text
    assert "model\\.layers" in known
    assert "model\\.layers" not in own


def test_a_recipe_may_be_turned_into_ours_by_name(run: Cli) -> None:
    words = ["recipe", "convert", "--from", "mquant", "--quant --quant_llm --llm_w_rtn"]
    assert run(*words, "--to", "prismquant") == run(*words)


def test_one_tools_recipe_becomes_anothers(tmp_path: Path, run: Cli) -> None:
    flags = "--quant --quant_llm --llm_w_bits 4 --llm_w_rtn --llm_a_bits 16"
    words = ["recipe", "convert", flags, "--to", "modelopt"]
    status, said, told = run(*words, "--json")
    assert status == 0, told
    both = json.loads(said)
    assert (both["dialect"], both["exported"]["dialect"]) == ("mquant", "modelopt")
    assert not both["dropped"]
    assert not both["exported"]["dropped"]
    (tmp_path / "theirs.py").write_text(run(*words)[1])
    assert import_recipe(tmp_path / "theirs.py").dialect == "modelopt"


def test_writing_for_another_tool_is_refused_with_a_remedy(tmp_path: Path, run: Cli) -> None:
    for words, said in (
        (["w4a16", "--to", "modelop"], "did you mean 'modelopt'?"),
        (["nvfp4", "--to", "mquant"], "it quantizes to integers of 2 to 8 bits"),
        (["w4a16", "--model", "x"], "give --to"),
        (["w4a16", "--to", "mquant", "--model", str(tmp_path)], "config.json"),
    ):
        status, out, told = run("recipe", "convert", *words)
        assert status != 0
        assert out == ""
        assert said in told
    (tmp_path / "mine.txt").write_text("my notes")
    words = ["w4a16", "--to", "mquant", "--out", str(tmp_path / "mine.txt")]
    assert run("recipe", "convert", *words)[0] == 1
    assert (tmp_path / "mine.txt").read_text() == "my notes"


def test_show_and_validate_take_other_tools_recipes(tmp_path: Path, run: Cli) -> None:
    (tmp_path / "toy.json").write_text(json.dumps(TOY))
    status, said, told = run("recipe", "show", str(tmp_path / "toy.json"))
    assert status == 0
    assert load_recipe(read_yaml(said)) == import_recipe(TOY).recipe
    assert "dropped: toy_speed" in told
    status, said, told = run("recipe", "validate", str(tmp_path / "toy.json"))
    assert (status, said) == (0, "toy: 2 rules, valid\n")
    assert "changed: toy_order" in told
