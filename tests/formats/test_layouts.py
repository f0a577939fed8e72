"""Every number format: what is simulated, what is stored, and what other readers make of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import compressed_tensors_library as library
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prismquant.errors import FormatError, NumericsError
from prismquant.formats.bit_streams import pack_patterns, unpack_patterns
from prismquant.formats.packed import (
    LAYOUTS,
    PackedWeight,
    check_declarable,
    check_layout,
    declared_kind,
    layout_scale,
    layouts_for,
    pack,
    stored_bytes,
    unpack,
)
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.formats.spec import PRESETS, NumberSpec, spec
from prismquant.numerics.affine import quantize, simulate
from prismquant.numerics.grids import FloatGrid
from prismquant.numerics.ranges import RangeRule, weight_scales
from prismquant.numerics.scales import ScaleFormat, global_scale

WEIGHTS = [name for name, number in PRESETS.items() if not number.dynamic]
MICRO = {
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp4-floor": "mxfp4-pack-quantized",
    "mxfp4-ceil": "mxfp4-pack-quantized",
    "mxfp6": "mxfp6-pack-quantized",
    "mxfp6-ceil": "mxfp6-pack-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp8-floor": "mxfp8-quantized",
}
COLUMNS = 256


def edge_weight(seed: int, rows: int, columns: int = COLUMNS) -> Tensor:
    """Random numbers of all sizes, with empty groups, ties, negative zeros and subnormals."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    w *= 2.0 ** torch.randint(-12, 4, (rows, columns // 32, 1), generator=generator).expand(
        -1, -1, 32
    ).reshape(rows, columns)
    w[0, :64] = 0.0
    w[0, 32] = -0.0
    # Ties of E2M1 where the scale is a power of two, saturation beside them, and a subnormal.
    ties = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0, 7.9, 1e-40])
    w[-1, 64:76] = ties
    w[-1, 76:128] = 0.0
    return w


def form_for(w: Tensor, number: NumberSpec, dtype: torch.dtype) -> ScaleFormat:
    divisor = global_scale(w.abs().amax(), number.grid) if number.scale == "e4m3" else None
    return ScaleFormat(dtype, number.scale, divisor)


def quantized(
    w: Tensor,
    number: NumberSpec,
    dtype: torch.dtype = torch.float32,
    form: ScaleFormat | None = None,
) -> QuantizedTensor:
    """Round to nearest with min-max scales."""
    form = form or form_for(w, number, dtype)
    unit = (number.granularity, number.group_size)
    scale, zero = weight_scales(w, number.grid, number.symmetric, *unit, RangeRule(), form)
    codes = quantize(w, scale, zero, number.grid, *unit)
    return QuantizedTensor(codes, scale, zero, number, form.global_scale)


def same_bits(a: Tensor, b: Tensor) -> bool:
    view = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(view), b.contiguous().view(view))


def by_definition(q: QuantizedTensor) -> Iterator[tuple[tuple[int, int], float]]:
    """Each value from its code and scale, one after another in float64."""
    size, number = q.spec.group_size or q.shape[1], q.spec
    points = number.grid.read(torch.arange(-128, 128).to(torch.int8)) if number.bits == 8 else None
    small = (
        None
        if points is not None
        else number.grid.read(torch.arange(1 << number.bits).to(torch.int8))
    )
    scale = q.scale.double()
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            code = int(q.codes[i, j])
            point = float(points[code + 128] if points is not None else small[code])  # type: ignore[index]
            line = i // size if number.block_structure else i
            yield (i, j), point * float(scale[line, j // size])


# --- the property -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTS)
@settings(max_examples=6)
@given(
    seed=st.integers(0, 10_000),
    rows=st.sampled_from([1, 7, 130]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_what_is_simulated_is_what_is_stored(
    name: str, seed: int, rows: int, dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    """Bit for bit, in every format, through every layout that holds it."""
    number = spec(name)
    w = edge_weight(seed, rows).to(dtype)
    q = quantized(w, number, scale_dtype)
    unit = (number.granularity, number.group_size)
    want = simulate(w, q.scale, q.zero_point, number.grid, *unit)
    assert bool(want.isfinite().all())
    assert same_bits(q.dequantize(dtype), want)
    for layout in layouts_for(number):
        tensors = pack(q, layout)
        back = PackedWeight(tensors, number, layout, q.shape).unpack()
        assert same_bits(back.codes, q.codes)
        assert same_bits(back.scale, q.scale)
        assert same_bits(back.dequantize(dtype), want)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert size == stored_bytes(w.shape, number, layout, scale_dtype)
        assert all(t.is_contiguous() for t in tensors.values())
        assert torch.float8_e8m0fnu not in {t.dtype for t in tensors.values()}


def test_a_packed_weight_of_another_shape_or_format_is_refused() -> None:
    q = quantized(edge_weight(0, 4), spec("int4-g128"))
    tensors = pack(q, "pack-quantized")
    packed = PackedWeight(tensors, q.spec, "pack-quantized", (4, COLUMNS + 128))
    with pytest.raises(FormatError, match="weight_shape"):
        packed.unpack()
    with pytest.raises(FormatError, match="lacks weight and must not hold weight_packed"):
        replace(packed, layout="int-quantized").unpack()
    with pytest.raises(FormatError, match="no layout"):
        replace(packed, layout="packed").unpack()


@pytest.mark.parametrize("name", [*MICRO, "mxint8", "mxfp6-e3m2", "mxfp8-e5m2", "fp8-b128"])
def test_values_are_points_times_scales(name: str) -> None:
    q = quantized(edge_weight(1, 3, 128), spec(name))
    values = q.dequantize()
    for index, value in by_definition(q):
        assert float(values[index]) == pytest.approx(value, rel=1e-7, abs=1e-45)


@pytest.mark.parametrize("name", MICRO)
def test_empty_weights_pack_to_empty_tensors(name: str) -> None:
    for shape in ((0, 64), (3, 0)):
        q = quantized(torch.zeros(shape), spec(name), form=one_format(spec(name)))
        tensors = pack(q, MICRO[name])
        assert unpack(tensors, q.spec, MICRO[name]).shape == shape


def one_format(number: NumberSpec) -> ScaleFormat:
    divisor = torch.ones(1) if number.scale == "e4m3" else None
    return ScaleFormat(torch.float32, number.scale, divisor)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp6", "mxfp8"])
def test_every_code_and_every_scale_survives(name: str) -> None:
    number, layout = spec(name), MICRO[name]
    size = number.group_size or 0
    codes = torch.arange(1 << number.bits).to(torch.int8)
    if name == "mxfp8":
        codes = codes[(codes & 0x7F) != 0x7F]
        codes = codes[: len(codes) // size * size]
    if name == "nvfp4":
        stored = torch.arange(1, 0x7F).to(torch.int8).view(torch.float8_e4m3fn)
    else:
        stored = torch.arange(0, 255).to(torch.uint8).view(torch.float8_e8m0fnu)
    lines = codes.repeat(len(stored), max(1, size // len(codes)))
    groups = lines.shape[1] // size
    scale = stored.view(-1, 1).expand(-1, groups).contiguous()
    divisor = None
    if name == "nvfp4":
        divisor = torch.tensor([448.0 * 6 / 0.37])
        scale = scale.float() / divisor
    q = QuantizedTensor(lines, scale, None, number, divisor)
    back = unpack(pack(q, layout), number, layout)
    assert same_bits(back.codes, q.codes)
    assert same_bits(back.scale, q.scale)


# --- check vectors ----------------------------------------------------------------------------


def test_nvfp4_check_vector() -> None:
    """Low nibble first; ties go to the even code; the global scale is a divisor."""
    row = [0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, 6.0, -6.0, 3.0, 0.5, -5.0, 1.0]
    q = quantized(torch.tensor([row]), spec("nvfp4"))
    tensors = pack(q, "nvfp4-pack-quantized")
    assert {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()} == {
        "weight_packed": (torch.uint8, (1, 8)),
        "weight_scale": (torch.float8_e4m3fn, (1, 1)),
        "weight_global_scale": (torch.float32, (1,)),
    }
    assert tensors["weight_global_scale"].tolist() == [256.0]
    assert tensors["weight_scale"].float().tolist() == [[256.0]]
    codes = [0, 0, 2, 2, 4, 4, 6, 6, 8, 10, 7, 15, 5, 1, 14, 2]
    want = [codes[i] | codes[i + 1] << 4 for i in range(0, 16, 2)]
    assert tensors["weight_packed"].tolist() == [want]


def test_mxfp4_check_vector() -> None:
    row = [6.0, -0.5, 7.0, *[0.0] * 29]
    stored = {}
    for name in ("mxfp4", "mxfp4-floor", "mxfp4-ceil"):
        tensors = pack(quantized(torch.tensor([row]), spec(name)), "mxfp4-pack-quantized")
        assert tensors["weight_scale"].dtype == torch.uint8
        stored[name] = (tensors["weight_scale"].tolist(), tensors["weight_packed"][0, :2].tolist())
    # 7 = 1.75 * 4: the plain rule rounds it up, floor lets it saturate, ceil does not.
    assert stored["mxfp4"] == ([[128]], [5 | 8 << 4, 6])
    assert stored["mxfp4-floor"] == ([[127]], [7 | 9 << 4, 7])
    assert stored["mxfp4-ceil"] == ([[128]], [5 | 8 << 4, 6])


def test_mxfp6_check_vector() -> None:
    """Four codes in three bytes, little-endian."""
    codes = torch.tensor([[0x01, 0x3F, 0x20, 0x15]], dtype=torch.int8)
    word = 0x01 | 0x3F << 6 | 0x20 << 12 | 0x15 << 18
    packed = pack_patterns(codes, 6)
    assert packed.tolist() == [[word & 255, word >> 8 & 255, word >> 16]]
    assert torch.equal(unpack_patterns(packed, 6, 1, 4), codes)


@given(bits=st.integers(2, 7), columns=st.integers(0, 40), seed=st.integers(0, 1000))
def test_patterns_are_a_little_endian_stream_of_bytes(bits: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (3, columns), generator=generator, dtype=torch.int8)
    packed = pack_patterns(codes, bits)
    for row, line in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum(code << (i * bits) for i, code in enumerate(row))
        assert bytes(line) == stream.to_bytes(-(-columns * bits // 8), "little")
    assert torch.equal(unpack_patterns(packed, bits, 3, columns), codes)


# --- other readers ----------------------------------------------------------------------------


def library_scheme(number: NumberSpec) -> object:
    strategy = {"nvfp4": "tensor_group"}.get(number.name, number.granularity.value)
    dtypes = {"e4m3": torch.float8_e4m3fn, "float": None}
    args = library.QuantizationArgs(
        num_bits=number.bits,
        type="int" if number.kind == "int" else "float",
        symmetric=True,
        strategy=strategy,
        group_size=None if number.block_structure else number.group_size,
        block_structure=None if number.block_structure is None else list(number.block_structure),
        scale_dtype=dtypes.get(number.scale, torch.uint8),
    )
    return library.QuantizationScheme(targets=["Linear"], weights=args)


COMPRESSORS = {
    "nvfp4-pack-quantized": library.NVFP4PackedCompressor,
    "mxfp4-pack-quantized": library.MXFP4PackedCompressor,
    "mxfp6-pack-quantized": library.MXFP6PackedCompressor,
    "mxfp8-quantized": library.MXFP8QuantizationCompressor,
}


@pytest.mark.parametrize(("name", "layout"), MICRO.items())
def test_the_library_writes_and_reads_the_same_bits(name: str, layout: str) -> None:
    number, w = spec(name), edge_weight(2, 8)
    # A negative number that rounds to zero keeps its sign there too, but not a negative zero.
    w[w == 0] = 0.0
    q = quantized(w, number)
    ours, scheme = pack(q, layout), library_scheme(number)
    compressor = COMPRESSORS[layout]
    scale = q.scale.float()
    state = {"weight": w, "weight_scale": scale}
    if q.global_scale is not None:
        state["weight_scale"] = scale * q.global_scale
        state["weight_global_scale"] = q.global_scale
    theirs = compressor.compress(state, scheme)
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        assert same_bits(tensor, theirs[key].to(tensor.dtype)), key
    read = compressor.decompress(ours, scheme)["weight"]
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, q.dequantize(torch.bfloat16))


@pytest.mark.parametrize("shape", [(256, 256), (300, 128), (5, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_library_writes_and_reads_the_same_blocks(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    number, w = spec("fp8-b128"), edge_weight(3, *shape)
    q = quantized(w, number, dtype)
    ours, scheme = pack(q, "float-quantized"), library_scheme(number)
    assert tuple(ours["weight_scale"].shape) == (-(-shape[0] // 128), shape[1] // 128)
    state = {"weight": w, "weight_scale": q.scale.float()}
    theirs = library.FloatQuantizationCompressor.compress(state, scheme)
    assert same_bits(ours["weight"], theirs["weight"])
    read = library.FloatQuantizationCompressor.decompress(ours, scheme)["weight"]
    assert torch.equal(read, q.dequantize(dtype))


@pytest.mark.parametrize("name", ["fp8-channel", "fp8-tensor", "fp8-b128"])
def test_naive_quantized_is_read_by_the_library(name: str) -> None:
    number, w = spec(name), edge_weight(4, 8)
    q = quantized(w, number, torch.bfloat16)
    ours = pack(q, "naive-quantized")
    read = library.NaiveQuantizationCompressor.decompress(ours, library_scheme(number))["weight"]
    assert torch.equal(read, q.dequantize(torch.bfloat16))


@pytest.mark.parametrize(
    "name", ["nvfp4-dyn", "mxfp4-dyn", "mxfp6-dyn", "mxfp8-dyn", "fp8-g128-dyn"]
)
def test_dynamic_activations_are_those_of_the_library(name: str) -> None:
    number = spec(name)
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(5))
    divisor = global_scale(x.abs().amax(), number.grid) if number.scale == "e4m3" else None
    args = library.QuantizationArgs(
        num_bits=number.bits,
        type="float",
        symmetric=True,
        strategy="tensor_group" if number.scale == "e4m3" else "group",
        group_size=number.group_size,
        dynamic="local" if number.scale == "e4m3" else True,
        scale_dtype={"e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}.get(number.scale),
    )
    scale, zero = library.compute_dynamic_scales_and_zp(x, args, None, global_scale=divisor)
    want = library.fake_quantize(x, scale, zero, args, global_scale=divisor)
    unit = (number.granularity, number.group_size)
    form = ScaleFormat(x.dtype, number.scale, divisor)
    own, _ = weight_scales(x.view(-1, 256), number.grid, True, *unit, RangeRule(), form)
    assert torch.equal(simulate(x.view(-1, 256), own, None, number.grid, *unit).view_as(x), want)


def test_the_formula_of_modelopt_gives_the_same_bits() -> None:
    """There the global scale is a factor, our divisor's reciprocal: exact, being a power of two."""
    w = edge_weight(6, 8)
    q = quantized(w, spec("nvfp4"))
    tensors = pack(q, "nvfp4-pack-quantized")
    weight_scale_2 = 1 / tensors["weight_global_scale"]
    points = FloatGrid("e2m1").read(q.codes).view(8, -1, 16)
    scale = (tensors["weight_scale"].float() * weight_scale_2).unsqueeze(-1)
    assert same_bits((points * scale).view(8, -1), q.dequantize())


def test_any_global_scale_is_read() -> None:
    """Other tools take the quotient as it comes, and may write it without an axis."""
    q = quantized(edge_weight(7, 4), spec("nvfp4"))
    tensors = pack(q, "nvfp4-pack-quantized")
    tensors["weight_global_scale"] = torch.tensor(448 * 6 / 3.21)
    read = unpack(tensors, q.spec, "nvfp4-pack-quantized")
    tensors["weight_global_scale"] = tensors["weight_global_scale"].view(1)
    library_read = library.NVFP4PackedCompressor.decompress(tensors, library_scheme(q.spec))
    assert torch.equal(read.dequantize(torch.bfloat16), library_read["weight"])
    again = pack(read, "nvfp4-pack-quantized")
    assert same_bits(again["weight_scale"], tensors["weight_scale"])
    assert again["weight_global_scale"].shape == (1,)


def test_e8m0_scales_are_read_in_either_dtype() -> None:
    q = quantized(edge_weight(8, 4), spec("mxfp8"))
    tensors = pack(q, "mxfp8-quantized")
    own = tensors | {"weight_scale": tensors["weight_scale"].view(torch.float8_e8m0fnu)}
    for stored in (tensors, own):
        assert same_bits(unpack(stored, q.spec, "mxfp8-quantized").dequantize(), q.dequantize())


def test_a_scale_of_a_tensor_may_come_without_an_axis() -> None:
    q = quantized(edge_weight(8, 4), spec("fp8-tensor"))
    tensors = pack(q, "float-quantized")
    tensors["weight_scale"] = tensors["weight_scale"].reshape(())
    assert same_bits(unpack(tensors, q.spec, "float-quantized").dequantize(), q.dequantize())


# --- refusals ---------------------------------------------------------------------------------


def test_every_format_of_weights_has_its_layouts_or_none() -> None:
    dense = {name for name in WEIGHTS if not layouts_for(spec(name))}
    # E2M1 with float scales, E5M2, E3M2 and MXINT8 are in no layout.
    assert dense == {
        name
        for name in WEIGHTS
        if name.startswith(("fp4", "fp8-e5m2", "mxfp6-e3m2", "mxfp8-e5m2", "mxint8"))
        or name == "int8-tensor-asym"
    }
    assert layouts_for(spec("fp8-channel")) == ("float-quantized", "naive-quantized")
    assert layouts_for(spec("nvfp4-dyn")) == ()


def test_layouts_say_what_their_scales_are() -> None:
    scales = {layout: layout_scale(layout) for layout in LAYOUTS}
    assert scales["nvfp4-pack-quantized"] == "e4m3"
    assert {scales[layout] for layout in LAYOUTS if layout.startswith("mx")} == {"e8m0"}
    assert scales["pack-quantized"] == scales["naive-quantized"] == "float"
    with pytest.raises(FormatError, match="no layout 'mx'"):
        layout_scale("mx")


@pytest.mark.parametrize(
    ("name", "layout", "told"),
    [
        ("mxfp4", "nvfp4-pack-quantized", "use the layout mxfp4-pack-quantized"),
        ("fp8-b128", "int-quantized", "use the layout float-quantized or naive-quantized"),
        ("int8-b128", "int-quantized", "cannot have block granularity"),
        ("int4-b128", "pack-quantized", "channel or group granularity, not block"),
        ("mxfp8-e5m2", "mxfp8-quantized", "store them dense"),
        ("mxint8", "int-quantized", "store them dense"),
        ("fp4-g16", "nvfp4-pack-quantized", "store them dense"),
        ("nvfp4-dyn", "nvfp4-pack-quantized", "activations"),
    ],
)
def test_layouts_refuse_what_they_cannot_hold(name: str, layout: str, told: str) -> None:
    with pytest.raises(FormatError, match=told):
        check_layout(spec(name), layout)


def damaged(tensors: dict[str, Tensor], **changes: Tensor) -> dict[str, Tensor]:
    return tensors | changes


def test_damaged_tensors_are_refused() -> None:
    nv = pack(quantized(edge_weight(9, 4), spec("nvfp4")), "nvfp4-pack-quantized")
    mx = pack(quantized(edge_weight(9, 4), spec("mxfp8")), "mxfp8-quantized")
    cases = [
        ("nvfp4", damaged(nv, weight_global_scale=torch.zeros(1)), "cannot be 0"),
        ("nvfp4", damaged(nv, weight_scale=nv["weight_scale"].float()), "are float8_e4m3fn"),
        ("nvfp4", damaged(nv, weight_packed=nv["weight_packed"].int()), "packed into uint8"),
        ("nvfp4", {k: v for k, v in nv.items() if k != "weight_global_scale"}, "lacks"),
        ("nvfp4", damaged(nv, weight_packed=nv["weight_packed"].view(-1)), "two axes"),
        ("mxfp8", damaged(mx, weight_scale=torch.full_like(mx["weight_scale"], 255)), "no number"),
        ("mxfp8", damaged(mx, weight_scale=mx["weight_scale"].float()), "uint8 or float8_e8m0fnu"),
        ("mxfp8", damaged(mx, weight=mx["weight"].float()), "are float8_e4m3fn"),
    ]
    for name, tensors, told in cases:
        with pytest.raises(FormatError, match=told):
            unpack(tensors, spec(name), MICRO[name])
    with pytest.raises(FormatError, match="expected"):
        unpack(mx, spec("mxfp8"), "mxfp8-quantized", (4, 128))


def test_a_pattern_beyond_the_width_is_refused_before_it_corrupts_its_neighbours() -> None:
    q = quantized(edge_weight(9, 4), spec("mxfp4"))
    broken = QuantizedTensor(q.codes | 16, q.scale, None, q.spec)
    with pytest.raises(FormatError, match=r"outside \[0, 15\]"):
        pack(broken, "mxfp4-pack-quantized")


def test_parts_of_a_weight_must_fit_its_kind_of_scale() -> None:
    nv, mx = (quantized(edge_weight(9, 4), spec(name)) for name in ("nvfp4", "mxfp4"))
    cases = [
        (nv, {"global_scale": None}, "no global scale"),
        (nv, {"scale": nv.scale.half()}, "must be float32"),
        (nv, {"global_scale": torch.tensor(2.0)}, r"float32 \[1\]"),
        (mx, {"global_scale": torch.ones(1)}, "a global scale"),
        (mx, {"scale": mx.scale.float()}, "must be float8_e8m0fnu"),
    ]
    for q, change, told in cases:
        parts = {"codes": q.codes, "scale": q.scale, "zero_point": None, "spec": q.spec}
        with pytest.raises(FormatError, match=told):
            QuantizedTensor(**parts | {"global_scale": q.global_scale} | change)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["nvfp4", "mxfp6", "mxint8", "fp8-b128"])
def test_infinities_are_refused(name: str) -> None:
    w = edge_weight(0, 4)
    w[2, 5] = float("inf")
    with pytest.raises(NumericsError, match="infinite"):
        quantized(w, spec(name), form=one_format(spec(name)))


def test_configurations_can_say_some_formats_only() -> None:
    for name in ("nvfp4", "mxfp4-dyn", "mxfp6", "mxfp8", "fp8-b128", "fp8-g128-dyn"):
        check_declarable(spec(name))
        assert declared_kind("float", spec(name).bits) == spec(name).kind
    for name in ("mxfp8-e5m2", "mxfp6-e3m2-dyn", "mxint8-dyn"):
        with pytest.raises(FormatError, match="cannot declare"):
            check_declarable(spec(name))
