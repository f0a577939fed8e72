"""A checkpoint in other formats: the same numbers by readers written from each layout's definition.

Readers here work on Python's whole numbers, bit by bit; nothing of the package takes part.
"""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prismquant as pq
from prismquant.api import export
from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.errors import ArgumentError, FormatError, PrismQuantError, StorageError
from prismquant.export import awq_layout as awq
from prismquant.export import gptq_layout as gptq
from prismquant.export.compressed_tensors.stored import open_checkpoint
from prismquant.export.exporter import Shards, fold_names
from prismquant.export.exporters import EXPORTERS
from prismquant.export.load_quantized import load_model
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.formats.spec import spec
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor
from prismquant.opening import read_json
from prismquant.shards import ShardReader
from prismquant.storage import write_json, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LLM = {"modality": "llm", "role": ["attn", "mlp"]}
ALL = {"modality": ["llm", "vision", "projector"], "role": ["attn", "mlp", "projector"]}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@pytest.fixture(scope="session")
def run(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``run(family, *rules, preset=.., **options)``: a finished RTN run; equal ones are shared."""
    made: dict[str, Path] = {}

    def get(
        family: str, *rules: dict[str, Any], preset: str | dict[str, Any] = "w4a16", **options: Any
    ) -> Path:
        key = repr((family, rules, preset, sorted(options.items())))
        if key not in made:
            source = tiny(family, **({"dtype": torch.bfloat16} | options))
            quick = {"solver": "rtn", "tuner": "none", "weight_range": "minmax"}
            recipe = pq.load_recipe(preset).with_rules(quick, *rules)
            made[key] = tmp_path_factory.mktemp("run") / "out"
            pq.quantize(source, recipe, made[key], calibration_file)
        return made[key]

    return get


def logits(model: torch.nn.Module, folder: Path, data: Path) -> torch.Tensor:
    ids = {model.config.image_token_id, model.config.video_token_id}
    batches = make_batches(
        read_samples(data), load_processor(folder), batch_size=6, vision_token_ids=ids
    )
    batch = next(iter(batches))
    with torch.no_grad():
        result = model(**batch.inputs, use_cache=False).logits
    return result[batch.inputs["attention_mask"].bool()].float()


def stream(words: np.ndarray, bits: int, count: int) -> list[int]:
    """Unsigned numbers of a little-endian bit stream of int32 words."""
    whole = sum(int(word) << (32 * place) for place, word in enumerate(words.view(np.uint32)))
    return [whole >> (bits * place) & ((1 << bits) - 1) for place in range(count)]


def read_gptq(stored: dict[str, torch.Tensor], bits: int, *, less_one: bool) -> np.ndarray:
    """float64 [out, in] of a layer in the GPTQ layout, by its definition."""
    columns, rows = len(stored["g_idx"]), stored["scales"].shape[1]
    assert {k: str(v.dtype) for k, v in stored.items()} == {
        "qweight": "torch.int32",
        "qzeros": "torch.int32",
        "scales": "torch.float16",
        "g_idx": "torch.int32",
    }
    words = stored["qweight"].numpy()
    codes = np.array([stream(words[:, n].copy(), bits, columns) for n in range(rows)])
    zeros = np.array([stream(row.copy(), bits, rows) for row in stored["qzeros"].numpy()])
    zeros = (zeros + less_one).T
    scales, group = stored["scales"].double().numpy().T, stored["g_idx"].numpy()
    return (codes - zeros[:, group]) * scales[:, group]


def read_awq(stored: dict[str, torch.Tensor], size: int) -> np.ndarray:
    """float64 [out, in] of a layer in the AWQ layout, by its definition."""
    assert {k: str(v.dtype) for k, v in stored.items()} == {
        "qweight": "torch.int32",
        "qzeros": "torch.int32",
        "scales": "torch.float16",
    }

    def unpacked(words: np.ndarray) -> np.ndarray:
        result = np.empty((len(words), 8 * words.shape[1]), dtype=np.int64)
        for row, word in np.ndindex(*words.shape):
            for nibble, output in enumerate(AWQ_ORDER):
                value = int(words.view(np.uint32)[row, word]) >> (4 * nibble) & 15
                result[row, 8 * word + output] = value
        return result

    codes, zeros = unpacked(stored["qweight"].numpy()), unpacked(stored["qzeros"].numpy())
    group = np.arange(len(codes)) // (size if size > 0 else len(codes))
    return ((codes - zeros[group]) * stored["scales"].double().numpy()[group]).T


def parts(reader: ShardReader, prefix: str) -> dict[str, torch.Tensor]:
    names = {n.removeprefix(f"{prefix}."): n for n in reader.names if n.startswith(f"{prefix}.")}
    return {suffix: reader.read(name) for suffix, name in names.items() if suffix != "bias"}


# The layouts themselves


@st.composite
def weights(draw: st.DrawFn, widths: tuple[int, ...]) -> QuantizedTensor:
    bits = draw(st.sampled_from(widths))
    filling = 32 if bits == 3 else 32 // bits
    groups = draw(st.integers(1, 3))
    rows, size = filling * draw(st.integers(1, 2)), filling * draw(st.integers(1, 2))
    suffix = draw(st.sampled_from(["", "-asym"]))
    number = spec(f"int{bits}-" + (f"g{size}" if groups > 1 else "channel") + suffix)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    low, high = -(1 << bits - 1), 1 << bits - 1
    shape = number.scale_shape(rows, groups * size)
    codes = torch.randint(low, high, (rows, groups * size), generator=generator)
    zero = torch.randint(low, high, shape, generator=generator).to(torch.int8)
    scale = torch.randn(shape, generator=generator).to(torch.bfloat16)
    scale[scale == 0] = 1
    scale = scale.clamp(-100, 100)
    return QuantizedTensor(codes.to(torch.int8), scale, zero if suffix else None, number)


@given(q=weights((2, 3, 4, 8)))
@settings(max_examples=30)
def test_the_gptq_layout_holds_codes_zero_points_and_signed_scales(q: QuantizedTensor) -> None:
    less_one = q.spec.symmetric
    stored = gptq.tensors(q, less_one=less_one)
    expected = q.dequantize(torch.float64).numpy()
    assert np.array_equal(read_gptq(stored, q.spec.bits, less_one=less_one), expected)


@given(q=weights((4,)))
@settings(max_examples=20)
def test_the_awq_layout_holds_codes_zero_points_and_signed_scales(q: QuantizedTensor) -> None:
    expected = q.dequantize(torch.float64).numpy()
    assert np.array_equal(read_awq(awq.tensors(q), q.spec.group_size or -1), expected)


def test_words_of_both_layouts_are_the_published_ones() -> None:
    codes = (torch.arange(8).repeat(8, 1) - 8).to(torch.int8)
    scale = torch.ones(8, 1, dtype=torch.bfloat16)
    by_input = gptq.tensors(
        QuantizedTensor(codes, scale, None, spec("int4-channel")), less_one=True
    )
    assert by_input["qweight"].tolist() == [[0x76543210] * 8]
    assert by_input["qzeros"].tolist() == [[0x77777777]]
    q = QuantizedTensor(codes.T.contiguous(), scale, None, spec("int4-channel"))
    by_output = awq.tensors(q)
    assert by_output["qweight"].tolist() == [[0x75316420]] * 8
    assert by_output["qzeros"].tolist() == [[0x88888888 - (1 << 32)]]


def test_three_bit_codes_straddle_words() -> None:
    """Code 10 has its low bits at the end of the first word, its high bit at the next one's start.

    So the original GPTQ packs them.
    """
    codes = torch.full((32, 32), -4, dtype=torch.int8)
    codes[:, 10] = 3
    scale = torch.ones(32, 1, dtype=torch.bfloat16)
    q = QuantizedTensor(codes, scale, None, spec("int3-channel"))
    column = gptq.tensors(q, less_one=True)["qweight"][:, 0].numpy().view(np.uint32).tolist()
    assert column == [0xC0000000, 1, 0]


# Whole checkpoints


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_every_weight_is_what_the_source_stands_for(
    family: str, run: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    """All families; float32 products of codes and scales, so equal to the last bit."""
    require_equal_weights(
        run(family, {"match": LLM, "weights": "int4-g64"}), form, tmp_path / "out"
    )


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_models_of_text_alone_are_exported(
    tiny: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    rule = {"match": LLM, "weights": "int4-g64", "solver": "rtn"}
    recipe = {"version": 1, "rules": [rule]}
    pq.quantize(tiny("llama", dtype=torch.bfloat16), recipe, tmp_path / "run")
    require_equal_weights(tmp_path / "run", form, tmp_path / "out")


def require_equal_weights(source: Path, form: str, out: Path) -> None:
    """Export a checkpoint of two blocks and compare every weight with the source's."""
    result = export(source, form, out)
    opened, reader = open_checkpoint(source), ShardReader(out)
    model = load_model(source, dtype=torch.float32)
    assert result.layers == len(opened.quantized) == 14
    for layer in opened.quantized:
        stored = parts(reader, layer.name)
        values = read_gptq(stored, 4, less_one=True) if form == "gptq" else read_awq(stored, 64)
        expected = model.get_submodule(layer.name).get_parameter("weight").double().numpy()
        assert np.array_equal(values, expected), layer.name
    assert {opened.names.to_module(name) for name in plain_names(opened)} <= reader.names
    assert not [n for n in reader.names if "weight_" in n]


def plain_names(opened: Any) -> set[str]:
    return {name for layer, name in opened.walk() if layer is None}


def test_dense_weights_give_the_logits_of_the_simulation(
    tiny_folder: Path, family: str, run: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    source = run(family, {"match": ALL, "weights": "int4-g64"})
    export(source, "dense", tmp_path / "out", options={"dtype": torch.float32})
    exported = load_float(tmp_path / "out")
    expected = logits(load_model(source, dtype=torch.float32), tiny_folder, calibration_file)
    assert torch.equal(logits(exported, tiny_folder, calibration_file), expected)
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    assert {p.dtype for p in exported.parameters()} == {torch.float32}


def test_dense_weights_keep_the_models_dtype_and_names(
    run: Callable[..., Path], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """As if the model had never been quantized: every header is the source model's."""
    original = tiny("qwen2_vl", dtype=torch.bfloat16)
    export(run("qwen2_vl"), "dense", tmp_path / "out")
    before, after = ShardReader(original), ShardReader(tmp_path / "out")
    assert before.names == after.names
    for name in before.names:
        old, new = before.info(name), after.info(name)
        assert (old.dtype, old.shape) == (new.dtype, new.shape), name
    assert read_json(tmp_path / "out" / "config.json") == read_json(original / "config.json")


def test_dense_weights_undo_rotations_of_inputs(
    run: Callable[..., Path],
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
) -> None:
    """An ordinary linear layer then computes the function; only rounding differs."""
    rule = {"match": LLM, "weights": "int4-g64", "activations": "none"}
    recipe = pq.load_recipe("rotation-gptq-w4a8").with_rules(rule)
    source = run("qwen2_vl", rule, preset=recipe.to_dict(), dtype=torch.float32)
    assert open_checkpoint(source).rotated
    result = export(source, "dense", tmp_path / "out", options={"dtype": torch.float32})
    assert any("rotation" in remark for remark in result.remarks)
    assert not [n for n in ShardReader(tmp_path / "out").names if "hadamard" in n or "signs" in n]
    folder = tiny("qwen2_vl")
    expected = logits(load_model(source), folder, calibration_file)
    actual = logits(load_float(tmp_path / "out"), folder, calibration_file)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(FormatError, match="rotated at run time"):
        export(source, "gptq", tmp_path / "gptq")


def test_dense_drops_quantized_inputs_and_says_so(run: Callable[..., Path], tmp_path: Path) -> None:
    source = run("qwen2_vl", preset="w4a8-static")
    result = export(source, "dense", tmp_path / "out")
    assert result.remarks == ("the inputs or outputs of 14 layers are quantized no more",)
    assert not [n for n in ShardReader(tmp_path / "out").names if "scale" in n]


@pytest.mark.parametrize(
    "weights", ["nvfp4", "mxfp4", "mxfp8", "mxfp6", "fp8-b128", "int5-channel-asym"]
)
def test_every_layout_can_be_made_dense(
    run: Callable[..., Path], tmp_path: Path, weights: str
) -> None:
    """Of whatever tensors a layer consists on disk, none is left beside its weight."""
    source = run("qwen2_vl", {"match": LLM, "weights": weights, "fallback": "nearest"})
    export(source, "dense", tmp_path / "out", options={"dtype": torch.float32})
    expected = dict(load_model(source, dtype=torch.float32).named_parameters())
    found = dict(load_float(tmp_path / "out").named_parameters())
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not [n for n in ShardReader(tmp_path / "out").names if "scale" in n]
    with pytest.raises(FormatError, match="14 of 25"):
        export(source, "awq", tmp_path / "awq")


def test_inputs_of_layers_that_are_stored_dense_are_dropped_too(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    """Formats without a layout are stored dequantized; their inputs are quantized all the same."""
    rules = [
        {"match": LLM, "weights": "int4-g64"},
        {"match": {"modality": "llm", "role": "mlp.down"}, "weights": "fp4-g32"}
        | {"activations": "fp8-e5m2-tensor"},
    ]
    source = run("qwen2_vl", *rules)
    assert [n for n in ShardReader(source).names if n.endswith("down_proj.input_scale")]
    with pytest.raises(FormatError, match="--weights-only"):
        export(source, "gptq", tmp_path / "gptq")
    for form in ("gptq", "awq", "dense"):
        result = export(source, form, tmp_path / form, weights_only=True)
        assert result.remarks == ("the inputs or outputs of 2 layers are quantized no more",)
        names = ShardReader(tmp_path / form).names
        assert [n for n in names if n.endswith("down_proj.weight")]
        assert not [n for n in names if "input_scale" in n]
        assert "prismquant" not in read_json(tmp_path / form / "config.json")


def test_a_quantized_cache_is_dropped_only_when_asked(
    run: Callable[..., Path], tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    preset = {"rules": [{"match": LLM, "weights": "int4-g64"}], "kv_cache": "fp8"}
    source = run("qwen2_vl", preset=preset)
    assert [n for n in ShardReader(source).names if n.endswith("k_scale")]
    with pytest.raises(FormatError, match="cache is quantized, which the format cannot say"):
        export(source, "gptq", tmp_path / "gptq")
    result = export(source, "gptq", tmp_path / "gptq", weights_only=True)
    assert result.remarks == ("the key-value cache is quantized no more",)
    export(source, "dense", tmp_path / "dense")
    for folder in ("gptq", "dense"):
        names = ShardReader(tmp_path / folder).names
        assert not [n for n in names if n.endswith(("k_scale", "v_scale"))]
    load_float(tmp_path / "dense")


def test_compressed_tensors_is_a_copy(run: Callable[..., Path], tmp_path: Path) -> None:
    source = run("qwen2_vl")
    export(source, "compressed-tensors", tmp_path / "out")
    files = [path for path in source.iterdir() if path.is_file()]
    assert files
    for path in files:
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_mixed_widths_are_told_by_rules(run: Callable[..., Path], tmp_path: Path) -> None:
    """Each reader finds each layer's own width under its own paths, and leaves the others alone."""
    source = run(
        "qwen3_vl",
        {"match": LLM, "weights": "int4-g64"},
        {"match": {"modality": "llm", "role": "attn.qkv", "name": "*layers.1.*"}}
        | {"weights": "int8-channel"},
        {"match": {"modality": "llm", "role": "mlp.down"}, "weights": "int2-g32"},
    )
    export(source, "gptq", tmp_path / "out")
    section = read_json(tmp_path / "out" / "quantize_config.json")
    assert section == read_json(tmp_path / "out" / "config.json")["quantization_config"]
    for layer in open_checkpoint(source).layers:
        weights = layer.scheme.weights if layer.scheme else None
        expected = (weights.bits, gptq.group_size(weights)) if weights else None
        for name in (layer.name, vllm_path(layer.name), fused(vllm_path(layer.name))):
            assert found(section, name) == expected, name
    bits = {"int8": 8, "int4": 4, "int2": 2}
    reader, model = ShardReader(tmp_path / "out"), load_model(source, dtype=torch.float32)
    for layer in open_checkpoint(source).quantized:
        stored = parts(reader, layer.name)
        values = read_gptq(stored, bits[layer.scheme.weights.name[:4]], less_one=True)
        weight = model.get_submodule(layer.name).get_parameter("weight").double().numpy()
        assert np.array_equal(values, weight), layer.name


def vllm_path(name: str) -> str:
    if name == "lm_head":
        return "language_model.lm_head"
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1)


def fused(path: str) -> str:
    path = re.sub(r"\b(q|k|v)_proj$", "qkv_proj", path)
    return re.sub(r"\b(gate|up)_proj$", "gate_up_proj", path)


def found(section: dict[str, Any], name: str) -> tuple[int, int] | None:
    """The width and group size that ``dynamic`` gives a layer, as vLLM and GPTQModel read it."""
    for pattern, rule in section["dynamic"].items():
        if re.match(pattern[2:], name):
            return (rule["bits"], rule["group_size"]) if pattern.startswith("+:") else None
    return (section["bits"], section["group_size"])


def test_asymmetric_layers_make_version_two(run: Callable[..., Path], tmp_path: Path) -> None:
    """A zero point of 0 cannot be stored less one."""
    source = run("qwen2_vl", {"match": LLM, "weights": "int4-g64-asym"})
    result = export(source, "gptq", tmp_path / "gptq")
    section = read_json(tmp_path / "gptq" / "quantize_config.json")
    assert (section["checkpoint_format"], section["sym"]) == ("gptq_v2", False)
    assert any("vLLM" in remark for remark in result.remarks)
    export(source, "awq", tmp_path / "awq")
    assert read_json(tmp_path / "awq" / "config.json")["quantization_config"]["zero_point"] is True
    model = load_model(source, dtype=torch.float32)
    readers = ShardReader(tmp_path / "gptq"), ShardReader(tmp_path / "awq")
    for layer in open_checkpoint(source).quantized:
        weight = model.get_submodule(layer.name).get_parameter("weight").double().numpy()
        first = read_gptq(parts(readers[0], layer.name), 4, less_one=False)
        assert np.array_equal(first, weight)
        assert np.array_equal(read_awq(parts(readers[1], layer.name), 64), weight)


def test_unquantized_layers_are_named_for_awq(run: Callable[..., Path], tmp_path: Path) -> None:
    source = run("qwen2_5_vl")
    export(source, "awq", tmp_path / "out")
    section = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    left = {layer.called for layer in open_checkpoint(source).layers if not layer.scheme}
    assert set(section["modules_to_not_convert"]) == left
    assert (section["version"], section["bits"], section["group_size"]) == ("gemm", 4, 128)


def test_a_layer_may_lie_in_two_shards(run: Callable[..., Path], tmp_path: Path) -> None:
    """Writers that cut shards by size do that."""
    source, folder = run("qwen2_vl"), tmp_path / "cut"
    reader = ShardReader(source)
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, folder)
    halves = {f"{n}.safetensors": sorted(reader.names)[n::2] for n in (0, 1)}
    for file, names in halves.items():
        write_tensors(folder / file, {name: reader.read(name) for name in names})
    weight_map = {name: file for file, names in halves.items() for name in names}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    export(folder, "gptq", tmp_path / "one")
    export(source, "gptq", tmp_path / "two")
    one, two = ShardReader(tmp_path / "one"), ShardReader(tmp_path / "two")
    assert one.names == two.names
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.names)


# Refusals


@pytest.mark.parametrize(
    ("form", "weights", "dtype", "message"),
    [
        ("awq", "int8-channel", torch.bfloat16, "integers of 4 bits, not 8"),
        ("gptq", "int5-g128", torch.bfloat16, "integers of 2, 3, 4, 8 bits, not 5"),
        ("gptq", "fp8-channel", torch.bfloat16, "integers, not fp8 channel"),
        ("gptq", "int4-g128", torch.float32, "not all of its float32 scales are float16"),
    ],
)
def test_formats_refuse_what_they_cannot_hold(
    run: Callable[..., Path],
    tmp_path: Path,
    form: str,
    weights: str,
    dtype: torch.dtype,
    message: str,
) -> None:
    source = run("qwen2_vl", {"match": LLM, "weights": weights}, dtype=dtype)
    with pytest.raises(FormatError, match=message) as caught:
        export(source, form, tmp_path / "out")
    told = str(caught.value)
    assert "14 of 25 layers" in told
    assert "model.language_model.layers.{0-1}.mlp.down_proj" in told
    assert not (tmp_path / "out").exists()


def test_awq_refuses_a_second_group_size(run: Callable[..., Path], tmp_path: Path) -> None:
    rule = {"match": {"modality": "llm", "role": "mlp.down"}, "weights": "int4-g32"}
    source = run("qwen2_vl", {"match": LLM, "weights": "int4-g64"}, rule)
    with pytest.raises(FormatError, match="most have groups of 64") as caught:
        export(source, "awq", tmp_path / "out")
    assert "2 of 25" in str(caught.value)


def test_quantized_inputs_are_dropped_only_when_asked(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    source = run("qwen2_vl", preset="w4a8")
    with pytest.raises(FormatError, match="--weights-only"):
        export(source, "gptq", tmp_path / "out")
    result = export(source, "gptq", tmp_path / "out", weights_only=True)
    assert result.remarks == ("the inputs or outputs of 14 layers are quantized no more",)


def test_columns_in_floating_point_are_refused_and_dense_puts_them_back(
    run: Callable[..., Path], tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    split = {
        "name": "split",
        "match": {"role": "mlp.down"},
        "options": {"threshold": 1.0, "columns": 2},
    }
    rule = {"match": LLM, "weights": "int4-g64"}
    source = run("qwen2_vl", preset={"rules": [rule], "transforms": [split]})
    opened = open_checkpoint(source)
    kept = [layer.name for layer in opened.quantized if opened.splits(layer)]
    assert kept, "nothing was split"
    with pytest.raises(FormatError, match="single columns"):
        export(source, "gptq", tmp_path / "gptq")
    assert export(source, "compressed-tensors", tmp_path / "ct").remarks
    export(source, "dense", tmp_path / "out", options={"dtype": torch.float32})
    folder = tiny("qwen2_vl")
    expected = logits(load_model(source, dtype=torch.float32), folder, calibration_file)
    assert torch.equal(logits(load_float(tmp_path / "out"), folder, calibration_file), expected)


def test_folders_in_use_are_refused(run: Callable[..., Path], tmp_path: Path) -> None:
    source = run("qwen2_vl")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(StorageError, match="not empty"):
        export(source, "dense", tmp_path / "used")
    with pytest.raises(StorageError, match="lies in it"):
        export(source, "dense", source / "dense")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["file"]


def test_what_is_no_finished_quantized_checkpoint_is_refused(
    run: Callable[..., Path], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match="not quantized"):
        export(tiny("qwen2_vl"), "gptq", tmp_path / "out")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run("qwen2_vl"), unfinished)
    (unfinished / "config.json").unlink()
    with pytest.raises(StorageError, match="not finished"):
        export(unfinished, "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_formats_and_options_are_refused(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="there is no format 'gtpq'") as caught:
        export(run("qwen2_vl"), "gtpq", tmp_path / "out")
    assert "did you mean 'gptq'" in str(caught.value)
    with pytest.raises(FormatError, match="no option 'dtype'"):
        export(run("qwen2_vl"), "gptq", tmp_path / "out", options={"dtype": torch.float32})


# The folder


@pytest.mark.parametrize("form", ["dense", "gptq", "awq"])
def test_a_folder_is_complete(
    run: Callable[..., Path], tiny: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    source, out = run("qwen3_vl"), tmp_path / "out"
    result = export(source, form, out)
    for name in ("tokenizer.json", "chat_template.jinja", "processor_config.json"):
        original = tiny("qwen3_vl", dtype=torch.bfloat16) / name
        assert (out / name).read_bytes() == original.read_bytes()
    index, reader = read_json(out / "model.safetensors.index.json"), ShardReader(out)
    assert set(index["weight_map"]) == reader.names
    assert index["metadata"]["total_size"] == sum(reader.info(n).nbytes for n in reader.names)
    record = read_json(out / "prismquant" / "export.json")
    assert (record["format"], record["source"]) == (form, str(source))
    assert record["prismquant"] == pq.__version__
    assert result.bytes == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize("share", [0.5, 1])
def test_an_export_that_is_interrupted_leaves_nothing(
    run: Callable[..., Path], tmp_path: Path, share: float
) -> None:
    def stop(done: int, total: int, name: str) -> None:
        if done == int(total * share):
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export(run("qwen2_vl"), "gptq", out, progress=stop)
    assert not out.exists()
    export(run("qwen2_vl"), "gptq", out)
    assert (out / "config.json").exists()
    assert (out / "prismquant" / "export.json").exists()


def test_shards_are_bounded_and_numbered(tmp_path: Path) -> None:
    shards = Shards(tmp_path, limit=1000)
    tensors = {f"t{n}": torch.full((100,), float(n)) for n in range(7)}
    for name, tensor in tensors.items():
        shards.add({name: tensor})
    shards.finish()
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
    ]
    reader = ShardReader(tmp_path)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


def test_equal_exports_have_equal_bytes(run: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(run("qwen2_vl"), "awq", tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert all(
        (tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files
    )


def test_tied_embeddings_stay_tied(run: Callable[..., Path], tmp_path: Path) -> None:
    export(run("qwen2_vl", tie=True), "dense", tmp_path / "out")
    assert not [n for n in ShardReader(tmp_path / "out").names if n.startswith("lm_head")]
    load_float(tmp_path / "out")


def test_the_original_videollama3_layout_is_exported_under_its_names(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    source = run("video_llama_3", layout="remote")
    export(source, "gptq", tmp_path / "out")
    assert "model.layers.0.self_attn.q_proj.qweight" in ShardReader(tmp_path / "out").names
    section = read_json(tmp_path / "out" / "quantize_config.json")
    assert "model.layers.0.self_attn.q_proj" in section["modules_in_block_to_quantize"][0]
    assert found(section, "model.vision_encoder.encoder.layers.0.self_attn.q_proj") is None
    assert found(section, "model.layers.0.self_attn.q_proj") == (4, 128)


def test_names_are_folded_by_their_block() -> None:
    names = [f"m.layers.{n}.up" for n in (0, 1, 2, 5)]
    assert fold_names([*names, "head", "m.layers.3.down"]) == [
        "m.layers.{0-2,5}.up",
        "head",
        "m.layers.3.down",
    ]


def test_the_command_writes_or_says_why_not(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from prismquant.cli import app
    from prismquant.cli.guard import guarded

    def command(*arguments: str) -> int:
        return guarded(lambda: app(list(arguments), standalone_mode=False))

    base = ("export", str(run("qwen2_vl")), "--out", str(tmp_path / "out"))
    assert command(*base, "--format", "dense", "--dtype", "float32", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["format"], printed["layers"]) == ("dense", 14)
    assert command(*base, "--format", "awq") == 1
    assert "not empty" in capsys.readouterr().err
    assert command(*base, "--format", "dense", "--dtype", "int8") == 2


def test_every_format_of_the_table_can_be_built() -> None:
    from prismquant.export.exporters import build_exporter

    for name in EXPORTERS:
        exporter = build_exporter(name)
        assert exporter.name == name
        assert exporter.drops_inputs in ("never", "asked", "always")
    with pytest.raises(PrismQuantError):
        build_exporter("")
