"""The engine: what each step sees, what comes out, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

import prismquant as pq
from prismquant.algorithms.methods import build_solver
from prismquant.algorithms.problem import LayerProblem
from prismquant.algorithms.rtn import RTN
from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.export.load_quantized import load_model
from prismquant.models.bind import bind
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor
from prismquant.numerics.ranges import RangeRule
from prismquant.runtime.linear import ActivationQuantizer, activations_in_float

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from prismquant.diagnostics.solver_diagnostics import StaticInputRange
    from prismquant.run.record import RunRecord

RECIPES = ("w8a8-static-all", "w4a16-all", "w4a8-static-all", "w3a16", "vision-w8a8-llm-w4a8")


def recipe(preset: str, solver: str = "gptq", **calibration: Any) -> pq.Recipe:
    chosen = pq.load_recipe(preset).without_transforms().with_rules({"solver": solver})
    return chosen.with_calibration(**({"batch_size": 4} | calibration))


def inputs_of(folder: Path, data: Path) -> list[dict[str, Any]]:
    ids = bind(folder).vision_token_ids
    samples = read_samples(data)
    batches = make_batches(samples, load_processor(folder), batch_size=4, vision_token_ids=ids)
    return [batch.inputs for batch in batches]


def inputs_seen(model: nn.Module, name: str, runs: list[dict[str, Any]]) -> torch.Tensor:
    """All counted rows that reach a layer of a whole model, [rows, in]."""
    layer, seen = model.get_submodule(name), []

    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows = args[0].reshape(-1, layer.in_features)  # type: ignore[arg-type]
        counted = run["attention_mask"].reshape(-1).bool()
        seen.append(rows[counted] if len(rows) == len(counted) else rows)

    handle = layer.register_forward_pre_hook(hook)
    with torch.no_grad():
        for run in runs:
            model(**run, use_cache=False)
    handle.remove()
    return torch.cat(seen)


def input_range_of(record: RunRecord, name: str) -> StaticInputRange:
    """The static range that a run has chosen for the input of a layer."""
    layers = {layer.name: layer for step in record.steps for layer in step.layers}
    found = layers[name].input_range
    assert found is not None
    return found


@pytest.mark.parametrize("solver", [pytest.param("rtn", marks=pytest.mark.slow), "gptq"])
@pytest.mark.parametrize(
    "preset", [*RECIPES[:3], *(pytest.param(one, marks=pytest.mark.slow) for one in RECIPES[3:])]
)
def test_every_family_goes_through_the_whole_pipeline(
    tiny_folder: Path, calibration_file: Path, tmp_path: Path, preset: str, solver: str
) -> None:
    """The result loads, and it is closer to the float model than a model of noise would be."""
    result = pq.quantize(tiny_folder, recipe(preset, solver), tmp_path / "out", calibration_file)
    assert result.record.finished
    names = [layer.name for step in result.record.steps for layer in step.layers]
    assert sorted(names) == sorted(row.site.name for row in result.plan.quantized)
    quantized, full = load_model(tmp_path / "out"), load_float(tiny_folder)
    run = inputs_of(tiny_folder, calibration_file)[0]
    counted = run["attention_mask"].bool()
    with torch.no_grad():
        difference = quantized(**run).logits[counted] - full(**run).logits[counted]
        assert difference.std() < 0.9 * full(**run).logits[counted].std()
        assert difference.abs().max() > 0


@pytest.mark.parametrize("stage", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_each_layer_is_solved_on_what_it_will_really_see(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path, stage: str
) -> None:
    """A late layer loses what a solve on inputs of the finished quantized model loses.

    That holds only if all layers before it, in earlier blocks and in its own, were already
    quantized, with their inputs, when its Hessian was gathered, and if padding was left out. A
    solve on the float model's inputs loses more.
    """
    folder, out = tiny("qwen2_vl"), tmp_path / "out"
    result = pq.quantize(folder, recipe("w4a8-static-all"), out, calibration_file)
    name = f"model.language_model.layers.1.{stage}"
    row = next(row for row in result.plan.rows if row.site.name == name)
    shared = [r for r in result.plan.rows if r.site.input_key == row.site.input_key]
    finished, full = load_model(out, dtype=torch.float32), load_float(folder)
    weights = {r.site.name: full.get_parameter(f"{r.site.name}.weight").detach() for r in shared}
    runs = inputs_of(folder, calibration_file)
    x = inputs_seen(finished, name, runs)
    x = finished.get_submodule(name).input_quantizer(x)  # type: ignore[operator, union-attr]

    def loss(values: torch.Tensor) -> float:
        return float(((values - weights[name]) @ x.T).square().sum())

    def solved_on(inputs: torch.Tensor) -> float:
        problem = LayerProblem(
            names=tuple(weights),
            weights=tuple(weights.values()),
            spec=row.config.weights,  # type: ignore[arg-type]
            range_rule=row.config.weight_range,
            scale_dtype=torch.float32,
            hessian=(inputs.T @ inputs) / len(inputs),
        )
        solved = build_solver(row.config.solver, row.config.options).solve(problem)
        return loss(solved.weights[list(weights).index(name)].dequantize(torch.float32))

    # Summation order differs, and a rounding on the edge may then fall the other way: codes would
    # not tell, as all later ones of a row follow it.
    lost = loss(finished.get_parameter(f"{name}.weight").detach())
    assert lost == pytest.approx(solved_on(x), rel=0.015)
    assert lost < 0.98 * solved_on(inputs_seen(full, name, runs))


def test_static_ranges_are_those_of_the_counted_tokens(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    folder, out = tiny("qwen2_vl"), tmp_path / "out"
    result = pq.quantize(folder, recipe("w8a8-static-all"), out, calibration_file)
    name = "model.language_model.layers.1.mlp.down_proj"
    finished = load_model(out, dtype=torch.float32)
    x = inputs_seen(finished, name, inputs_of(folder, calibration_file))
    seen = input_range_of(result.record, name)
    assert math.isclose(seen.low, float(x.min()), rel_tol=1e-4)
    assert math.isclose(seen.high, float(x.max()), rel_tol=1e-4)


def test_padding_changes_nothing(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """One sample at a time has no padding; all at once has much. The codes agree."""
    import tiny_vlm

    data = tiny_vlm.samples(tmp_path / "data", count=9, seed=3)
    results = []
    for batch_size in (1, 9):
        out = tmp_path / str(batch_size)
        pq.quantize(tiny("qwen2_vl"), recipe("w4a16", batch_size=batch_size), out, data)
        results.append(load_model(out, dtype=torch.float32).state_dict())
    for name, value in results[0].items():
        same = (value - results[1][name]).abs() <= 1e-6
        assert same.float().mean() > 0.98, name


def test_propagation_can_be_turned_off(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Without propagation a layer of the second block is solved on the float model's inputs."""
    folder = tiny("qwen2_vl")
    name = "model.language_model.layers.1.self_attn.q_proj"
    full = load_float(folder)
    x = inputs_seen(full, name, inputs_of(folder, calibration_file))
    ranges = {}
    for propagate in (False, True):
        out = tmp_path / str(propagate)
        chosen = recipe("w4a8-static", "rtn", block_sequential=propagate)
        result = pq.quantize(folder, chosen, out, calibration_file)
        ranges[propagate] = input_range_of(result.record, name).high
    assert math.isclose(ranges[False], float(x.max()), rel_tol=1e-5)
    assert not math.isclose(ranges[True], float(x.max()), rel_tol=1e-5)


def test_sequential_stages_can_be_turned_off(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """In one stage, the first block's last layer sees the float block's inputs."""
    folder = tiny("qwen2_vl")
    name = "model.language_model.layers.0.mlp.down_proj"
    x = inputs_seen(load_float(folder), name, inputs_of(folder, calibration_file))
    highs = {}
    for sequential in (False, True):
        out = tmp_path / str(sequential)
        chosen = recipe("w4a8-static", "rtn", layer_sequential=sequential)
        record = pq.quantize(folder, chosen, out, calibration_file).record
        highs[sequential] = input_range_of(record, name).high
    assert math.isclose(highs[False], float(x.max()), rel_tol=1e-5)
    assert not math.isclose(highs[True], float(x.max()), rel_tol=1e-5)


def test_rounding_without_data_equals_rounding_each_weight(
    tiny_folder: Path, tmp_path: Path
) -> None:
    chosen = pq.load_recipe("w4a16-all").with_rules({"solver": "rtn"})
    result = pq.quantize(tiny_folder, chosen, tmp_path / "out")
    full, quantized = load_float(tiny_folder), load_model(tmp_path / "out")
    for row in result.plan.quantized:
        weight = full.get_submodule(row.site.name).weight.detach()  # type: ignore[operator]
        matrix = weight.reshape(row.site.out_features, -1)
        problem = LayerProblem(
            ("w",),
            (matrix,),
            row.config.weights,
            RangeRule("mse"),
            torch.float32,  # type: ignore[arg-type]
        )
        expected = RTN().solve(problem).weights[0].dequantize(torch.float32)
        actual = quantized.get_submodule(row.site.name).weight.reshape(matrix.shape)  # type: ignore[operator]
        assert torch.equal(expected, actual), row.site.name


def test_what_the_recipe_leaves_alone_is_stored_bit_for_bit(
    tiny_folder: Path, calibration_file: Path, tmp_path: Path
) -> None:
    from prismquant.shards import ShardReader

    result = pq.quantize(tiny_folder, recipe("w4a16"), tmp_path / "out", calibration_file)
    before, after = ShardReader(tiny_folder), ShardReader(tmp_path / "out")
    touched = {f"{row.site.disk_name}.weight" for row in result.plan.quantized}
    assert before.names - touched <= after.names
    for name in before.names - touched:
        assert torch.equal(before.read(name), after.read(name)), name


def test_two_runs_give_the_same_bytes(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    for out in ("a", "b"):
        pq.quantize(tiny("qwen3_vl"), recipe("w4a8-all"), tmp_path / out, calibration_file)
    for path in sorted((tmp_path / "a").glob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_the_head_can_be_quantized_too(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Its input is the normed output of the last block."""
    folder, out = tiny("qwen2_vl"), tmp_path / "out"
    chosen = recipe("w4a16").with_rules(
        {"match": {"role": "lm_head"}, "weights": "int8-channel", "activations": "int8-tensor"}
    )
    record = pq.quantize(folder, chosen, out, calibration_file).record
    head = record.steps[-1].layers[0]
    finished = load_model(out, dtype=torch.float32)
    x = inputs_seen(finished, "lm_head", inputs_of(folder, calibration_file))
    assert head.name == "lm_head"
    assert math.isclose(input_range_of(record, "lm_head").high, float(x.max()), rel_tol=1e-4)
    assert isinstance(finished.lm_head.input_quantizer, ActivationQuantizer)


def test_gptq_lowers_every_layers_objective(
    tiny_folder: Path, calibration_file: Path, tmp_path: Path
) -> None:
    record = pq.quantize(tiny_folder, recipe("w4a16-all"), tmp_path / "o", calibration_file).record
    for step in record.steps:
        for layer in step.layers:
            assert layer.loss <= layer.baseline_loss, layer.name


def test_a_recipe_is_not_changed_by_a_run(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    chosen = recipe("w4a8-static-all")
    before = copy.deepcopy(chosen.to_dict())
    pq.quantize(tiny("qwen2_vl"), chosen, tmp_path / "out", calibration_file)
    assert chosen.to_dict() == before


def test_quantized_activations_can_be_kept_from_the_next_block(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """A second block then sees quantized weights before it, but inputs in floating point."""
    folder, out = tiny("qwen2_vl"), tmp_path / "out"
    name = "model.language_model.layers.1.self_attn.q_proj"
    chosen = recipe("w4a8-static", "rtn", quantized_inputs=False)
    record = pq.quantize(folder, chosen, out, calibration_file).record
    seen = input_range_of(record, name)
    finished = load_model(out, dtype=torch.float32)
    runs = inputs_of(folder, calibration_file)
    with activations_in_float(finished):
        in_float = inputs_seen(finished, name, runs)
    as_served = inputs_seen(finished, name, runs)
    assert math.isclose(seen.high, float(in_float.max()), rel_tol=1e-5)
    assert not math.isclose(seen.high, float(as_served.max()), rel_tol=1e-5)
