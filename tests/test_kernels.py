"""Kernels for GPUs: what they take, and that they do what torch does.

Tests of the kernel itself need the package ``triton`` and a GPU, or its interpreter:
``TRITON_INTERPRET=1 pytest tests/test_kernels.py``.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from prismquant.algorithms import statistics
from prismquant.algorithms.base import LayerProblem
from prismquant.algorithms.gptq import GPTQ
from prismquant.algorithms.statistics import HessianRecord
from prismquant.errors import FormatError
from prismquant.formats.spec import spec
from prismquant.kernels import products, sweep
from prismquant.kernels.sweep import MOST_COLUMNS, ScaleLines, round_columns
from prismquant.numerics.grids import FLOAT_KINDS, FloatGrid, Grid, IntGrid
from prismquant.numerics.ranges import RangeRule

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="the package triton is not installed")
runs_kernel = pytest.mark.skipif(
    not INSTALLED or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs the package triton, and a GPU or TRITON_INTERPRET=1",
)
GRIDS = [IntGrid(bits) for bits in range(2, 9)] + [IntGrid(4, narrow=True)]
GRIDS += [FloatGrid(kind) for kind in FLOAT_KINDS]
# What is written beside a result shows here.
CANARY = -777.0


class Operations(TorchDispatchMode):
    """Notes which operations of torch run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_on_a_gpu_are_multiplied_as_they_are_and_summed_in_float32(dtype):
    with FakeTensorMode():
        x = torch.empty(6, 4, dtype=dtype, device="cuda")
        factors, weights = statistics._factors(x, None)
        with Operations() as seen:
            result = products.token_product(factors, factors)
    assert weights is None
    assert (result.dtype, result.shape) == (torch.float32, (4, 4))
    assert "aten.mm.dtype" in seen.names
    assert not any("to_copy" in name for name in seen.names)


def test_float32_inputs_on_a_gpu_are_multiplied_in_float32():
    with FakeTensorMode():
        x = torch.empty(6, 4, device="cuda")
        factors, _ = statistics._factors(x, None)
        with Operations() as seen:
            products.token_product(factors, factors)
    assert "aten.mm.default" in seen.names
    assert "aten.mm.dtype" not in seen.names


def test_what_tensor_cores_do_not_multiply_exactly_becomes_float32(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert products.supports(cpu, torch.float32)
    assert not products.supports(cpu, torch.bfloat16)
    assert not products.supports(gpu, torch.float64)
    assert not products.supports(torch.device("mps"), torch.float16)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not products.supports(gpu, torch.bfloat16)
    assert products.supports(gpu, torch.float32)


def test_only_weights_that_change_nothing_leave_inputs_narrow(monkeypatch):
    """A weighted bfloat16 would have to be rounded."""
    monkeypatch.setattr(products, "supports", lambda device, dtype: True)
    x, ones = normal(5, 3, seed=0).bfloat16(), torch.ones(5, 1)
    kept, weights = statistics._factors(x, ones)
    assert kept is x
    assert weights is None
    wide, weights = statistics._factors(x, 3 * ones)
    assert torch.equal(wide, x.float())
    assert torch.equal(weights, 3 * ones)
    wide, weights = statistics._factors(x.float(), ones)
    assert weights is ones


@pytest.mark.parametrize("weights", [None, torch.ones(40), torch.arange(40) % 3])
def test_second_moments_of_narrow_inputs_are_those_of_the_same_numbers_in_float32(weights):
    x = normal(40, 24, seed=1).to(DEVICE, torch.bfloat16)
    narrow, wide = (HessianRecord(24, DEVICE) for _ in range(2))
    narrow.update(x, weights)
    wide.update(x.float(), weights)
    assert narrow.count == wide.count
    torch.testing.assert_close(narrow.mean(), wide.mean(), rtol=1e-5, atol=1e-6)


# The sweep: where it runs


def test_a_processor_sweeps_with_torch():
    assert not sweep.supports(torch.device("cpu"), IntGrid(4))
    assert GPTQ().solve(problem_of("int4-g16", device="cpu")).notes["kernel"] == "torch"


def test_other_and_older_gpus_sweep_with_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not sweep.supports(torch.device("cuda"), IntGrid(4))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not sweep.supports(torch.device("cuda"), IntGrid(4))


@pytest.mark.parametrize("error", [ImportError, RuntimeError, FileNotFoundError])
def test_a_gpu_without_triton_or_a_compiler_sweeps_with_torch(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error("no such thing")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(sweep, "round_columns", fail)
    with FakeTensorMode():
        assert not sweep.supports(torch.device("cuda"), IntGrid(4))
        monkeypatch.setattr(sweep, "round_columns", lambda *args, **kwargs: None)
        assert sweep.supports(torch.device("cuda"), IntGrid(4))


def test_a_missing_package_is_an_import_error_that_supports_expects(monkeypatch):
    monkeypatch.setitem(sys.modules, "prismquant.kernels.triton_sweep", None)
    monkeypatch.delattr("prismquant.kernels.triton_sweep", raising=False)
    with pytest.raises(ImportError):
        Block.of(IntGrid(4), 2, 3).round()


def test_nothing_imports_triton_before_a_device_asks():
    script = (
        "import sys, torch; before = 'triton' in sys.modules; import prismquant.algorithms.gptq; "
        "assert before or 'triton' not in sys.modules"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr


# The sweep: what it computes


@dataclass(frozen=True)
class Block:
    """Arguments of the kernel, each a part of something larger, and what it fills."""

    targets: Tensor
    weights: Tensor
    coefficients: Tensor
    scales: ScaleLines
    grid: Grid
    errors: Tensor
    points: Tensor

    @staticmethod
    def of(grid: Grid, columns: int, rows: int, *, zeros: bool = False, seed: int = 0) -> Block:
        def inside(values: Tensor) -> Tensor:
            whole = torch.full((len(values) + 2, values.shape[1] + 5), CANARY, device=DEVICE)
            part = whole[1:-1, 2:-3]
            part.copy_(values)
            return part

        weights = normal(columns, rows, seed=seed)
        coefficients = normal(columns, columns, seed=seed + 1) / math.sqrt(columns)
        # What is not below the diagonal is not read.
        coefficients[torch.ones(columns, columns).triu().bool()] = math.nan
        groups = 1 + columns // 7
        steps = 0.05 + normal(groups, rows, seed=seed + 2).abs() / grid.span
        generator = torch.Generator().manual_seed(seed + 3)
        lines = torch.randint(0, groups, (columns,), generator=generator)
        shifts = None
        if zeros:
            shifts = inside(torch.randint(-2, 2, (groups, rows), generator=generator).float())
        return Block(
            inside(weights + 0.1 * normal(columns, rows, seed=seed + 4)),
            inside(weights),
            inside(coefficients),
            ScaleLines(inside(steps), shifts, lines.to(DEVICE)),
            grid,
            inside(torch.zeros(columns, rows)),
            inside(torch.zeros(columns, rows)),
        )

    def round(self) -> None:
        round_columns(
            self.targets,
            self.weights,
            self.coefficients,
            self.scales,
            self.grid,
            errors=self.errors,
            points=self.points,
        )


def around(part: Tensor) -> Tensor:
    """What lies around the part of a larger matrix."""
    whole = part._base
    assert whole is not None
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside[1:-1, 2:-3] = False
    return whole[outside]


@runs_kernel
@settings(deadline=None, max_examples=25)
@given(
    grid=st.sampled_from(GRIDS),
    columns=st.sampled_from([1, 2, 15, 16, 31, 128]),
    rows=st.sampled_from([1, 5, 32, 33]),
    zeros=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_column_is_the_nearest_point_to_a_float64_target(grid, columns, rows, zeros, seed):
    block = Block.of(grid, columns, rows, zeros=zeros and isinstance(grid, IntGrid), seed=seed)
    start = block.targets.clone()
    block.round()
    step = block.scales.steps[block.scales.lines]
    zero = torch.zeros_like(step)
    if block.scales.zeros is not None:
        zero = block.scales.zeros[block.scales.lines]
    # Errors are those of the points, to the bit.
    assert torch.equal(block.errors, block.weights - (block.points - zero) * step)
    below = torch.tril(block.coefficients, -1).nan_to_num().double()
    exact = start.double() + below @ block.errors.double()
    reach = start.abs().double() + below.abs() @ block.errors.abs().double()
    assert bool(((block.targets - exact).abs() <= 1e-5 * reach).all())
    # Points are what torch makes of the same targets.
    assert torch.equal(block.points, grid.round_(block.targets / step + zero))
    for part in (block.targets, block.weights, block.errors, block.points):
        assert bool((around(part) == CANARY).all())


@runs_kernel
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_points_ties_and_what_lies_beyond_round_as_in_torch(grid):
    """To the bit, the sign of zero included."""
    if isinstance(grid, IntGrid):
        points = torch.arange(grid.qmin, grid.qmax + 1).float()
    else:
        codes = torch.arange(2**grid.bits).to(torch.int8)
        points = grid.read(codes)
        points = points[points.isfinite()].unique()
    ties = (points[1:] + points[:-1]) / 2
    up, down = (ties.nextafter(torch.tensor(end)) for end in (math.inf, -math.inf))
    zeros = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    values = torch.cat([points, ties, 3 * points, up, down, zeros]).unsqueeze(0).to(DEVICE)
    one, zero = torch.ones_like(values), torch.zeros(1, 1, device=DEVICE)
    found, errors = torch.empty_like(values), torch.empty_like(values)
    scales = ScaleLines(one, None, torch.zeros(1, dtype=torch.int64, device=DEVICE))
    round_columns(values.clone(), values, zero, scales, grid, errors=errors, points=found)
    expected = grid.round_(values.clone())
    if isinstance(grid, IntGrid):
        assert torch.equal(found, expected)
    else:
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(errors, values - expected)


@needs_triton
def test_what_the_kernel_cannot_address_is_refused():
    many = Block.of(IntGrid(4), MOST_COLUMNS + 1, 1)
    with pytest.raises(FormatError, match="129"):
        many.round()
    block = Block.of(IntGrid(4), 4, 6)
    turned = torch.zeros(6, 4, device=DEVICE).T
    with pytest.raises(FormatError, match="contiguous"):
        round_columns(
            turned, block.weights, block.coefficients, block.scales, block.grid,
            errors=block.errors, points=block.points,
        )  # fmt: skip


# The sweep in a solve


def problem_of(
    name: str, rows: tuple[int, ...] = (20, 7), features: int = 144, device: str = DEVICE
) -> LayerProblem:
    mixed = normal(400, features // 4, seed=10) @ normal(features // 4, features, seed=11)
    record = HessianRecord(features, device)
    record.update(mixed / math.sqrt(features // 4) + 0.3 * normal(400, features, seed=12))
    weights = tuple(normal(r, features, seed=20 + i).to(device) for i, r in enumerate(rows))
    names = tuple(f"layers.0.{i}" for i in range(len(rows)))
    rule = RangeRule("minmax", norm=2.0)
    return LayerProblem(names, weights, spec(name), rule, torch.bfloat16, record.mean())


@runs_kernel
@pytest.mark.parametrize(
    "name",
    ["int4-g16", "int2-channel", "int3-g16-asym", "int8-tensor", "fp4-g16", "fp8-channel", "nvfp4"],
)
def test_a_solve_with_the_kernel_is_that_with_torch(name, monkeypatch):
    """Sweep and descent; no weight of these lies so near a tie that the order of sums decides."""
    problem, solver = problem_of(name), GPTQ(refine_passes=1)
    monkeypatch.setattr(sweep, "supports", lambda device, grid: False)
    reference = solver.solve(problem)
    monkeypatch.setattr(sweep, "supports", lambda device, grid: True)
    result = solver.solve(problem)
    assert (reference.notes["kernel"], result.notes["kernel"]) == ("torch", "triton")
    assert result.losses == pytest.approx(reference.losses, rel=1e-6)
    for key in ("swept_loss", "refined_loss"):
        assert result.notes[key] == pytest.approx(reference.notes[key], rel=1e-6)
    for own, other in zip(result.weights, reference.weights, strict=True):
        assert torch.equal(own.codes.view(torch.int8), other.codes.view(torch.int8))


@runs_kernel
def test_the_block_size_does_not_change_the_codes_of_the_kernel(monkeypatch):
    """Smaller and larger than what the kernel holds."""
    monkeypatch.setattr(sweep, "supports", lambda device, grid: True)
    problem = problem_of("int3-g16", (5,))
    solvers = (GPTQ(block_size=size, refine_passes=0) for size in (128, 50, 1000))
    first, *others = (solver.solve(problem).weights[0].codes for solver in solvers)
    for codes in others:
        assert torch.equal(codes, first)


# The sweep as it is compiled

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from prismquant.kernels.sweep import MOST_COLUMNS, TILE_ROWS, Rounding
from prismquant.kernels.triton_sweep import OPTIONS, round_columns_kernel as kernel
from prismquant.numerics.grids import FloatGrid, IntGrid

matrices = ("targets", "weights", "coefficients", "steps", "zeros", "errors", "points")
for capability, grid, zeros in ((80, IntGrid(4), True), (90, FloatGrid("e2m1"), False)):
    own = Rounding.of(grid)
    constants = {
        "LOWEST": own.lowest, "HIGHEST": own.highest, "SHIFT": own.shift, "SMALLEST": own.smallest,
        "BLOCK": MOST_COLUMNS, "TILE": TILE_ROWS,
    }
    if not zeros:
        constants["zeros"] = None
    types = {name: "i32" for name in kernel.arg_names} | dict.fromkeys(matrices, "*fp32")
    types |= {"lines": "*i64"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)
    assert found.asm["cubin"]
    print(found.asm["ptx"])
    print("END OF LISTING")
"""


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="the assembler comes with Linux builds only")
def test_the_compiler_leaves_the_arithmetic_alone(tmp_path):
    """One fused operation for each column held, no other; IEEE division; no tensor cores."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=Path(__file__).parents[1],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *listings, _ = done.stdout.split("END OF LISTING\n")
    assert len(listings) == 2
    for listing in listings:
        assert listing.count("fma.rn.f32") == MOST_COLUMNS
        assert listing.count("div.rn.f32") == 1
        for foreign in (".approx", ".ftz", "mma", "tf32", "div.full"):
            assert foreign not in listing
