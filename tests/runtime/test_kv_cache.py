"""Keys and values in few bits: the numbers, their scales, what a model computes with them."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch
from cache_readers import check_logits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import prismquant as pq
from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.engine.kv_observation import KVRecord
from prismquant.engine.setup import Silent
from prismquant.errors import FormatError, NumericsError, PrismQuantError, RecipeError
from prismquant.export.compressed_tensors.kv_section import kv_cache_scheme, read_kv_cache_scheme
from prismquant.export.load_quantized import load_model
from prismquant.formats.kv_formats import KV_PRESETS, KVCacheSpec, kv_cache_spec
from prismquant.formats.section import Section
from prismquant.formats.section_grammar import read_section
from prismquant.models.attention import attention_hooked, hook_attention, hooked, unhook_attention
from prismquant.models.bind import bind
from prismquant.models.config import import_transformers
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor
from prismquant.numerics.hadamard import hadamard_matrix
from prismquant.numerics.ranges import RangeRule
from prismquant.opening import read_json
from prismquant.plan.make_plan import make_plan
from prismquant.recipe.schema import load_recipe, parse_recipe
from prismquant.runtime.kv_cache import KVHook, KVQuantizer, KVWatch, cache_in_float
from prismquant.shards import ShardReader
from prismquant.storage import write_json, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ALONE: dict[str, Any] = {"rules": [], "kv_cache": "fp8"}
# Every format, and every family, in few runs.
PLAIN = tuple(name for name, spec in KV_PRESETS.items() if not spec.rotated)
FOUR = ("fp8", "fp8-head", "int8", "int8-head")
FORMATS = dict(zip(tiny_vlm.FAMILIES, FOUR, strict=True))
TOPS = {"fp8": 448, "int8": 127.5, "int4": 7.5}
LAYER = "model.language_model.layers.{}.self_attn"


def recipe(preset: str, kv_cache: Any, **calibration: Any) -> pq.Recipe:
    chosen = pq.load_recipe(preset).with_rules({"solver": "rtn"}).with_kv_cache(kv_cache)
    return chosen.with_calibration(**({"batch_size": 4} | calibration))


@functools.cache
def inputs_of(folder: Path, data: Path) -> list[dict[str, Any]]:
    ids = bind(folder, quantized=True).vision_token_ids
    samples = read_samples(data)
    batches = make_batches(samples, load_processor(folder), batch_size=4, vision_token_ids=ids)
    return [batch.inputs for batch in batches]


def keys_and_values(
    model: nn.Module, index: int, runs: list[dict[str, Any]]
) -> tuple[Tensor, Tensor]:
    """All counted keys and values before a layer's cache, each ``[rows, kv_heads, head_dim]``."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(*states: Tensor) -> None:
        counted = run["attention_mask"].reshape(-1).bool()
        key, value = (state.transpose(1, 2).flatten(0, 1)[counted] for state in states)
        seen.append((key, value))

    attention = model.get_submodule(LAYER.format(index))
    with attention_hooked(attention, KVWatch(see)), torch.no_grad():
        for run in runs:
            model(**run, use_cache=False)
    return torch.cat([key for key, _ in seen]), torch.cat([value for _, value in seen])


def largest_input(model: nn.Module, name: str, runs: list[dict[str, Any]]) -> float:
    """The largest counted value that reaches a layer."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].flatten(0, 1))

    with torch.no_grad():
        handle = model.get_submodule(name).register_forward_pre_hook(hook)
        for run in runs:
            model(**run, use_cache=False)
        handle.remove()
    masks = [run["attention_mask"].reshape(-1).bool() for run in runs]
    return max(float(x[mask].max()) for x, mask in zip(seen, masks, strict=True))


def logits(model: nn.Module, run: dict[str, Any], **more: Any) -> Tensor:
    with torch.no_grad():
        output = model(**run, **more).logits
    return torch.as_tensor(output[run["attention_mask"].bool()])


def by_hand(x: Tensor, scale: Tensor, number: str) -> Tensor:
    """Nearest of all the numbers there are; of two, the one with the even code."""
    if number != "fp8":
        top = 128 if number == "int8" else 8
        return (x / scale).round().clamp(-top, top - 1) * scale
    exponents, mantissas = torch.arange(16.0), torch.arange(8.0)
    normal = (1 + mantissas / 8) * torch.exp2(exponents[1:, None] - 7)
    points = torch.cat([mantissas / 8 * 2.0**-6, normal.flatten()])[:-1]
    assert float(points[-1]) == 448
    distances = ((x / scale).abs().unsqueeze(-1) - points).abs()
    nearest = distances.amin(-1, keepdim=True)
    tied = distances == nearest
    even = tied & (torch.arange(len(points)) % 2 == 0)
    index = torch.where(even.any(-1), even.float().argmax(-1), tied.float().argmax(-1))
    return points[index].copysign(x) * scale


# The numbers


def declared(scheme: dict[str, Any] | None) -> Section:
    section = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
    return read_section({"quantization_config": section})


@pytest.mark.parametrize("name", KV_PRESETS)
def test_a_format_is_made_again_from_its_name_its_fields_and_its_declaration(name: str) -> None:
    spec = kv_cache_spec(name)
    assert spec.name == name
    assert KVCacheSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    read = read_kv_cache_scheme(declared(kv_cache_scheme(spec)))
    assert read == replace(spec, rotated=False)
    assert spec.scale_shape(3) == ((3, 1, 1) if "-head" in name else (1,))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: kv_cache_spec("fp4"), "no format 'fp4'"),
        (lambda: KVCacheSpec("fp16"), "format of a key-value cache cannot be 'fp16'"),  # type: ignore[arg-type]
        (lambda: KVCacheSpec("fp8", "token"), "granularity .* cannot be 'token'"),  # type: ignore[arg-type]
        (lambda: KVCacheSpec.from_dict({"format": "fp8", "bits": 8}), "no field 'bits'"),
        (lambda: KVCacheSpec.from_dict({"granularity": "head"}), "is missing"),
        (lambda: KVCacheSpec("fp8", rotated=True), "fp8 key-value cache is not rotated"),
        (lambda: KVCacheSpec("int8", rotated=1), "must be true or false"),  # type: ignore[arg-type]
    ],
)
def test_other_formats_are_refused(make: Callable[[], KVCacheSpec], what: str) -> None:
    with pytest.raises(FormatError, match=what):
        make()


@pytest.mark.parametrize(
    "change",
    [
        {"num_bits": 4},
        {"num_bits": 6, "type": "int"},
        {"symmetric": False},
        {"dynamic": True},
        {"strategy": "channel"},
        {"type": "bfloat"},
    ],
)
def test_other_declarations_are_refused(change: dict[str, Any]) -> None:
    scheme = kv_cache_scheme(kv_cache_spec("fp8")) or {}
    with pytest.raises(FormatError, match="cannot be read"):
        read_kv_cache_scheme(declared(scheme | change))


@given(
    st.sampled_from(PLAIN),
    st.integers(0, 2**32 - 1),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_quantizer_takes_the_nearest_number_there_is(
    name: str, seed: int, dtype: torch.dtype
) -> None:
    """Also far outside the range, and where a value lies midway between two numbers."""
    spec, draw = kv_cache_spec(name), torch.Generator().manual_seed(seed)
    key, value = (torch.randn(2, 3, 5, 4, generator=draw).mul(30).to(dtype) for _ in range(2))
    key[0, 0, 0] = torch.tensor([0.0, -0.0, 1e6, -1e6])
    value[1, 2, 4] = torch.tensor([1.0625, -1.1875, 0.5 * 2**-9, 17.0])
    shape = spec.scale_shape(3)
    scales = [torch.rand(shape, generator=draw) + 0.01, torch.full(shape, 1.0)]
    rounded = KVQuantizer(spec, *scales)(key, value)
    for x, scale, got in zip((key, value), scales, rounded, strict=True):
        wanted = by_hand(x.float(), scale, spec.format).to(dtype)
        assert got.dtype == dtype
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", PLAIN)
def test_what_was_rounded_once_stays(name: str) -> None:
    """A cache is read many times."""
    spec = kv_cache_spec(name)
    scale = torch.rand(spec.scale_shape(2)) + 0.1
    quantizer = KVQuantizer(spec, scale, scale)
    once = quantizer(torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8))
    for first, second in zip(once, quantizer(*once), strict=True):
        assert torch.equal(first, second)


def test_gradients_pass_the_quantizer() -> None:
    quantizer = KVQuantizer(kv_cache_spec("fp8"), torch.ones(1), torch.ones(1))
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    key, _ = quantizer(x, x)
    key.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(key, quantizer(x.detach(), x.detach())[0])


def test_scales_of_a_wrong_shape_or_value_are_refused() -> None:
    spec, fine = kv_cache_spec("fp8"), torch.ones(1)
    for scale, what in (
        (torch.ones(2, 1, 1), "shape"),
        (torch.zeros(1), "positive and finite"),
        (torch.tensor([math.nan]), "positive and finite"),
    ):
        with pytest.raises(FormatError, match=what):
            KVQuantizer(spec, fine, scale)


def test_keys_without_tokens_pass() -> None:
    quantizer = KVQuantizer(kv_cache_spec("fp8-head"), torch.ones(2, 1, 1), torch.ones(2, 1, 1))
    empty = torch.empty(1, 2, 0, 4)
    assert quantizer(empty, empty)[0].shape == empty.shape


@pytest.mark.parametrize("name", KV_PRESETS)
def test_scales_are_the_largest_magnitude_over_the_largest_number(name: str) -> None:
    spec = kv_cache_spec(name)
    rows = torch.randn(50, 2, 8) * torch.tensor([1.0, 7.0]).reshape(1, 2, 1)
    record = KVRecord(2 if spec.per_head else 1, 0.01)
    for part in rows.split(7):
        record.update(part)
    top = TOPS[spec.format]
    amax = rows.abs().amax(dim=(0, 2)) if spec.per_head else rows.abs().max()
    scale = record.scale(spec, RangeRule("minmax"), torch.float32)
    assert tuple(scale.shape) == spec.scale_shape(2)
    assert torch.equal(scale.flatten(), (amax / top).reshape(-1))
    assert record.amax == float(rows.abs().max())


# Standing before attention


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, tiny_folder: Path) -> nn.Module:
    loaded = load_float(tiny_folder)
    loaded.set_attn_implementation(request.param)  # type: ignore[operator]
    return loaded


def test_a_hook_that_changes_nothing_changes_nothing(
    model: nn.Module, tiny_folder: Path, calibration_file: Path
) -> None:
    """The function that the model used before is called; without the hook all is as it was.

    Hooks see as many heads as the cache holds.
    """
    run = inputs_of(tiny_folder, calibration_file)[0]
    before = logits(model, run)
    configs = {name: getattr(m, "config", None) for name, m in model.named_modules()}
    for index in range(2):
        hook_attention(model.get_submodule(LAYER.format(index)), KVHook())
    assert torch.equal(logits(model, run), before)
    unhook_attention(model)
    assert torch.equal(logits(model, run), before)
    for name, module in model.named_modules():
        assert hooked(module) is None
        assert getattr(module, "config", None) is configs[name]
    key, value = keys_and_values(model, 1, [run])
    width, counted = tiny_vlm.HIDDEN // tiny_vlm.HEADS, int(run["attention_mask"].sum())
    assert key.shape == value.shape == (counted, tiny_vlm.KV_HEADS, width)


def test_modules_that_choose_no_attention_function_are_refused() -> None:
    with pytest.raises(PrismQuantError, match="does not choose its attention function"):
        hook_attention(nn.Linear(2, 2), KVHook())


# A whole run


def server_cache(spec: KVCacheSpec, folder: Path, names: Callable[[str], str]) -> Any:
    """A cache as a server has it: numbers are rounded when they are written, and then kept."""
    reader = ShardReader(folder)

    class Cache(import_transformers().DynamicCache):  # type: ignore[misc]
        def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
            found = [
                by_hand(x, reader.read(names(f"{LAYER.format(layer)}.{which}")), spec.format)
                for which, x in (("k_scale", key), ("v_scale", value))
            ]
            return super().update(*found, layer, *args, **kwargs)

    return Cache()


def cache_argument(model: nn.Module) -> str:
    """How the installed transformers calls the cache: it has changed the name once."""
    known = inspect.signature(model.forward).parameters
    return next(name for name in ("cache", "past_key_values") if name in known)


def test_a_loaded_model_computes_what_a_server_with_such_a_cache_would(
    family: str, tiny_folder: Path, calibration_file: Path, tmp_path: Path
) -> None:
    """Every family; against the same weights with keys and values rounded by hand in the cache."""
    name = FORMATS[family]
    pq.quantize(tiny_folder, {**ALONE, "kv_cache": name}, tmp_path, calibration_file)
    simulated, plain = load_model(tmp_path), load_float(tiny_folder)
    names = bind(tiny_folder).names.to_disk
    for run in inputs_of(tiny_folder, calibration_file):
        cache = server_cache(kv_cache_spec(name), tmp_path, names)
        expected = logits(plain, run, **{cache_argument(plain): cache}, use_cache=True)
        got = logits(simulated, run, use_cache=False)
        assert torch.allclose(got, expected, atol=1e-5)
        assert not torch.allclose(got, logits(plain, run), atol=1e-5)


def test_text_is_generated_as_a_server_would(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """With a cache in floating point of its own, whose numbers are rounded when they are read."""
    folder = tiny("qwen2_5_vl")
    pq.quantize(folder, {**ALONE, "kv_cache": "int8-head"}, tmp_path, calibration_file)
    simulated, plain = load_model(tmp_path), load_float(folder)
    run = inputs_of(folder, calibration_file)[0]
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "use_cache": True}
    argument = cache_argument(plain)
    cache = server_cache(kv_cache_spec("int8-head"), tmp_path, bind(folder).names.to_disk)
    expected = plain.generate(**run, **settings, **{argument: cache})  # type: ignore[operator]
    assert torch.equal(simulated.generate(**run, **settings), expected)  # type: ignore[operator]


def test_scales_hold_every_counted_token_of_the_finished_model(
    family: str, tiny_folder: Path, calibration_file: Path, tmp_path: Path
) -> None:
    """Later blocks see earlier ones with their caches quantized; padding is in no range."""
    name = FORMATS[family]
    result = pq.quantize(tiny_folder, recipe("w8a8-static", name), tmp_path, calibration_file)
    finished, runs = load_model(tmp_path), inputs_of(tiny_folder, calibration_file)
    spec, reader, names = kv_cache_spec(name), ShardReader(tmp_path), bind(tiny_folder).names
    told = {step.name: step.kv_cache for step in result.record.steps if step.kv_cache}
    assert len(told) == 2
    for index in range(2):
        notes = told[f"model.language_model.layers.{index}"]
        states = keys_and_values(finished, index, runs)
        for which, x in zip(("key", "value"), states, strict=True):
            tensor = f"{LAYER.format(index)}.{which[0]}_scale"
            scale = reader.read(names.to_disk(tensor))
            top = TOPS[spec.format]
            amax = x.abs().amax(dim=(0, 2)) if spec.per_head else x.abs().max()
            # On some processors an input of block 0 falls to the other side of a tie.
            assert torch.allclose(scale.flatten(), (amax / top).reshape(-1), rtol=2e-3)
            assert math.isclose(getattr(notes, f"{which}_amax"), float(x.abs().max()), rel_tol=2e-3)


def test_what_follows_in_the_block_sees_rounded_values(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """The range of the output projection's input is that of the finished model."""
    folder = tiny("qwen2_vl")
    chosen = recipe("w8a8-static", "int8").without_transforms()
    record = pq.quantize(folder, chosen, tmp_path, calibration_file).record
    layers = {layer.name: layer for step in record.steps for layer in step.layers}
    finished, runs = load_model(tmp_path), inputs_of(folder, calibration_file)
    name = f"{LAYER.format(1)}.o_proj"
    served = largest_input(finished, name, runs)
    with cache_in_float(finished):
        in_float = largest_input(finished, name, runs)
    assert math.isclose(layers[name].input_range.high, served, rel_tol=1e-5)
    assert not math.isclose(served, in_float, rel_tol=1e-5)


def test_caches_in_float_are_put_back() -> None:
    quantizer = KVQuantizer(kv_cache_spec("fp8"), torch.ones(1), torch.ones(1))
    x = torch.full((1, 1, 1, 1), 1.01)
    with cache_in_float(quantizer):
        assert quantizer(x, x)[0] is x
    assert float(quantizer(x, x)[0]) == 1.0

    def failing() -> None:
        with cache_in_float(quantizer):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert quantizer.enabled


def test_ranges_follow_what_calibration_is_told_to_see(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Of the two blocks, which ones have other ranges than usual.

    Inputs in float change both, a first block that is carried on in float only the second. Keys and
    values are always looked at behind their quantized projections.
    """
    usual: list[Any] = []
    for told, same in (
        ({}, (True, True)),
        ({"quantized_inputs": False}, (False, False)),
        ({"block_sequential": False}, (True, False)),
        ({"layer_sequential": False}, (True, True)),
    ):
        out = tmp_path / "-".join(["usual", *told])
        chosen = recipe("w4a8", "int8", **told)
        record = pq.quantize(tiny("qwen3_vl"), chosen, out, calibration_file).record
        ranges = [step.kv_cache for step in record.steps if step.kv_cache]
        usual = usual or ranges
        assert tuple(a == b for a, b in zip(ranges, usual, strict=True)) == same, told


def test_padding_changes_no_scale(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """One sample at a time has no padding; all at once has much."""
    data = tiny_vlm.samples(tmp_path / "data", count=9, seed=3)
    found = []
    for batch_size in (1, 9):
        out = tmp_path / str(batch_size)
        chosen = recipe("w8a8", "fp8-head", batch_size=batch_size)
        pq.quantize(tiny("qwen2_vl"), chosen, out, data)
        reader = ShardReader(out)
        found.append(
            {n: reader.read(n) for n in reader.names if n.endswith(("k_scale", "v_scale"))}
        )
    assert len(found[0]) == 4
    for name, scale in found[0].items():
        assert torch.allclose(scale, found[1][name], rtol=1e-4), name


class StopAt(Silent):
    """A reporter that counts stages, and cuts a run off at its n-th."""

    def __init__(self, last: float = math.inf) -> None:
        self.count, self.last = 0, last

    def stage(self, step: str, what: str) -> None:
        self.count += 1
        if self.count > self.last:
            raise KeyboardInterrupt


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "record.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


@pytest.mark.parametrize("kind", ["alone", "with weights"])
def test_a_resumed_run_ends_with_the_same_bytes(
    kind: str, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Cut off in the blocks with a cache; in bfloat16 a scale has fewer digits than its range."""
    folder = tiny("qwen2_vl", dtype=torch.bfloat16, llm_blocks=2)
    chosen = load_recipe(ALONE) if kind == "alone" else recipe("w8a8", "fp8-head")
    whole = StopAt()
    pq.quantize(folder, chosen, tmp_path / "whole", calibration_file, reporter=whole)
    wanted = files_of(tmp_path / "whole")
    for last in (whole.count - 8, whole.count - 5, whole.count - 2):
        out = tmp_path / str(last)
        with pytest.raises(KeyboardInterrupt):
            pq.quantize(folder, chosen, out, calibration_file, reporter=StopAt(last))
        pq.quantize(folder, chosen, out, calibration_file, resume=True)
        assert files_of(out) == wanted
        shutil.rmtree(out)


def test_a_tuned_block_has_the_ranges_of_its_last_weights(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    folder = tiny("qwen2_vl", llm_blocks=1)
    chosen = recipe("w4a16", "int8").with_rules(
        {"tuner": "autoround", "tuner_options": {"iterations": 3}}
    )
    record = pq.quantize(folder, chosen, tmp_path, calibration_file).record
    notes = next(step.kv_cache for step in record.steps if step.kv_cache)
    runs = inputs_of(folder, calibration_file)
    key, value = keys_and_values(load_model(tmp_path), 0, runs)
    assert math.isclose(notes.key_amax, float(key.abs().max()), rel_tol=1e-5)
    assert math.isclose(notes.value_amax, float(value.abs().max()), rel_tol=1e-5)


def test_ranges_can_be_chosen_by_every_rule(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Percentiles and averages clip, so their scales are smaller."""
    scales = {}
    for rule in ("minmax", {"kind": "percentile", "percentile": 0.9}, "mse", "ema"):
        kind = rule if isinstance(rule, str) else str(rule["kind"])
        told = ALONE | {"kv_cache": {"format": "int8", "range": rule}}
        told |= {"calibration": {"batch_size": 2}}
        pq.quantize(tiny("qwen2_vl", llm_blocks=1), told, tmp_path / kind, calibration_file)
        reader = ShardReader(tmp_path / kind)
        scales[kind] = float(reader.read("model.layers.0.self_attn.k_scale"))
    assert max(scales["percentile"], scales["ema"]) < scales["minmax"]
    assert scales["mse"] <= scales["minmax"]


# Rotated keys


@pytest.fixture(scope="module")
def spiky(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which the bias lifts single channels of the keys far above the others."""
    folder = tmp_path_factory.mktemp("spiky")
    shutil.copytree(tiny("qwen2_vl"), folder, dirs_exist_ok=True)
    reader = ShardReader(folder)
    tensors = {name: reader.read(name) for name in reader.names}
    for name, tensor in tensors.items():
        if name.endswith("self_attn.k_proj.bias"):
            tensor[::16] = 100.0
    write_tensors(folder / "model.safetensors", tensors)
    return folder


def test_rotated_keys_lose_less_where_a_few_channels_stand_out(
    spiky: Path, calibration_file: Path, tmp_path: Path
) -> None:
    run, plain = inputs_of(spiky, calibration_file)[0], load_float(spiky)
    wanted, loss, reach = logits(plain, run), {}, {}
    for name in ("int8-head", "int8-head-rotated"):
        told = {"rules": [], "kv_cache": name}
        record = pq.quantize(spiky, told, tmp_path / name, calibration_file).record
        loss[name] = float((logits(load_model(tmp_path / name), run) - wanted).square().mean())
        reach[name] = next(step.kv_cache.key_amax for step in record.steps if step.kv_cache)
    assert reach["int8-head-rotated"] < 0.5 * float(reach["int8-head"])
    assert loss["int8-head-rotated"] < 0.7 * loss["int8-head"]


def test_rotated_keys_are_those_of_rotated_queries(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """A server rotates queries and keys and keeps rotated keys; here keys are rotated back."""
    folder = tiny("qwen3_vl")
    told = {**ALONE, "kv_cache": "int4-head-rotated"}
    pq.quantize(folder, told, tmp_path, calibration_file)
    model, run = load_model(tmp_path), inputs_of(folder, calibration_file)[0]
    width = tiny_vlm.HIDDEN // tiny_vlm.HEADS
    turn = hadamard_matrix(width).float() / math.sqrt(width)
    quantizer = hooked(model.get_submodule(LAYER.format(0)))
    assert isinstance(quantizer, KVQuantizer)
    key, _ = keys_and_values(load_float(folder), 0, [run])
    key = key.transpose(0, 1).unsqueeze(0)
    query = torch.randn_like(key)
    found, _ = quantizer(key, key)
    kept = by_hand(key @ turn, quantizer.k_scale, "int4")
    # The largest key lies midway between two numbers, and the last bit decides.
    same = (found @ turn - kept).abs() < 1e-4
    assert same.float().mean() > 0.999
    products = (query @ turn) @ (found @ turn).transpose(-1, -2)
    assert torch.allclose(query @ found.transpose(-1, -2), products, atol=1e-4)


def test_a_rotation_of_keys_is_declared_and_read_beside_others(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    rotation = {"name": "rotation", "match": {"modality": "llm"}, "options": {"online": True}}
    told = recipe("w8a8", "int8-rotated").with_transforms(rotation)
    result = pq.quantize(tiny("qwen2_vl"), told, tmp_path, calibration_file)
    assert any("only prismquant.load rotates them" in line for line in result.plan.remarks)
    config = read_json(tmp_path / "config.json")["quantization_config"]["transform_config"]
    group = config["config_groups"]["key_rotation"]
    assert group["head_dim"] == tiny_vlm.HIDDEN // tiny_vlm.HEADS
    assert [apply["location"] for apply in group["apply"]] == ["q_attn", "k_cache"]
    for apply in group["apply"]:
        for index, target in enumerate(apply["targets"]):
            pattern = re.compile(target.removeprefix("re:"))
            assert pattern.match(LAYER.format(index))
            assert pattern.match(f"language_model.model.layers.{index}.self_attn")
            assert not pattern.match(LAYER.format(index + 1))
            assert not pattern.match(f"model.vision_model.encoder.layers.{index}.self_attn")
    assert len(config["config_groups"]) > 1
    model = load_model(tmp_path)
    hook = hooked(model.get_submodule(LAYER.format(1)))
    assert isinstance(hook, KVQuantizer)
    assert hook.spec == KVCacheSpec("int8", rotated=True)


# The bias of the key projection


@pytest.fixture(scope="module")
def biased(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose keys are mostly bias, as those of the Qwen2 family are."""
    folder = tmp_path_factory.mktemp("biased")
    shutil.copytree(tiny("qwen2_vl"), folder, dirs_exist_ok=True)
    reader = ShardReader(folder)
    tensors = {name: reader.read(name) for name in reader.names}
    for name, tensor in tensors.items():
        if name.endswith("self_attn.k_proj.bias"):
            tensors[name] = 400 * tensor
    write_tensors(folder / "model.safetensors", tensors)
    return folder


def test_what_the_bias_adds_to_keys_is_measured(
    biased: Path, calibration_file: Path, tmp_path: Path
) -> None:
    """Against the difference between the model's keys and those of a model without that bias."""
    record = pq.quantize(biased, ALONE, tmp_path, calibration_file).record
    notes = next(step.kv_cache for step in record.steps if step.kv_cache)
    runs, plain = inputs_of(biased, calibration_file), load_float(biased)
    keys, _ = keys_and_values(plain, 0, runs)
    torch.nn.init.zeros_(plain.get_parameter(f"{LAYER.format(0)}.k_proj.bias"))
    rest, _ = keys_and_values(plain, 0, runs)
    constant = keys - rest
    energy = float(constant.double().square().sum() / keys.double().square().sum())
    assert energy > 0.9
    assert math.isclose(notes.bias.energy, energy, rel_tol=1e-4)
    reach = float(constant.abs().max() / keys.abs().max())
    assert math.isclose(notes.bias.range, reach, rel_tol=1e-4)
    left = float(rest.abs().max())
    assert math.isclose(notes.bias.key_amax_without, left, rel_tol=1e-3)
    assert left < 0.1 * notes.key_amax


def test_keys_without_a_bias_have_nothing_to_tell_of_it(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    record = pq.quantize(tiny("qwen3_vl"), ALONE, tmp_path, calibration_file).record
    told = [step.kv_cache for step in record.steps if step.kv_cache]
    assert [one.bias for one in told] == [None] * 2
    assert all(one.key_amax > 0 and one.tokens.text > 0 for one in told)


@pytest.fixture(scope="module")
def unbiased(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint with a quantized cache, of a family whose keys have no bias."""
    out = tmp_path_factory.mktemp("unbiased")
    told = {**ALONE, "kv_cache": "fp8-head"}
    return pq.quantize(tiny("qwen3_vl"), told, out, calibration_file).folder


def without_scales(folder: Path, *left_out: str) -> None:
    """Take tensors out of a checkpoint, shard and index."""
    index = read_json(folder / "model.safetensors.index.json")
    for shard in set(index["weight_map"].values()):
        reader = ShardReader(folder, files=[shard])
        kept = {n: reader.read(n) for n in reader.names if not n.endswith(left_out)}
        write_tensors(folder / shard, kept)
    index["weight_map"] = {
        name: shard for name, shard in index["weight_map"].items() if not name.endswith(left_out)
    }
    write_json(folder / "model.safetensors.index.json", index)


def test_an_uncalibrated_cache_is_refused_where_keys_have_a_bias(
    biased: Path, calibration_file: Path, tmp_path: Path
) -> None:
    pq.quantize(biased, ALONE, tmp_path, calibration_file)
    without_scales(tmp_path, ".k_scale", ".v_scale")
    with pytest.raises(FormatError, match="has no scales, and the key projection has a bias"):
        load_model(tmp_path)


def test_an_uncalibrated_cache_has_scale_one_elsewhere(unbiased: Path, tmp_path: Path) -> None:
    """As servers take it."""
    shutil.copytree(unbiased, tmp_path, dirs_exist_ok=True)
    without_scales(tmp_path, ".k_scale", ".v_scale")
    hook = hooked(load_model(tmp_path).get_submodule(LAYER.format(0)))
    assert isinstance(hook, KVQuantizer)
    for scale in (hook.k_scale, hook.v_scale):
        assert torch.equal(scale, torch.ones(tiny_vlm.KV_HEADS, 1, 1))


def test_one_scale_without_the_other_is_refused(unbiased: Path, tmp_path: Path) -> None:
    shutil.copytree(unbiased, tmp_path, dirs_exist_ok=True)
    without_scales(tmp_path, ".v_scale")
    with pytest.raises(FormatError, match="without its fellow"):
        load_model(tmp_path)


def test_scales_that_do_not_fit_the_declaration_are_refused(unbiased: Path, tmp_path: Path) -> None:
    shutil.copytree(unbiased, tmp_path, dirs_exist_ok=True)
    config = read_json(tmp_path / "config.json")
    config["quantization_config"]["kv_cache_scheme"]["strategy"] = "tensor"
    write_json(tmp_path / "config.json", config)
    with pytest.raises(FormatError, match="do not fit a cache of fp8 tensor"):
        load_model(tmp_path)


def test_values_that_are_not_finite_are_refused_by_name(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("qwen2_vl"), folder)
    reader = ShardReader(folder)
    tensors = {name: reader.read(name) for name in reader.names}
    tensors["model.layers.0.self_attn.v_proj.bias"][3] = math.inf
    write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(NumericsError) as error:
        pq.quantize(folder, ALONE, tmp_path / "out", calibration_file)
    assert error.value.where == f"keys and values of {LAYER.format(0)}"


# The checkpoint


@pytest.mark.parametrize(("layout", "name"), [("old", "fp8-head"), ("native", "fp8")])
def test_scales_are_stored_beside_the_projections(
    name: str, layout: str, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    folder = tiny("qwen2_vl", layout=layout, dtype=torch.bfloat16)
    result = pq.quantize(folder, recipe("w4a16", name), tmp_path, calibration_file)
    reader, spec = ShardReader(tmp_path), kv_cache_spec(name)
    prefix = "model.layers" if layout == "old" else "model.language_model.layers"
    for index in range(2):
        for which in ("k_scale", "v_scale"):
            info = reader.info(f"{prefix}.{index}.self_attn.{which}")
            assert info.dtype == torch.bfloat16
            assert info.shape == spec.scale_shape(tiny_vlm.KV_HEADS)
    assert sum("_scale" in n and "self_attn.k_s" in n for n in reader.names) == 2
    stored = sum(reader.info(tensor).nbytes for tensor in reader.names)
    assert stored == result.plan.total_bytes
    section = read_json(tmp_path / "config.json")["quantization_config"]
    assert section["kv_cache_scheme"] == {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "dynamic": False,
        "strategy": "tensor" if name == "fp8" else "attn_head",
        "group_size": None,
    }


@pytest.fixture
def quiet() -> Iterator[None]:
    """transformers warns of what is known here."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
def test_transformers_with_compressed_tensors_computes_the_same(
    family: str, tiny_folder: Path, calibration_file: Path, tmp_path: Path
) -> None:
    """Its library reads the declaration and the scales, and quantizes where we do, or nowhere."""
    pytest.importorskip("compressed_tensors")
    pq.quantize(tiny_folder, recipe("w8a8", FORMATS[family]), tmp_path, calibration_file)
    run = inputs_of(tiny_folder, calibration_file)[0]
    transformers = import_transformers()
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="float32")
    expected = logits(theirs, run)
    check_logits(load_model(tmp_path), expected, lambda m: logits(m, run), atol=1e-5, rtol=1e-5)


def test_the_vision_tower_keeps_its_attention(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    pq.quantize(tiny("video_llama_3"), ALONE, tmp_path, calibration_file)
    found = [name for name, m in load_model(tmp_path).named_modules() if hooked(m) is not None]
    assert found == [LAYER.format(0), LAYER.format(1)]


def test_a_remote_code_checkpoint_works_too(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    folder = tiny("video_llama_3", layout="remote")
    pq.quantize(folder, ALONE, tmp_path, calibration_file)
    assert "model.layers.1.self_attn.v_scale" in ShardReader(tmp_path).names
    assert hooked(load_model(tmp_path).get_submodule(LAYER.format(1))) is not None


# The recipe and the plan


@pytest.mark.parametrize(
    ("said", "spec", "rule"),
    [
        ("fp8", KVCacheSpec("fp8"), RangeRule()),
        ("int8-head", KVCacheSpec("int8", "head"), RangeRule()),
        ({"format": "fp8", "granularity": "head"}, KVCacheSpec("fp8", "head"), RangeRule()),
        ({"format": "fp8", "range": "mse"}, KVCacheSpec("fp8"), RangeRule("mse")),
        (
            {"format": "int8", "range": {"kind": "percentile", "percentile": 0.99}},
            KVCacheSpec("int8"),
            RangeRule("percentile", percentile=0.99),
        ),
    ],
)
def test_a_recipe_says_the_cache_by_name_or_by_fields(
    said: Any, spec: KVCacheSpec, rule: RangeRule, tmp_path: Path
) -> None:
    chosen = parse_recipe({"rules": [], "kv_cache": said}, source="test")
    assert chosen.kv_cache_settings == (spec, rule)
    (tmp_path / "recipe.yaml").write_text(chosen.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == chosen


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ("fp9", "kv_cache: there is no format 'fp9'"),
        (8, "kv_cache: expected a name or a mapping"),
        ({"format": "fp8", "granularty": "head"}, "kv_cache: .*no field 'granularty'"),
        ({"granularity": "head"}, "kv_cache: .*is missing"),
        ({"format": "fp8", "range": "widest"}, "kv_cache: 'widest' is not a choice"),
    ],
)
def test_a_recipe_with_another_cache_is_refused(said: Any, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        parse_recipe({"rules": [], "kv_cache": said}, source="test")


def test_a_cache_can_be_added_to_a_recipe_and_taken_back() -> None:
    before = load_recipe("w4a16")
    after = before.with_kv_cache("fp8", name="w4a16-kv8")
    assert after.name == "w4a16-kv8"
    assert after.kv_cache_settings[0] == KVCacheSpec("fp8")
    assert after.with_kv_cache("none").kv_cache is None
    with pytest.raises(RecipeError, match="has no kv_cache"):
        _ = before.kv_cache_settings
    with pytest.raises(RecipeError, match="there is no rule"):
        parse_recipe({"rules": []}, source="test")


def test_the_plan_tells_of_the_cache(tiny: Callable[..., Path]) -> None:
    bound = bind(tiny("qwen2_vl", dtype=torch.bfloat16))
    plain = make_plan(load_recipe("w8a8").with_rules({"solver": "rtn"}), bound)
    plans = {name: make_plan(recipe("w8a8", name, batch_size=8), bound) for name in KV_PRESETS}
    assert not plain.needs_data
    prints = {plan.fingerprint() for plan in plans.values()}
    assert len(prints) == len(KV_PRESETS)
    for name, plan in plans.items():
        heads = tiny_vlm.KV_HEADS if "-head" in name else 1
        assert plan.needs_data
        assert plan.total_bytes - plain.total_bytes == 2 * 2 * heads * 2
        told = plan.to_dict()["kv_cache"]
        assert [one["attention"] for one in told["layers"]] == [LAYER.format(0), LAYER.format(1)]
        assert {one["kv_heads"] for one in told["layers"]} == {tiny_vlm.KV_HEADS}
        assert json.loads(json.dumps(told)) == told
    remarks = {name: " ".join(plan.remarks) for name, plan in plans.items()}
    assert "vLLM" not in remarks["fp8"]
    assert "FlashAttention" in remarks["fp8-head"]
    assert all("vLLM refuses" in remarks[name] for name in KV_PRESETS if name.startswith("int"))
