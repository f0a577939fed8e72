"""Products with weights in codes: each backend against float64, for each format that we write."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prismquant.errors import NumericsError
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.formats.spec import NumberSpec
from prismquant.kernels.dispatch import OPS, PACKED_LINEAR, use
from prismquant.kernels.tiled_weight import TiledWeight, parts_of
from prismquant.numerics.grids import FloatGrid
from prismquant.numerics.kinds import Granularity

GROUP, CHANNEL = Granularity.GROUP, Granularity.CHANNEL
INTEGERS = [
    NumberSpec(bits, granularity, size, symmetric)
    for bits in range(2, 9)
    for granularity, size in ((CHANNEL, None), (GROUP, 32))
    for symmetric in (True, False)
]
FLOATS = [
    NumberSpec(8, CHANNEL, kind="e4m3"),
    NumberSpec(8, Granularity.TENSOR, kind="e4m3"),
    NumberSpec(8, Granularity.BLOCK, 32, kind="e4m3"),
    NumberSpec(8, GROUP, 32, kind="e5m2", scale="e8m0"),
    NumberSpec(6, GROUP, 32, kind="e2m3", scale="e8m0"),
    NumberSpec(6, GROUP, 32, kind="e3m2", scale="e8m0"),
    NumberSpec(4, GROUP, 32, kind="e2m1", scale="e8m0"),
    NumberSpec(4, GROUP, 16, kind="e2m1", scale="e4m3"),
]


def random_weight(
    spec: NumberSpec, rows: int = 70, columns: int = 96, *, reordered: bool = False
) -> QuantizedTensor:
    """Codes of a format at random, all that it has among them, with scales of its kind."""
    generator = torch.Generator().manual_seed(rows * columns + spec.bits)
    grid = spec.grid
    if isinstance(grid, FloatGrid):
        codes = torch.randint(0, 1 << spec.bits, (rows, columns), generator=generator)
        most = 1 << spec.bits - 1
        magnitudes = grid.read(torch.arange(most).to(torch.int8))
        real = magnitudes.isfinite() & (magnitudes <= grid.largest)
        codes = torch.where(real[codes % most], codes, 0)
    else:
        codes = torch.randint(grid.qmin, grid.qmax + 1, (rows, columns), generator=generator)
    shape = spec.scale_shape(rows, columns)
    scale = torch.rand(shape, generator=generator) + 0.5
    divisor = None
    if spec.scale == "e8m0":
        scale = torch.exp2(torch.randint(-3, 4, shape, generator=generator).float())
        scale = scale.to(torch.float8_e8m0fnu)
    elif spec.scale == "e4m3":
        divisor = torch.tensor([3.7])
        scale = scale.to(torch.float8_e4m3fn).float() / divisor
    zero = None
    if not spec.symmetric:
        zero = torch.randint(grid.qmin, grid.qmax + 1, shape, generator=generator).to(torch.int8)
    index = None
    if reordered:
        order = torch.randperm(columns, generator=generator)
        index = torch.arange(columns)[order] // (spec.group_size or 1)
    return QuantizedTensor(codes.to(torch.int8), scale, zero, spec, divisor, index)


@pytest.mark.parametrize("spec", [*INTEGERS, *FLOATS], ids=NumberSpec.describe)
def test_every_backend_multiplies_as_float64_does(spec: NumberSpec) -> None:
    weight = random_weight(spec, reordered=spec.granularity == GROUP)
    tiled, values = TiledWeight.of(weight), weight.dequantize(torch.float64)
    assert torch.equal(tiled.dequantize(slice(0, 70), torch.float64), values)
    for rows in (1, 5, 40):
        x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows))
        truth = x.double() @ values.T
        for backend in PACKED_LINEAR.homes:
            with use(backend):
                if backend == "numba" and rows == 40:
                    with pytest.raises(NumericsError, match="rows at most"):
                        PACKED_LINEAR(x, tiled)
                    continue
                assert PACKED_LINEAR.choose(x, tiled).backend == backend
                result = PACKED_LINEAR(x, tiled)
            assert result.dtype == torch.float32
            error = (result.double() - truth).norm() / truth.norm()
            assert error < 1e-6, (backend, rows, float(error))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_keep_their_dtype(dtype: torch.dtype) -> None:
    weight = random_weight(INTEGERS[9])
    tiled, values = TiledWeight.of(weight), weight.dequantize(torch.float64)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = PACKED_LINEAR(x, tiled)
    assert result.dtype == dtype
    truth = x.double() @ values.T
    assert (result.double() - truth).norm() < torch.finfo(dtype).eps * truth.norm()


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    size=st.sampled_from([1, 3, 8, 24, 32, 100, 300]),
    inputs=st.integers(0, 6),
)
def test_any_shape_is_multiplied(bits: int, rows: int, groups: int, size: int, inputs: int) -> None:
    weight = random_weight(NumberSpec(bits, GROUP, size, symmetric=False), rows, groups * size)
    tiled, values = TiledWeight.of(weight), weight.dequantize(torch.float64)
    x = torch.randn(inputs, groups * size, generator=torch.Generator().manual_seed(bits))
    for backend in PACKED_LINEAR.homes:
        with use(backend):
            result = PACKED_LINEAR(x, tiled)
        assert result.shape == (inputs, rows)
        # What rounding can do to sums of this many products, two of them about zero points.
        bound = 1e-6 * (x.double().abs() @ values.abs().T + 600 * x.double().abs().sum(1)[:, None])
        assert ((result.double() - x.double() @ values.T).abs() <= bound + 1e-30).all(), backend


@pytest.mark.parametrize("spec", [*INTEGERS, *FLOATS], ids=NumberSpec.describe)
def test_tiles_take_the_memory_of_the_codes(spec: NumberSpec) -> None:
    tiled = TiledWeight.of(random_weight(spec, 128, 128))
    assert tiled.words.nbytes == 128 * 128 * spec.bits // 8
    if spec.scale != "float":
        assert tiled.scale.dtype == torch.bfloat16


def test_codes_are_cut_into_parts() -> None:
    assert [parts_of(bits) for bits in range(2, 9)] == [
        *((2,), (2, 1), (4,), (4, 1), (4, 2), (4, 2, 1), (8,)),
    ]


def test_a_backend_that_no_operation_has_is_refused() -> None:
    with pytest.raises(NumericsError, match="no backend 'nmba'"), use("nmba"):
        pass
    assert PACKED_LINEAR in OPS
