"""Transforms in the engine: the float function stays, and what is written is what was simulated."""

from __future__ import annotations

import functools
import math
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch

import prismquant as pq
from prismquant.algorithms.methods import build_solver
from prismquant.algorithms.problem import LayerProblem, LayerResult
from prismquant.data import read_samples
from prismquant.data.batches import Batch, make_batches
from prismquant.diagnostics.solver_diagnostics import RTNDiagnostics
from prismquant.engine import group, quantize
from prismquant.engine.run import run
from prismquant.engine.setup import RunSetup
from prismquant.errors import DataError
from prismquant.export.load_quantized import load_model
from prismquant.models.bind import bind
from prismquant.models.config import import_transformers
from prismquant.models.float_model import load_float
from prismquant.models.load import empty_model, materialize
from prismquant.models.processor import load_processor
from prismquant.opening import read_json
from prismquant.plan.make_plan import make_plan
from prismquant.plan.source import source_reader
from prismquant.runtime.input_rotation import rotate_inputs
from prismquant.runtime.linear import QuantLinear
from prismquant.shards import ShardReader
from prismquant.storage import write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from prismquant.diagnostics.step_record import EdgeRecord
    from prismquant.formats.quantized_layer import QuantizedLayer
    from prismquant.models.bound import BoundModel, BoundStep
    from prismquant.plan.plan import Plan

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
    statistics = ()

    def solve(self, problem: LayerProblem) -> LayerResult:
        kept: Any = tuple(Kept(weight) for weight in problem.weights)
        zeros = (0.0,) * len(kept)
        return LayerResult(kept, zeros, zeros, RTNDiagnostics())


class Memory:
    """A sink that keeps tensors as they are, by module name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def write_step(
        self, step: BoundStep, layers: Sequence[QuantizedLayer], changed: Mapping[str, Tensor]
    ) -> str:
        for layer in layers:
            site = next(site for site in step.sites if site.name == layer.name)
            values = layer.values(torch.float32).reshape(site.weight_shape)
            self.tensors[f"{layer.name}.weight"] = values
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
    monkeypatch.setattr(quantize, "is_rounded", lambda _: False)
    monkeypatch.setattr(group, "build_solver", lambda *_: Exact())
    setup = RunSetup(plan=plan, bound=bound, batches=batches, sink=sink)  # type: ignore[arg-type]
    edges = [edge for step in run(setup) for edge in step.edges]
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
    skipped = [e for e in edges if e.transform == "smoothquant" and e.diagnostics.skipped]
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


def test_every_layer_of_the_loaded_model_sees_what_it_was_calibrated_on(
    tiny_folder: Path, three: Path, tmp_path: Path
) -> None:
    """With everything at once: rotations, signs, scales, split columns, corrections, tuning."""
    rules = [
        STATIC,
        NO_CONV,
        {"correction": "auto"},
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
    noted = {layer.name: layer for layer in layers if layer.input_range}
    assert noted.keys() == seen.keys()
    assert len(seen) == len(layers) - 1
    assert [layer.name for layer in layers if layer.split_columns]
    assert [layer.name for layer in layers if layer.tuning]
    for name, layer in noted.items():
        # A tuner moves the codes of a whole step, after the ranges inside it were chosen.
        if layer.tuning and bound_to(tiny_folder).site(name).stage > 0:
            continue
        expected = layer.input_range.low, layer.input_range.high
        assert seen[name] == pytest.approx(expected, rel=2e-3), name


@pytest.mark.parametrize("rotated", [False, True])
def test_the_codes_are_those_of_the_transformed_weights(
    tiny: Callable[..., Path], three: Path, tmp_path: Path, rotated: bool
) -> None:
    """The scale is read off the norm on disk; the rest is computed again from the source."""
    folder, out = tiny("qwen2_vl"), tmp_path / "out"
    rules = [{"weights": "int4-g32", "activations": "int8-token"}, NO_CONV]
    smooth = SMOOTH | {"match": {"role": ["attn.qkv", "mlp.up"]}}
    recipe = recipe_of(*rules, transforms=[ROTATION, smooth] if rotated else [smooth])
    result = pq.quantize(folder, recipe, out, three)
    bound, finished = bound_to(folder), load_model(out)
    source = source_reader(result.plan, bound)
    norm = "model.language_model.layers.1.post_attention_layernorm.weight"
    scale = source.read(bound.names.to_disk(norm)) / finished.get_parameter(norm)
    assert scale.max() / scale.min() > 1.5
    rows = [row for row in result.plan.rows if row.site.name.startswith(norm[:30])]
    rows = [row for row in rows if row.site.role in ("mlp.gate", "mlp.up")]
    names = [row.site.name for row in rows if ".layers.1." in row.site.name]
    assert len(names) == 2
    x = inputs_of(finished, names[0], batches_of(folder, three))
    weights = [source.read(f"{bound.names.to_disk(f'{name}.weight')}") * scale for name in names]
    problem = LayerProblem(
        names=tuple(names),
        weights=tuple(weights),
        spec=rows[0].config.weights,  # type: ignore[arg-type]
        range_rule=rows[0].config.weight_range,
        scale_dtype=torch.float32,
        hessian=(x.T @ x) / len(x),
    )
    solved = build_solver(rows[0].config.solver, rows[0].config.options).solve(problem)
    records = [layer for step in result.record.steps for layer in step.layers]
    for name, weight, loss in zip(names, solved.weights, solved.losses, strict=True):
        actual = finished.get_submodule(name).weight
        # Summation order differs, and a rounding on the edge may then fall the other way.
        agreeing = (weight.dequantize(torch.float32) - actual).abs() < 1e-5  # type: ignore[operator]
        assert agreeing.float().mean() > 0.97
        recorded = next(layer.loss for layer in records if layer.name == name)
        assert recorded == pytest.approx(loss, rel=0.02)


def inputs_of(model: nn.Module, name: str, batches: Sequence[Batch]) -> Tensor:
    """Counted inputs of a layer, quantized as it sees them, [rows, in]."""
    layer, found = model.get_submodule(name), []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1])
        counted = mask.reshape(-1).bool()
        found.append(rows[counted] if len(rows) == len(counted) else rows)

    handle = layer.register_forward_pre_hook(hook)
    for batch in batches:
        mask = batch.inputs["attention_mask"]
        with torch.no_grad():
            model(**batch.inputs, use_cache=False)
    handle.remove()
    x = torch.cat(found)
    quantizer: Any = getattr(layer, "input_quantizer", None)
    return x if quantizer is None else quantizer(layer.rotated(x))  # type: ignore[operator]


PORTABLE = {
    "smoothquant": [SMOOTH],
    "rotation and awq": [ROTATION, AWQ],
}


@pytest.mark.parametrize("transforms", PORTABLE.values(), ids=PORTABLE)
def test_transformers_gives_our_logits(
    tiny_folder: Path, three: Path, tmp_path: Path, transforms: list[dict[str, Any]]
) -> None:
    """What lives in the weights alone needs nothing of the reader."""
    rules = [{"weights": "int4-g16", "solver": "rtn"}, STATIC_LLM, NO_CONV]
    out, batches = tmp_path / "out", batches_of(tiny_folder, three)
    result = pq.quantize(tiny_folder, recipe_of(*rules, transforms=transforms), out, three)
    assert not result.plan.remarks
    assert [e for step in result.record.steps for e in step.edges if not e.diagnostics.skipped]
    ours, full = logits(load_model(out), batches), logits(load_float(tiny_folder), batches)
    assert apart(logits(from_transformers(out), batches), ours) < 1e-4
    assert 1e-3 < apart(ours, full) < 0.7


STATIC_LLM = {"match": {"modality": "llm"}, "weights": "int8-channel", "activations": "int8-tensor"}


def from_transformers(folder: Path) -> nn.Module:
    auto = import_transformers().AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@pytest.mark.parametrize("head", ["float", "int8"])
def test_a_tied_head_becomes_a_weight_of_its_own(
    family: str, tiny: Callable[..., Path], three: Path, tmp_path: Path, head: str
) -> None:
    """The head takes the last norm's scale, which the embedding must not have."""
    folder, out = tiny(family, tie=True), tmp_path / "out"
    few = {"modality": "llm", "role": "attn.out"}
    rules: list[dict[str, Any]] = [{"match": few, "weights": "int8-g32", "solver": "rtn"}]
    if head == "int8":
        rules += [{"match": {"role": "lm_head"}, "weights": "int8-channel", "solver": "rtn"}]
    plan = pq.quantize(folder, recipe_of(*rules, transforms=[ROTATION]), out).plan
    config, reader = read_json(out / "config.json"), ShardReader(out)
    assert config["tie_word_embeddings"] is False
    assert config.get("text_config", {}).get("tie_word_embeddings") in (False, None)
    stem = "weight" if head == "float" else "weight_packed"
    bound = bound_to(folder)
    disk = bound.names.to_disk("lm_head.weight").removesuffix("weight")
    assert f"{disk}{stem}" in reader.names
    assert bound.names.to_disk(f"{bound.arch.embeddings}.weight") in reader.names
    assert sum(reader.info(name).nbytes for name in reader.names) == plan.total_bytes
    batches = batches_of(folder, three)
    model, full = load_model(out), logits(load_float(folder), batches)
    assert apart(logits(from_transformers(out), batches), logits(model, batches)) < 1e-4
    # All else that was written computes the float function.
    source = source_reader(plan, bound)
    for row in plan.quantized:
        values = source.read(bound.names.to_disk(f"{row.site.name}.weight"))
        assert 1e-4 < apart(model.get_parameter(f"{row.site.name}.weight"), values) < 0.01
        model.get_parameter(f"{row.site.name}.weight").data = values
    assert apart(logits(model, batches), full) < 2e-5


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2_vl", {"layout": "old"}),
        ("qwen2_5_vl", {"layout": "native", "tie": True}),
        ("video_llama_3", {"layout": "remote"}),
        ("video_llama_3", {"layout": "remote", "tie": True}),
    ],
)
def test_names_on_disk_stay_the_sources(
    family: str, options: dict[str, Any], tiny: Callable[..., Path], three: Path, tmp_path: Path
) -> None:
    """Nothing is written under a second name, and each tensor that changed is found again."""
    folder, out = tiny(family, **options), tmp_path / "out"
    rules = [{"weights": "int8-g16", "solver": "rtn", "weight_range": "minmax"}]
    pq.quantize(folder, recipe_of(*rules, transforms=[ONLINE, SMOOTH]), out, three)
    bound, reader = bound_to(folder), ShardReader(out)
    before = {name.removesuffix(".weight") for name in ShardReader(folder).names}
    before.add(bound.names.to_disk("lm_head.weight").removesuffix(".weight"))
    beside = r"[.](weight(_\w+)?|input_signs|hadamard_\d+_input[.]weight)$"
    after = {re.sub(beside, "", name) for name in reader.names}
    assert after == before
    batches = batches_of(tiny(family), three)
    full = logits(load_float(folder), batches)
    assert apart(logits(load_model(out), batches), full) < 0.1


def test_a_checkpoint_of_two_types_keeps_both(
    tiny: Callable[..., Path], three: Path, tmp_path: Path
) -> None:
    """Norms in float32 stay so when scale is moved into them."""
    folder, out = tmp_path / "mixed", tmp_path / "out"
    shutil.copytree(tiny("qwen2_vl", dtype=torch.bfloat16), folder)
    reader = ShardReader(folder)
    tensors = {name: reader.read(name) for name in reader.names}
    wide = {name for name in tensors if "norm" in name or "ln_q" in name}
    tensors = {n: t.float() if n in wide else t for n, t in tensors.items()}
    write_tensors(folder / "model.safetensors", tensors)
    recipe = recipe_of({"weights": "int8-g16", "solver": "rtn"}, transforms=[SMOOTH])
    plan = pq.quantize(folder, recipe, out, three).plan
    after = ShardReader(out)
    assert {after.info(name).dtype for name in wide} == {torch.float32}
    assert sum(after.info(name).nbytes for name in after.names) == plan.total_bytes


def test_scale_in_a_tower_that_no_sample_reaches_is_refused(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Rounding to nearest needs no data there, but the scale does."""
    data = tiny_vlm.samples(tmp_path / "data", ("text",), count=2)
    recipe = recipe_of({"weights": "int8-g16", "solver": "rtn"}, transforms=[SMOOTH])
    with pytest.raises(DataError, match="image"):
        pq.quantize(tiny("qwen2_vl"), recipe, tmp_path / "out", data)
    assert not (tmp_path / "out").exists()
