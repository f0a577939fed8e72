"""Transforms in the engine: the float function stays, and what is written is what was simulated."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch

import prismquant as pq
from prismquant.algorithms.base import LayerProblem, LayerResult
from prismquant.export.load import load_model
from prismquant.models.bind import bind
from prismquant.models.config import empty_model
from prismquant.models.load import load_float, load_processor, materialize
from prismquant.pipeline import group
from prismquant.pipeline.batches import Batch, make_batches
from prismquant.pipeline.data import read_samples
from prismquant.pipeline.engine import Run, run, source_reader
from prismquant.pipeline.plan import make_plan
from prismquant.runtime.quant_linear import QuantLinear, rotate_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from prismquant.models.bind import BoundModel, BoundStep
    from prismquant.pipeline.checkpoint import EdgeRecord
    from prismquant.pipeline.group import SolvedLayer
    from prismquant.pipeline.plan import Plan

EVERYTHING = {"weights": "int4-g16", "solver": "rtn", "weight_range": "minmax"}
SMOOTH = {"name": "smoothquant", "options": {"alpha": 0.6, "search": False}}
AWQ = {"name": "awq", "options": {"grid": 4}}
ROTATION = {"name": "rotation"}
ONLINE = {"name": "rotation", "options": {"online": True}}
COMBINATIONS: dict[str, list[dict[str, Any]]] = {
    "rotation": [ROTATION],
    "online rotation": [ONLINE],
    "online rotation without signs": [
        {"name": "rotation", "options": {"online": True, "signs": False, "online_block": 32}}
    ],
    "smoothquant": [SMOOTH],
    "awq": [AWQ],
    "smoothquant, then awq": [SMOOTH, AWQ],
    "rotation and smoothquant": [SMOOTH, ROTATION],
    "online rotation, smoothquant, awq": [ONLINE, SMOOTH, AWQ],
}


bound_to = functools.cache(bind)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a picture and a clip."""
    return tiny_vlm.samples(tmp_path_factory.mktemp("three"), count=3)


@functools.cache
def batches_of(folder: Path, data: Path) -> list[Batch]:
    """As a run with the settings by default makes them: one batch, with padding."""
    ids = bound_to(folder).vision_token_ids
    processor = load_processor(folder)
    return list(make_batches(read_samples(data), processor, batch_size=8, vision_token_ids=ids))


@torch.no_grad()
def logits(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Logits of all counted tokens."""
    found = []
    for batch in batches:
        result = model(**batch.inputs, use_cache=False).logits
        found.append(result[batch.inputs["attention_mask"].bool()].float())
    return torch.cat(found)


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference, in units of the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


class Kept:
    """A weight that was not rounded."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.values.to(dtype)


class Exact:
    """A solver that rounds nothing, so that only what transforms do is left."""

    name = "rtn"
    needs_hessian = False

    def solve(self, problem: LayerProblem) -> LayerResult:
        kept: Any = tuple(Kept(weight) for weight in problem.weights)
        zeros = (0.0,) * len(kept)
        return LayerResult(kept, zeros, zeros)


class Memory:
    """A sink that keeps tensors as they are, by module name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def write_step(
        self, step: BoundStep, layers: Sequence[SolvedLayer], changed: Mapping[str, Tensor]
    ) -> str:
        for layer in layers:
            values = layer.values(torch.float32).reshape(layer.row.site.weight_shape)
            self.tensors[f"{layer.row.site.name}.weight"] = values
        self.tensors |= changed
        return step.name


def unrounded(
    bound: BoundModel,
    batches: Sequence[Batch],
    recipe: pq.Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[nn.Module, Plan, list[EdgeRecord]]:
    """The model after the engine did everything but rounding, the plan, and the edges' records."""
    plan, sink = make_plan(recipe, bound), Memory()
    monkeypatch.setattr(group, "build_solver", lambda *_: Exact())
    job = Run(plan=plan, bound=bound, batches=batches, sink=sink)  # type: ignore[arg-type]
    edges = [edge for step in run(job) for edge in step.edges]
    model = empty_model(bound.config, bound.arch)
    materialize(model, "", source_reader(plan, bound), bound.names, "cpu", torch.float32)
    for name, tensor in sink.tensors.items():
        owner, _, leaf = name.rpartition(".")
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        assert parameter.shape == model.get_parameter(name).shape, name
        setattr(model.get_submodule(owner), leaf, parameter)
    for row in plan.rows:
        if row.online is not None:
            rotate_inputs(model, row.site.name, row.online.block, row.online.signs)
    return model, plan, edges


# The first three on every family, the others on one.
PAIRS = [
    (family, name)
    for name in COMBINATIONS
    for family in tiny_vlm.FAMILIES
    if name in ("online rotation", "smoothquant", "online rotation, smoothquant, awq")
    or family == "qwen2_5_vl"
]


@pytest.mark.parametrize(("family", "combination"), PAIRS)
def test_without_rounding_the_function_stays(
    family: str,
    combination: str,
    tiny: Callable[..., Path],
    three: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every layer of every modality takes part, from the patch embedding to the head."""
    transforms, folder = COMBINATIONS[combination], tiny(family)
    bound, batches = bound_to(folder), batches_of(folder, three)
    recipe = pq.load_recipe({"rules": [EVERYTHING], "transforms": transforms})
    model, plan, edges = unrounded(bound, batches, recipe, monkeypatch)
    full = load_float(folder)
    assert apart(logits(model, batches), logits(full, batches)) < 2e-5
    before = dict(full.named_parameters())
    moved = [n for n, p in model.named_parameters() if (p - before[n]).abs().max() > 1e-3]
    assert len(moved) > 10
    assert len(edges) == len(plan.edges)
    skipped = [e for e in edges if e.equalizer == "smoothquant" and "skipped" in e.notes]
    assert not skipped
    if transforms == [SMOOTH]:
        assert {edge.source for edge in edges} == {edge.source for edge in bound.edges}


# What is loaded is what was simulated


def recipe_of(
    *rules: dict[str, Any], transforms: Sequence[dict[str, Any]] = (), **calibration: Any
) -> pq.Recipe:
    return pq.load_recipe(
        {"rules": list(rules), "transforms": list(transforms), "calibration": calibration}
    )


def ranges_seen(model: nn.Module, batches: Sequence[Batch]) -> dict[str, tuple[float, float]]:
    """Range of the counted inputs of every layer, as its quantizer sees them."""
    found: dict[str, tuple[float, float]] = {}

    def watch(name: str, layer: QuantLinear) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = layer.rotated(args[0]).reshape(-1, layer.in_features)
            if layer.input_quantizer is not None and layer.input_quantizer.columns is not None:
                rows = rows.index_fill(1, layer.input_quantizer.columns, 0.0)
            counted = mask.reshape(-1).bool()
            rows = rows[counted] if len(rows) == len(counted) else rows
            low, high = found.get(name, (math.inf, -math.inf))
            found[name] = (min(low, float(rows.min())), max(high, float(rows.max())))

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantLinear)]
    handles = [m.register_forward_pre_hook(watch(n, m)) for n, m in layers]
    for batch in batches:
        mask = batch.inputs["attention_mask"]
        with torch.no_grad():
            model(**batch.inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


STATIC = {"weights": "int8-channel", "activations": "int8-tensor", "weight_range": "minmax"}
NO_CONV = {"match": {"role": "patch_embed"}, "activations": "none"}


@pytest.mark.parametrize("correction", ["none", "auto"])
def test_every_layer_of_the_loaded_model_sees_what_it_was_calibrated_on(
    tiny_folder: Path, three: Path, tmp_path: Path, correction: str
) -> None:
    """With everything at once: rotations, signs, scales, split columns, corrections, tuning."""
    rules = [
        STATIC,
        NO_CONV,
        {"correction": correction},
        {"match": {"modality": "projector"}, "tuner": "autoround"},
        {"tuner_options": {"iterations": 2, "settle": 1}},
    ]
    transforms = [
        ONLINE,
        SMOOTH,
        {"name": "split", "match": {"role": "mlp.down"}, "options": {"threshold": 1.01}},
    ]
    recipe = recipe_of(*rules, transforms=transforms)
    result = pq.quantize(tiny_folder, recipe, tmp_path / "out", three)
    seen = ranges_seen(load_model(tmp_path / "out"), batches_of(tiny_folder, three))
    layers = [layer for step in result.record.steps for layer in step.layers]
    noted = {layer.name: layer.notes for layer in layers if "input_low" in layer.notes}
    assert noted.keys() == seen.keys()
    assert len(seen) == len(layers) - 1
    assert [layer.name for layer in layers if "split_columns" in layer.notes]
    assert [layer.name for layer in layers if "block_loss" in layer.notes]
    for name, notes in noted.items():
        assert seen[name] == pytest.approx((notes["input_low"], notes["input_high"]), rel=2e-3), name
