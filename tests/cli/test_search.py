"""The command ``search``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from sensitivities import made, of_model

import prismquant as pq
from prismquant.errors import ArgumentError, StorageError
from prismquant.models.bind import bind
from prismquant.opening import read_json
from prismquant.recipe.schema import load_recipe
from prismquant.search.sensitivity_file import write_sensitivity

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sensitivity of a model that does not exist."""
    write_sensitivity(tmp_path / "s.json", made(1))
    return tmp_path / "s.json"


def test_a_recipe_is_written_and_told(run: Cli, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    status, said, err = run("search", file, "--bits", "4.6", "--out", out)
    assert (status, err) == (0, f"written: {out}\n")
    assert "bits per weight" in said
    text = out.read_text()
    recipe = load_recipe(out)
    assert recipe.name == pq.find_mix(file, bits=4.6).recipe.name
    assert text.startswith("# Found by prismquant search ")
    for words in ("sha256", "method fisher, solver gptq", "total at most 4.6 bits", "predicted:"):
        assert words in text
    # The same again gives the same bytes, in the place of the earlier ones.
    assert run("search", file, "--bits", "4.6", "--out", out)[0] == 0
    assert out.read_text() == text


def test_json_is_one_object_with_all_that_was_found(run: Cli, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    status, said, err = run("search", file, "--size", "2MB", "--out", out, "--json")
    assert (status, err) == (0, "")
    assert said.count("\n") == 1
    found = json.loads(said)
    assert found["stored_bytes"] <= 2_000_000
    assert found["out"] == str(out)
    assert set(found["formats"]) == {unit.name for unit in made(1).units}
    assert sum(found["units"].values()) == len(found["formats"])
    assert found["gap"] <= 1e-6 * found["loss"]


def test_without_a_file_the_recipe_is_printed(run: Cli, file: Path) -> None:
    status, said, _ = run("search", file, "--bits", "5")
    assert status == 0
    text = said[said.index("# Found by") :]
    assert yaml.safe_load(text)["rules"]


def test_the_front_is_a_folder_of_recipes(run: Cli, file: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "front", tmp_path / "recipe.yaml"
    status, said, _ = run("search", file, "--pareto", folder, "--points", "6", "--out", out)
    assert status == 0
    assert "knee" in said
    front = read_json(folder / "front.json")
    knee = front["points"][front["knee"]]
    # Without a bound the mix at the knee is the one that is found.
    assert load_recipe(out) == load_recipe(folder / knee["recipe"])
    assert front["points"][-1]["recipe"] is None
    for point in front["points"][:-1]:
        found = pq.find_mix(file, size=point["stored_bytes"])
        assert found.mix.stored_bytes == point["stored_bytes"]
        assert load_recipe(folder / point["recipe"]) == found.recipe
    assert (folder / "front.svg").read_text().startswith("<svg")
    status, said, err = run("search", file, "--pareto", folder)
    assert (status, said) == (1, "")
    assert "choose another folder for --pareto" in err


def test_a_front_without_a_recipe_is_not_written(run: Cli, file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "front"
    status, said, err = run("search", file, "--pareto", folder, "--max-loss", "0")
    assert (status, said) == (1, "")
    assert "leaves everything alone" in err
    assert not folder.exists()
    # Of two points, that with a recipe is taken.
    assert run("search", file, "--pareto", folder, "--points", "2")[0] == 0
    front = read_json(folder / "front.json")
    assert [point["recipe"] for point in front["points"]] == ["point-000.yaml", None]
    assert front["knee"] == 0


def test_an_infeasible_budget_says_the_least_that_can_be(
    run: Cli, file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "recipe.yaml"
    status, said, err = run("search", file, "--bits", "1", "--out", out)
    assert (status, said) == (1, "")
    assert "the least size is" in err
    assert "held there by" in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "nothing bounds the mix"),
        (["--bits", "4", "--size", "1MB"], "both given"),
        (["--weight", "answer=1"], "nothing bounds the mix"),
        (["--bits", "5", "--points", "9"], "points does nothing without --pareto"),
        (["--bits", "5", "--swaps", "0"], "swaps does nothing without --verify"),
        (["--bits", "5", "--model", "m"], "model does nothing without --verify"),
        (["--bits", "5", "--calib", "c.jsonl"], "calibration does nothing without --verify"),
        (["--bits", "5", "--out", "-"], "name a file or folder, ./- if it is called so"),
        (["--bits", "5", "--cap", ""], "no modality is named"),
        (
            ["--bits", "5", "--cap", "vision=abc"],
            "write --cap vision=4.5 for bits, or --cap vision=500MB",
        ),
    ],
)
def test_what_does_not_go_together(run: Cli, file: Path, words: list[str], told: str) -> None:
    status, said, err = run("search", file, *words)
    assert (status, said) == (2, "")
    assert told in err


def test_a_file_of_something_else_stays_as_it_is(run: Cli, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("rules: []\n")
    status, _, err = run("search", file, "--bits", "5", "--out", out)
    assert status == 1
    assert "not an earlier result" in err
    assert out.read_text() == "rules: []\n"
    status, _, err = run("search", file, "--bits", "5", "--out", file)
    assert status == 1
    assert "the command reads" in err
    status, _, err = run("search", tmp_path / "none.json", "--bits", "5")
    assert status == 1
    assert "none.json is missing" in err


def test_the_function_refuses_what_the_command_refuses(file: Path, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {},
        {"bits": 4, "points": 1},
        {"bits": "4x"},
        {"bits": 4, "out": ""},
        {"bit": 4},
        {"bits": 4, "weight": 5},
        {"bits": 4, "weight": [5]},
        {"bits": 4, "cap": 5},
        {"bits": 4, "floor": object()},
    ]
    for arguments in wrong:
        with pytest.raises(ArgumentError):
            pq.find_mix(file, **arguments)
    with pytest.raises(StorageError):
        pq.find_mix(tmp_path, bits=4)


def test_a_mix_is_verified_on_data(
    run: Cli, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    found = replace(of_model(bind(tiny("qwen2_vl")), 5, "int4-g32,int8-channel"), solver="rtn")
    write_sensitivity(tmp_path / "s.json", found)
    words = ("search", tmp_path / "s.json", "--cap", "llm=6", "--verify", calibration_file)
    status, said, _ = run(*words, "--swaps", "1", "--out", tmp_path / "r.yaml")
    assert status == 0
    assert "the mix as found" in said
    status, said, _ = run(*words, "--swaps", "0", "--json")
    assert status == 0
    verified = json.loads(said)["verified"]
    assert verified["swaps"] == []
    assert verified["first"] == verified["last"]
    assert verified["first"]["losses"]["answer"]["loss"] > 0


def test_a_run_shows_layers_beside_their_predictions(
    run: Cli, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    folder, file, recipe = tiny("qwen2_vl"), tmp_path / "s.json", tmp_path / "r.yaml"
    pq.analyze(folder, "int4-g32,int8-channel", file, calibration_file)
    assert run("search", file, "--bits", "8", "--out", recipe)[0] == 0
    words = ("quantize", folder, "--recipe", recipe, "--calib", calibration_file, "--threads", "1")
    status, _, err = run(*words, "--out", tmp_path / "shown")
    assert status == 0
    assert "measured against predicted by the analysis, the 8 largest of " in err
    status, said, _ = run(*words, "--out", tmp_path / "json", "--json")
    assert status == 0
    told = json.loads(said)
    layers = [layer for step in told["record"]["steps"] for layer in step["layers"]]
    assert {one["layer"]: one["measured"] for one in told["compared"]} == {
        layer["name"]: layer["loss"] for layer in layers
    }
