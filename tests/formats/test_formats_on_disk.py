"""Every format that the configuration can declare: stored by us, read by transformers, and the
formats that it cannot declare: read by us alone."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from export.test_export import from_transformers, logits, quantized
from plan.test_plan import check_bytes

import prismquant as pq
from prismquant.errors import FormatError, PlanError
from prismquant.export.compressed_tensors.private_section import read_private
from prismquant.export.load_quantized import load_model
from prismquant.formats.packed import is_declarable
from prismquant.formats.quantization_args import args_of, read_args, spec_of
from prismquant.formats.spec import PRESETS as FORMATS
from prismquant.formats.spec import spec
from prismquant.models.bind import bind
from prismquant.models.float_model import load_float
from prismquant.opening import read_json
from prismquant.plan.bit_layout import layout_of
from prismquant.plan.fallback import fit
from prismquant.recipe.resolve import resolve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

LLM = {"modality": "llm", "role": ["attn", "mlp"]}
LAYOUTS = {
    "fp8-static": "float-quantized",
    "fp8-block": "float-quantized",
    "w4afp8": "pack-quantized",
    "w8a16": "pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "nvfp4a16": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp4a16": "mxfp4-pack-quantized",
    "mxfp6a16": "mxfp6-pack-quantized",
    "mxfp8": "mxfp8-quantized",
}


def agree(out: Path, folder: Path, data: Path) -> None:
    """Both readers give the same logits, and not those of the float model."""
    expected = logits(settled(from_transformers(out), folder, data), folder, data)
    actual = logits(load_model(out), folder, data)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    full = logits(load_float(folder), folder, data)
    assert (actual - full).norm() > 1e-3 * full.norm(), "nothing was quantized"


def settled(model: nn.Module, folder: Path, data: Path) -> nn.Module:
    """The library decompresses on the first pass, MX weights to bfloat16 whatever the model's
    dtype; their values are exact in it."""
    with contextlib.suppress(RuntimeError):
        logits(model, folder, data)
    return torch.nn.Module.float(model)


@pytest.mark.parametrize("preset", LAYOUTS)
def test_transformers_reads_each_layout_as_we_do(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path, preset: str
) -> None:
    folder = tiny("qwen2_5_vl")
    out = quantized(folder, tmp_path / "out", calibration_file, preset)
    section = read_json(out / "config.json")["quantization_config"]
    assert section["format"] == LAYOUTS[preset]
    agree(out, folder, calibration_file)


def test_nvfp4_is_read_alike_on_every_family(
    tiny_folder: Path, calibration_file: Path, tmp_path: Path
) -> None:
    """Static global scales of inputs, dynamic block scales, in every tower."""
    out = quantized(tiny_folder, tmp_path / "out", calibration_file, "nvfp4-all")
    agree(out, tiny_folder, calibration_file)


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ("mxint8", "mxint8-dyn"),
        ("fp8-e5m2-channel", "fp8-e5m2-token"),
        ("fp4-g32", "fp4-g32-dyn"),
        ("mxfp6-e3m2", "mxfp8-e5m2-dyn"),
        ("int4-g32", "fp8-e5m2-tensor"),
        ("mxfp4-ceil", "mxfp4-ceil-dyn"),
    ],
)
def test_what_no_configuration_declares_is_simulated_by_our_loader(
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    weights: str,
    activations: str,
) -> None:
    """Stored, loaded and compared with the same weights without quantized inputs."""
    folder = tiny("qwen2_vl")
    rule = {"match": LLM, "weights": weights, "solver": "rtn"}
    result = pq.quantize(
        folder, {"rules": [rule | {"activations": activations}]}, tmp_path / "a", calibration_file
    )
    pq.quantize(folder, {"rules": [rule]}, tmp_path / "b", calibration_file)
    both, alone = (
        logits(load_model(tmp_path / name), folder, calibration_file) for name in ("a", "b")
    )
    assert 1e-4 < (both - alone).norm() / alone.norm() < 1
    layers = {site.name for site in bind(folder).sites}
    private = read_private(read_json(tmp_path / "a" / "config.json"), layers)
    assert len(private) == 14
    assert {inputs for inputs, _ in private.values()} == {spec(activations)}
    check_bytes(result.plan, tmp_path / "a")
    assert any("only prismquant.load" in remark for remark in result.plan.remarks)


def test_a_rule_that_all_readers_share_needs_no_remark(tiny: Callable[..., Path]) -> None:
    for preset in ("mxfp4", "mxfp8", "nvfp4", "fp8"):
        assert not pq.inspect(tiny("qwen2_vl"), preset).remarks


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_the_words_of_the_configuration_mean_the_format(name: str) -> None:
    """Read back: but for the rule that rounds E8M0 scales, which no reader needs for weights."""
    number = spec(name)
    if not is_declarable(number):
        with pytest.raises(FormatError):
            args_of(number)
        return
    said = args_of(number)
    layout = "" if number.dynamic else layout_of(number, None)
    args = read_args(said, "input_activations" if number.dynamic else "weights")
    back = spec_of(args, layout)
    plain = spec(name.replace("-floor", "").replace("-ceil", ""))
    assert back == plain or number.narrow


def test_nvfp4_shards_that_servers_fuse_have_one_global_scale(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    from prismquant.shards import ShardReader

    folder = tiny("qwen3_vl")
    out = quantized(folder, tmp_path / "out", calibration_file, "nvfp4")
    reader = ShardReader(out)
    found: dict[str, set[float]] = {}
    for site in bind(folder).sites:
        name = f"{site.disk_name}.weight_global_scale"
        if name in reader.names:
            value = float(reader.read(name))
            assert value == 2.0 ** round(torch.tensor(value).log2().item())
            found.setdefault(site.fuse_key or site.name, set()).add(value)
    assert found
    assert all(len(values) == 1 for values in found.values())


def test_fused_shards_with_a_global_scale_must_be_solved_alike(tiny: Callable[..., Path]) -> None:
    rules = [
        {"match": LLM, "weights": "nvfp4"},
        {"match": {"role": "attn.qkv.v"}, "solver": "rtn"},
    ]
    with pytest.raises(PlanError, match="share one global scale"):
        pq.inspect(tiny("qwen2_vl"), {"rules": rules})


def site_of(folder: Path, role: str, **widths: int) -> Any:
    from dataclasses import replace

    site = next(s for s in bind(folder).sites if s.role == role and s.modality == "vision")
    return replace(site, **widths)


@pytest.mark.parametrize(
    ("weights", "inputs", "width", "shards", "nearest", "channel"),
    [
        ("int4-g128", None, 3420, 1, "int4-channel", "int4-channel"),
        ("int4-g128", None, 4304, 1, "int4-channel", "int4-channel"),
        ("int4-g128", None, 5184, 1, "int4-g64", "int4-channel"),
        ("int4-g128", "fp8-g128-dyn", 5184, 1, "int4-g64/fp8-token", "int4-channel/fp8-token"),
        ("int4-g128", None, 5120, 16, "int4-g64", "int4-channel"),
        ("nvfp4", "nvfp4-dyn", 3420, 1, "fp8-channel/fp8-token", "fp8-channel/fp8-token"),
        ("nvfp4", "nvfp4-dyn", 4304, 1, "nvfp4/nvfp4-dyn", "nvfp4/nvfp4-dyn"),
        ("mxfp4", None, 4304, 1, "fp8-channel", "fp8-channel"),
        ("mxint8", "mxint8-dyn", 4304, 1, "int8-channel/int8-token", "int8-channel/int8-token"),
        ("fp8-b128", "fp8-g128-dyn", 4304, 1, "fp8-channel/fp8-token", "fp8-channel/fp8-token"),
    ],
)
def test_a_width_that_does_not_fit_gets_the_nearest_format_that_does(
    tiny: Callable[..., Path],
    weights: str,
    inputs: str | None,
    width: int,
    shards: int,
    nearest: str,
    channel: str,
) -> None:
    """3420 and 4304 are MLP widths of real vision towers."""
    site = site_of(tiny("qwen2_vl"), "mlp.down", in_features=width)
    wanted = spec(weights), spec(inputs) if inputs else None
    for fallback, expected in (("nearest", nearest), ("channel", channel)):
        found = fit(site, *wanted, fallback, shards)
        names = [s.name for s in (found.weights, found.activations) if s is not None]
        assert "/".join(names) == expected
        assert bool(found.note) == ((found.weights, found.activations) != wanted)
    if nearest.split("/")[0] != weights:
        with pytest.raises(PlanError, match="does not divide") as caught:
            fit(site, *wanted, "error", shards)
        assert "--fallback" in caught.value.remedy


def test_a_layer_that_devices_cannot_share_is_refused(tiny: Callable[..., Path]) -> None:
    site = site_of(tiny("qwen2_vl"), "mlp.up", out_features=3420)
    assert fit(site, spec("int4-channel"), None, "error", 4).note == ""
    with pytest.raises(PlanError, match="3420 outputs cannot be split over 8 devices"):
        fit(site, spec("int4-channel"), None, "nearest", 8)


def test_a_plan_for_several_devices_finds_groups_that_are_cut(tiny: Callable[..., Path]) -> None:
    """Widths of 128 in groups of 128, on two devices each."""
    recipe = pq.load_recipe("w4a16")
    folder = tiny("qwen2_vl")
    pq.inspect(folder, recipe)
    with pytest.raises(PlanError, match="64 of its 128 input features on each of 2 devices"):
        pq.inspect(folder, recipe.with_tensor_parallel(2))
    plan = pq.inspect(folder, recipe.with_tensor_parallel(2).with_rules({"fallback": "nearest"}))
    assert {row.config.weights.name for row in plan.quantized} == {"int4-g128", "int4-g64"}
    assert all(
        "int4 g64" in row.note for row in plan.quantized if row.config.weights.group_size == 64
    )


def test_blocks_stay_blocks_when_other_rules_follow() -> None:
    recipe = pq.load_recipe("fp8-block").with_rules({"solver": "rtn"})
    setting = resolve(recipe, modality="llm", role="mlp.up", name="x")
    assert setting.config.weights == spec("fp8-b128")
