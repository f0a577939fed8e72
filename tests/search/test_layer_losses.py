"""Losses of layers as solvers give them in an analysis, and in a run of the recipe found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import prismquant as pq
from prismquant.recipe.schema import load_recipe
from prismquant.report.layer_predictions import compared_layers, comparison_table
from prismquant.report.run_files import RunFiles
from prismquant.search.predicted_layers import Predictor
from prismquant.search.sensitivity import FLOAT
from prismquant.search.sensitivity_file import read_sensitivity

if TYPE_CHECKING:
    from collections.abc import Callable

    from prismquant.search.sensitivity import Sensitivity

# What an analysis looks at: inputs of the float model.
_FLOAT_INPUTS = {"layer_sequential": False, "block_sequential": False}


def losses_of(found: Sensitivity, format_name: str) -> dict[str, float]:
    """Loss of each layer in a format, by its name."""
    return {
        layer.name: loss
        for unit in found.units
        for option in unit.options
        if option.format == format_name
        for layer, loss in zip(unit.layers, option.layer_losses, strict=True)
    }


@pytest.mark.parametrize("method", ["fisher", "kl_div", "gradient", "output", "weight"])
def test_an_analysis_keeps_the_losses_that_a_run_on_float_inputs_has(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path, method: str
) -> None:
    folder, rule = tiny("qwen2_vl"), {"weights": "int4-g32", "weight_range": "mse"}
    recipe = {"rules": [rule | {"solver": "gptq"}], "calibration": _FLOAT_INPUTS}
    run = pq.quantize(folder, recipe, tmp_path / "run", calibration_file, fallback=True)
    wanted = {layer.name: layer.loss for step in run.record.steps for layer in step.layers}
    found = pq.analyze(
        folder, "int4-g32,int8-channel", tmp_path / "s.json", calibration_file, method=method
    )
    assert losses_of(found, "int4-g32") == pytest.approx(wanted, rel=1e-2)
    assert len(wanted) > 20
    assert read_sensitivity(tmp_path / "s.json") == found
    options: list[Any] = [option for unit in found.units for option in unit.options]
    assert all(not option.layer_losses for option in options if option.format == FLOAT)


def test_a_file_of_version_1_is_read_without_losses_of_layers(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "s.json"
    found = pq.analyze(tiny("qwen2_vl"), "int4-g32", out, method="weight", solver="rtn")
    text = out.read_text()
    for option in (option for unit in found.units for option in unit.options[1:]):
        assert option.layer_losses
    content = json.loads(text) | {"version": 1}
    for unit in content["units"]:
        for option in unit["options"]:
            del option["layer_losses"]
    out.write_text(json.dumps(content))
    assert not any(o.layer_losses for unit in read_sensitivity(out).units for o in unit.options)


@pytest.fixture(scope="module")
def analyzed(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The file of a sensitivity of two formats."""
    out = tmp_path_factory.mktemp("analyzed") / "s.json"
    pq.analyze(tiny("qwen2_vl"), "int4-g32,int3-g32", out, calibration_file)
    return out


def found_recipe(file: Path, out: Path) -> Path:
    pq.find_mix(file, bits=7, out=out)
    return out


def test_a_run_on_float_inputs_measures_what_was_predicted(
    analyzed: Path, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(found_recipe(analyzed, tmp_path / "r.yaml"))
    recipe = recipe.with_calibration(**_FLOAT_INPUTS)
    result = pq.quantize(tiny("qwen2_vl"), recipe, tmp_path / "run", calibration_file)
    compared = compared_layers(result.record)
    assert {one.layer for one in compared} == {row.site.name for row in result.plan.quantized}
    assert [one.ratio for one in compared] == pytest.approx([1.0] * len(compared), rel=1e-2)
    # What was scored of the formats of the mix.
    found = read_sensitivity(analyzed)
    options = {(u.name, o.format): o for u in found.units for o in u.options}
    for one in compared:
        scores = options[one.unit, one.format].scores
        assert one.losses == {kind: score.loss for kind, score in scores.items()}


def test_a_run_compares_every_layer_with_its_prediction(
    analyzed: Path, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    recipe = found_recipe(analyzed, tmp_path / "r.yaml")
    result = pq.quantize(tiny("qwen2_vl"), recipe, tmp_path / "run", calibration_file)
    record = RunFiles.read(tmp_path / "run").record
    assert record == result.record
    assert not [note for note in result.notes if "not in the record" in note]
    measured = {layer.name: layer.loss for step in record.steps for layer in step.layers}
    compared = compared_layers(record)
    assert {one.layer: one.measured for one in compared} == measured
    assert all(one.ratio == one.measured / one.predicted for one in compared)
    ratios = [one.ratio or 0.0 for one in compared]
    assert ratios == sorted(ratios, reverse=True)
    # Errors of what comes before are in the inputs of what comes after.
    assert max(ratios) > 1.01
    table = comparison_table(record, most=5)
    assert table is not None
    assert table.row_count == 5
    assert [str(cell) for cell in table.columns[0].cells] == [one.layer for one in compared[:5]]


def test_the_sensitivity_is_found_beside_the_recipe(
    analyzed: Path, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    shutil.copy(analyzed, tmp_path / "work" / "s.json")
    monkeypatch.chdir(tmp_path / "work")
    found_recipe(Path("s.json"), Path("r.yaml"))
    (tmp_path / "work").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("moved/r.yaml")
    plan = pq.inspect(tiny("qwen2_vl"), recipe)
    predictions, notes = Predictor(recipe, "moved/r.yaml")(plan)
    assert predictions is not None
    assert notes == []
    assert Predictor(recipe)(plan)[0] is None
    assert (predictions.file, predictions.method, predictions.in_nats) == ("s.json", "fisher", True)


def test_predictions_that_are_missing_are_told(
    analyzed: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder, file = tiny("qwen2_vl"), tmp_path / "s.json"
    shutil.copy(analyzed, file)
    recipe = load_recipe(found_recipe(file, tmp_path / "r.yaml"))
    plan = pq.inspect(folder, recipe)
    # A format that was not analyzed, in a recipe that somebody has edited.
    name = "model.language_model.layers.0.mlp.down_proj"
    edited = recipe.with_rules({"match": {"name": name}, "weights": "int8-channel"})
    predictions, notes = Predictor(edited)(pq.inspect(folder, edited))
    assert predictions is not None
    assert name not in {unit.unit for unit in predictions.units}
    assert notes == [f"nothing is predicted of units whose formats were not analyzed: {name}"]
    text = file.read_text()
    file.write_text(f"{text} ")
    assert "or has changed since the search" in Predictor(recipe)(plan)[1][0]
    file.unlink()
    assert "is not there" in Predictor(recipe)(plan)[1][0]
    content = json.loads(text) | {"version": 1}
    for option in (option for unit in content["units"] for option in unit["options"]):
        del option["layer_losses"]
    file.write_text(json.dumps(content))
    recipe = load_recipe(found_recipe(file, tmp_path / "r.yaml"))
    assert "an earlier version wrote it" in Predictor(recipe)(plan)[1][0]
    plain = load_recipe("w4a16")
    assert Predictor(plain)(pq.inspect(folder, plain, fallback=True)) == (None, [])


def test_layers_that_are_rounded_without_statistics_are_not_compared(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder, file = tiny("qwen2_vl"), tmp_path / "s.json"
    pq.analyze(folder, "int4-g32", file, method="weight", solver="rtn")
    result = pq.quantize(folder, found_recipe(file, tmp_path / "r.yaml"), tmp_path / "run")
    assert result.record.predictions is not None
    assert result.record.predictions.in_nats is False
    assert compared_layers(result.record) == []
    assert comparison_table(result.record) is None
