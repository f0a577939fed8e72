"""Quantized checkpoints that are damaged, or say two things: refused in words that help."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prismquant.errors import FormatError, ModelError
from prismquant.formats.packed import pack
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.formats.spec import spec
from prismquant.headers import TensorInfo
from prismquant.models.config import import_transformers
from prismquant.shards import ShardReader
from prismquant.sources.quantized_source import FloatReader, QuantizedSource
from prismquant.sources.recognize import quantized_source
from prismquant.storage import write_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

LAYER = "layers.0.up"
FILE = "model.safetensors"
FP8 = torch.float8_e4m3fn
ROWS, COLUMNS = 32, 64


def recognized(
    section: dict[str, Any], infos: Mapping[str, TensorInfo], folder: Path = Path("folder")
) -> QuantizedSource | None:
    config = {"dtype": "float32", "quantization_config": section} if section else {}
    return quantized_source(folder, config, infos, lambda prefix: (prefix,))


def opened(folder: Path, section: dict[str, Any], tensors: dict[str, Tensor]) -> FloatReader:
    """A checkpoint of one layer, by the suffixes of its tensors, as it is shown."""
    write_tensors(folder / FILE, {f"{LAYER}.{name}": tensor for name, tensor in tensors.items()})
    stored = ShardReader(folder)
    source = recognized(section, {name: stored.info(name) for name in stored.names}, folder)
    assert source is not None
    return FloatReader(folder, source)


def refused(folder: Path, section: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """The error's text; it names the file and says what to do."""
    with pytest.raises((FormatError, ModelError)) as failed:
        opened(folder, section, tensors).read(f"{LAYER}.weight")
    assert str(folder / FILE) in str(failed.value.where)
    assert failed.value.remedy
    return str(failed.value)


sides = st.integers(1, 40)


@given(st.tuples(sides, sides), st.tuples(sides, sides), st.tuples(sides, sides))
def test_scales_lie_on_the_grid_that_the_configuration_names(
    shape: tuple[int, int], block: tuple[int, int], scale: tuple[int, int]
) -> None:
    grid = tuple(math.ceil(side / size) for side, size in zip(shape, block, strict=True))
    section = {"quant_method": "fp8", "weight_block_size": list(block)}
    for steps in (grid, scale):
        infos = {
            "a.weight": TensorInfo(FP8, shape, FILE),
            "a.weight_scale_inv": TensorInfo(torch.float32, steps, FILE),
        }
        if steps == grid:
            source = recognized(section, infos)
            assert source is not None
            assert source.weights["a.weight"].shape == shape
            continue
        with pytest.raises(FormatError, match="weight_block_size") as failed:
            recognized(section, infos)
        assert "folder/model.safetensors: a.weight_scale_inv" in str(failed.value)


@pytest.mark.parametrize("size", [128, [0, 16], ["16", "16"], [16]])
def test_blocks_of_no_two_sizes_are_refused(size: object, tmp_path: Path) -> None:
    section = {"quant_method": "fp8", "weight_block_size": size}
    tensors = {"weight": torch.ones(32, 32).to(FP8), "weight_scale_inv": torch.ones(2, 2)}
    with pytest.raises(FormatError, match="weight_block_size is"):
        opened(tmp_path, section, tensors)


def test_integers_beside_fp8_scales(tmp_path: Path) -> None:
    """Bytes that transformers takes for two FP4 numbers each are no integers of eight bits."""
    section = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    codes = torch.randint(-128, 128, (ROWS, COLUMNS // 2), dtype=torch.int8)
    tensors = {"weight": codes, "weight_scale_inv": torch.ones(2, 2)}
    assert "int8" in refused(tmp_path, section, tensors)

    import_transformers()
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    scale = torch.randint(120, 134, (ROWS, COLUMNS // 32), dtype=torch.uint8)
    scale = scale.view(torch.float8_e8m0fnu)
    shown = opened(tmp_path, section, {"weight": codes, "weight_scale_inv": scale})
    wanted = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    assert torch.equal(shown.read(f"{LAYER}.weight"), wanted)


def test_a_weight_or_a_scale_that_is_there_twice(tmp_path: Path) -> None:
    words = {
        "qweight": torch.zeros(COLUMNS // 8, ROWS, dtype=torch.int32),
        "qzeros": torch.zeros(1, ROWS // 8, dtype=torch.int32),
        "scales": torch.ones(1, ROWS),
    }
    section = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}
    assert not opened(tmp_path, section, words).read(f"{LAYER}.weight").any()
    said = refused(tmp_path, section, words | {"weight": torch.ones(ROWS, COLUMNS)})
    assert f"twice: in codes, and as {LAYER}.weight" in said
    assert "scales" in refused(tmp_path, section, words | {"scales": torch.ones(1, ROWS - 1)})

    eight = {"weight": torch.ones(ROWS, COLUMNS).to(FP8), "weight_scale": torch.ones(ROWS, 1)}
    section = {"quant_method": "fbgemm_fp8"}
    opened(tmp_path, section, eight)
    said = refused(tmp_path, section, eight | {"weight_scale_inv": torch.ones(ROWS, 1)})
    assert "two scales beside it" in said
    said = refused(tmp_path, section, eight | {"weight": torch.ones(ROWS, COLUMNS)})
    assert "are no codes" in said
    said = refused(tmp_path, section, {"weight_scale": torch.ones(ROWS, 1)})
    assert f"its weight {LAYER}.weight is not" in said


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scales_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    section = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    scale = torch.ones(2, 4)
    scale[1, 2] = value
    tensors = {"weight": torch.ones(ROWS, COLUMNS).to(FP8), "weight_scale_inv": scale}
    assert "weight_scale_inv" in refused(tmp_path, section, tensors)


def fp8(scale: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    codes = torch.ones(ROWS, COLUMNS).to(FP8)
    return {"quant_method": "fp8"}, {"weight": codes, "weight_scale_inv": scale}


def gptq(scale: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    words = torch.full((COLUMNS // 8, ROWS), 0x11111111, dtype=torch.int32)
    zeros = torch.zeros(len(scale), ROWS // 8, dtype=torch.int32)
    section = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}
    return section, {"qweight": words, "qzeros": zeros, "scales": scale}


def awq(scale: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    words = torch.full((COLUMNS, ROWS // 8), 0x11111111, dtype=torch.int32)
    zeros = torch.zeros(len(scale), ROWS // 8, dtype=torch.int32)
    return {"quant_method": "awq"}, {"qweight": words, "qzeros": zeros, "scales": scale}


def nvfp4(scale: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    codes = torch.full((ROWS, COLUMNS // 2), 0x22, dtype=torch.uint8)
    tensors = {"weight": codes, "weight_scale": scale, "weight_scale_2": torch.ones(())}
    return {"quant_method": "modelopt"}, tensors


@pytest.mark.parametrize(
    ("made", "shape", "dtype", "vanishes"),
    [
        (fp8, (ROWS, 1), torch.float32, False),
        (gptq, (2, ROWS), torch.float32, False),
        (gptq, (2, ROWS), torch.float16, True),
        (awq, (2, ROWS), torch.float16, True),
        (nvfp4, (ROWS, COLUMNS // 16), FP8, True),
    ],
)
def test_scales_of_zero(
    made: Any, shape: tuple[int, ...], dtype: torch.dtype, vanishes: bool, tmp_path: Path
) -> None:
    """One may have underflowed where its dtype is narrow, all cannot; over zeros any may."""
    scale = torch.ones(shape)
    scale[0, 0] = 0
    if vanishes:
        shown = opened(tmp_path, *made(scale.to(dtype))).read(f"{LAYER}.weight")
        assert 0 < int((shown == 0).sum()) < shown.numel()
    else:
        assert "zero over" in refused(tmp_path, *made(scale.to(dtype)))
    section, tensors = made(torch.zeros(shape).to(dtype))
    assert "zero over" in refused(tmp_path, section, tensors)
    coded = next(iter(tensors))
    shown = opened(tmp_path, section, tensors | {coded: torch.zeros_like(tensors[coded])})
    assert not shown.read(f"{LAYER}.weight").any()


def test_factors_of_columns_are_checked(tmp_path: Path) -> None:
    section, tensors = nvfp4(torch.ones(ROWS, COLUMNS // 16).to(FP8))
    factors = torch.ones(COLUMNS)
    opened(tmp_path, section, tensors | {"pre_quant_scale": factors}).read(f"{LAYER}.weight")
    said = refused(tmp_path, section, tensors | {"pre_quant_scale": factors[:-1]})
    assert "pre_quant_scale" in said
    factors[3] = 0
    assert "pre_quant_scale" in refused(tmp_path, section, tensors | {"pre_quant_scale": factors})
    tensors["weight_scale_2"] = torch.ones(3)
    assert "weight_scale_2" in refused(tmp_path, section, tensors)


LAYOUTS = [
    ("int4-g16-asym", "pack-quantized"),
    ("int3-channel", "pack-quantized"),
    ("fp8-channel", "float-quantized"),
    ("int8-channel", "int-quantized"),
    ("nvfp4", "nvfp4-pack-quantized"),
    ("mxfp4", "mxfp4-pack-quantized"),
]


def compressed(name: str, layout: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A layer of ones in a layout of compressed-tensors, and its configuration."""
    form = spec(name)
    steps = form.scale_shape(ROWS, COLUMNS)
    doubled = form.scale == "e4m3"
    scale = torch.ones(steps)
    if form.scale.startswith("e8m0"):
        scale = scale.to(torch.float8_e8m0fnu)
    zero = None if form.symmetric else torch.zeros(steps, dtype=torch.int8)
    codes = torch.ones(ROWS, COLUMNS, dtype=torch.int8)
    made = QuantizedTensor(codes, scale, zero, form, torch.ones(1) if doubled else None)
    weights = {
        "num_bits": form.bits,
        "type": "int" if form.kind == "int" else "float",
        "symmetric": form.symmetric,
        "strategy": "tensor_group" if doubled else str(form.granularity),
        "group_size": form.group_size,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "format": layout}
    section = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }
    return section, pack(made, layout)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_a_damaged_compressed_layer_is_named_with_what_is_missing(
    name: str, layout: str, tmp_path: Path
) -> None:
    section, tensors = compressed(name, layout)
    assert opened(tmp_path, section, tensors).read(f"{LAYER}.weight").shape == (ROWS, COLUMNS)
    for suffix in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != suffix}
        if suffix == "weight_shape":
            opened(tmp_path, section, rest).read(f"{LAYER}.weight")
            continue
        said = refused(tmp_path, section, rest)
        assert f"{LAYER}: a weight of" in said
        assert f"lacks {suffix}" in said
        short = tensors | {suffix: tensors[suffix][: len(tensors[suffix]) - 1]}
        assert LAYER in refused(tmp_path, section, short)
    for suffix in ("weight_scale", "weight_global_scale"):
        if suffix in tensors and not layout.startswith("mx"):
            zero = torch.zeros_like(tensors[suffix])
            assert "calibrate" not in refused(tmp_path, section, tensors | {suffix: zero})
    again = {"weight", "weight_packed"} - set(tensors)
    extra = {suffix: torch.ones(ROWS, COLUMNS) for suffix in again}
    assert "must not hold" in refused(tmp_path, section, tensors | extra)


def test_codes_of_which_the_configuration_says_nothing(tmp_path: Path) -> None:
    section, tensors = compressed("int4-g16-asym", "pack-quantized")
    said = refused(tmp_path, {}, tensors)
    assert "config.json has no quantization_config" in said
    assert "'quark'" in refused(tmp_path, {"quant_method": "quark"}, tensors)
    groups = section["config_groups"]["group_0"]
    section["config_groups"] = {"group_0": groups | {"targets": ["re:.*down$"]}}
    assert f"{LAYER} is stored in codes, and no entry" in refused(tmp_path, section, tensors)
    section["config_groups"] = {
        "group_0": groups | {"weights": groups["weights"] | {"num_bits": 8}}
    }
    assert "does not fit" in refused(tmp_path, section, tensors)
