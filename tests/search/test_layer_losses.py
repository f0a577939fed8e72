"""Losses of layers as solvers give them in an analysis, and in a run of the recipe found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import prismquant as pq
from prismquant.quantization.prepare import source_files
from prismquant.recipe.adapt import adapted, why_unpredicted
from prismquant.recipe.schema import load_recipe
from prismquant.report.layer_predictions import compared_layers, comparison_table
from prismquant.report.run_files import RunFiles
from prismquant.run.fingerprint import stamp_files
from prismquant.run.identity import Identity
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
@pytest.mark.slow
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


def run_of(folder: Path, samples: tuple[str, ...] = ()) -> Identity:
    """Identity of a run of a model on samples of these fingerprints."""
    files = stamp_files(folder, source_files(folder))
    return Identity("", files, samples, inputs="", arithmetic="", versions={})


def with_other_weights(folder: Path, out: Path) -> Path:
    """A copy of a checkpoint, of which one byte of one weight differs."""
    shutil.copytree(folder, out)
    shard = next(out.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
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
    assert str(table.title).endswith(", on the samples of the analysis")
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
    folder = tiny("qwen2_vl")
    plan, run = pq.inspect(folder, recipe), run_of(folder)
    predictions, notes = Predictor(recipe, "moved/r.yaml")(plan, run)
    assert predictions is not None
    assert notes == []
    lost, notes = Predictor(recipe)(plan, run)
    assert lost is None
    assert notes[0].endswith("s.json is not there: it was looked for at s.json")
    assert (predictions.file, predictions.method, predictions.in_nats) == ("s.json", "fisher", True)


def test_predictions_that_are_missing_are_told(
    analyzed: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder, file = tiny("qwen2_vl"), tmp_path / "s.json"
    shutil.copy(analyzed, file)
    recipe = load_recipe(found_recipe(file, tmp_path / "r.yaml"))
    plan, run = pq.inspect(folder, recipe), run_of(folder)
    # A format that was not analyzed, in a recipe that somebody has edited.
    name = "model.language_model.layers.0.mlp.down_proj"
    edited = recipe.with_rules({"match": {"name": name}, "weights": "int8-channel"})
    predictions, notes = Predictor(edited)(pq.inspect(folder, edited), run)
    assert predictions is not None
    assert name not in {unit.unit for unit in predictions.units}
    assert notes == [
        "nothing is predicted of units that were not analyzed in their formats by their solver "
        f"(the analysis had gptq): {name}"
    ]
    text = file.read_text()
    file.write_text(f"{text} ")
    changed = f"{file} has changed since the search: its checksum is another"
    assert Predictor(recipe)(plan, run)[1][0].endswith(changed)
    file.unlink()
    nowhere = f"is not there: it was looked for at {file}, {tmp_path.parent / 's.json'}"
    assert Predictor(recipe, tmp_path / "r.yaml")(plan, run)[1][0].endswith(nowhere)
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / file.name).write_text("another")
    (note,) = Predictor(recipe, beside / "r.yaml")(plan, run)[1]
    assert f"{file} is not there: " in note
    assert note.endswith(f"; {beside / file.name} has another checksum")
    content = json.loads(text) | {"version": 1}
    for option in (option for unit in content["units"] for option in unit["options"]):
        del option["layer_losses"]
    file.write_text(json.dumps(content))
    recipe = load_recipe(found_recipe(file, tmp_path / "r.yaml"))
    assert "an earlier version wrote it" in Predictor(recipe)(plan, run)[1][0]
    plain = load_recipe("w4a16")
    assert Predictor(plain)(pq.inspect(folder, plain, fallback=True), run) == (None, [])


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


def test_an_analysis_of_other_weights_or_samples_is_told(
    analyzed: Path, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    folder, recipe = tiny("qwen2_vl"), load_recipe(found_recipe(analyzed, tmp_path / "r.yaml"))
    plan = pq.inspect(folder, recipe)
    shutil.copytree(folder, tmp_path / "copy")
    predictions, notes = Predictor(recipe)(plan, run_of(tmp_path / "copy"))
    assert predictions is not None
    assert (predictions.same_files, predictions.same_samples, notes) == (True, None, [])
    other = with_other_weights(folder, tmp_path / "other")
    told = f"is of another model: that of {folder}, whose files differ from this one's"
    result = pq.quantize(other, recipe, tmp_path / "run", calibration_file, samples=4)
    assert [note for note in result.notes if note.endswith(told)]
    assert [note for note in result.notes if "compared with an analysis on other samples" in note]
    record = RunFiles.read(tmp_path / "run").record
    assert record.predictions is not None
    assert (record.predictions.same_files, record.predictions.same_samples) == (False, False)
    table = comparison_table(record)
    assert table is not None
    ending = ", on other samples than the analysis, which was of a model with other files"
    assert str(table.title).endswith(ending)


def test_a_prediction_of_another_solver_or_cache_is_left_out(
    analyzed: Path, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    folder, recipe = tiny("qwen2_vl"), found_recipe(analyzed, tmp_path / "r.yaml")
    result = pq.quantize(folder, recipe, tmp_path / "rtn", calibration_file, solver="rtn")
    left = "the KL divergence that a search predicted is left out: "
    assert f"{left}it is of gptq, and rtn was asked for" in result.notes
    assert not any("a search predicted a KL" in note for note in result.notes)
    assert any("(the analysis had gptq)" in note for note in result.notes)
    assert comparison_table(result.record) is None
    assert load_recipe(tmp_path / "rtn" / "prismquant" / "recipe.yaml").predicted is None
    before = load_recipe(recipe)
    reasons = [
        why_unpredicted(before, adapted(before, solver="gptq", fallback=True)),
        why_unpredicted(before, adapted(before, kv_cache="none")),
        why_unpredicted(before, adapted(before, kv_cache="fp8")),
    ]
    cache = "it is of the recipe's own key-value cache, and another was asked for"
    assert reasons == ["", "", cache]


def test_a_prediction_of_formats_that_do_not_fit_is_left_out(
    analyzed: Path, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(found_recipe(analyzed, tmp_path / "r.yaml"))
    name = "model.language_model.layers.0.mlp.down_proj"
    wide = recipe.with_rules({"match": {"name": name}, "weights": "int4-g96"})
    for number, (one, left_out) in enumerate([(recipe, False), (wide, True)]):
        out = tmp_path / str(number)
        result = pq.quantize(tiny("qwen2_vl"), one, out, calibration_file, fallback=True)
        said = any("its formats do not fit 1 of the layers" in n for n in result.notes)
        assert said is left_out
        assert any("a search predicted a KL" in n for n in result.notes) is not left_out
