"""Losses of layers as solvers give them in an analysis, and in a run of the recipe found."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import prismquant as pq
from prismquant.search.sensitivity import FLOAT
from prismquant.search.sensitivity_file import read_sensitivity

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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
