"""Kernels: what they take, and that they do what torch does.

Tests of the kernel for GPUs need the package ``triton`` and a GPU, or its interpreter:
``TRITON_INTERPRET=1 pytest tests/kernels/test_kernels.py``.
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

from prismquant.algorithms.gptq import GPTQ
from prismquant.algorithms.problem import LayerProblem
from prismquant.errors import FormatError
from prismquant.formats.spec import spec
from prismquant.kernels import descent, dispatch, products, sweep, transpose
from prismquant.kernels.rounding import LossAccumulator, ScaleLines
from prismquant.kernels.sweep import MOST_COLUMNS, round_columns
from prismquant.numerics.grids import FloatGrid, Grid, IntGrid
from prismquant.numerics.kinds import FLOAT_KINDS
from prismquant.numerics.ranges import RangeRule
from prismquant.statistics import hessian as statistics
from prismquant.statistics.hessian import Hessian

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="the package triton is not installed")
runs_triton = pytest.mark.skipif(
    not INSTALLED or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs the package triton, and a GPU or TRITON_INTERPRET=1",
)
# Interpreted, the same tests run anywhere.
ON_GPU = () if INTERPRETED else (pytest.mark.gpu,)
runs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="the package numba is not installed"
)
with_each_kernel = pytest.mark.parametrize(
    "kernel",
    [
        "torch",
        pytest.param("triton", marks=(runs_triton, *ON_GPU)),
        pytest.param("numba", marks=runs_numba),
    ],
)
with_each_compiled_kernel = pytest.mark.parametrize(
    "kernel",
    [pytest.param("triton", marks=(runs_triton, *ON_GPU)), pytest.param("numba", marks=runs_numba)],
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


def device_of(kernel: str) -> str:
    return "cpu" if kernel == "numba" else DEVICE


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
    assert not products.supports(cpu, torch.float16)
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
    narrow, wide = (Hessian(24, DEVICE) for _ in range(2))
    narrow.update(x, weights)
    wide.update(x.float(), weights)
    assert narrow.count == wide.count
    torch.testing.assert_close(narrow.result(), wide.result(), rtol=1e-5, atol=1e-6)


# The sweep: where it runs


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def found_out_anew():
    """What works is found out once for each process: forgotten before a test and after it."""
    known = (sweep._triton_works, dispatch.imported)
    for one in known:
        one.cache_clear()
    yield
    for one in known:
        one.cache_clear()


@runs_numba
def test_a_processor_sweeps_with_numba():
    assert sweep.kernel_for(CPU) == "numba"
    assert not sweep.supports("triton", CPU)
    assert GPTQ().solve(problem_of("int4-g16")).diagnostics.kernel == "numba"


@pytest.mark.usefixtures("found_out_anew")
def test_a_processor_without_numba_sweeps_with_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "prismquant.kernels.cpu_sweep", None)
    monkeypatch.delattr("prismquant.kernels.cpu_sweep", raising=False)
    assert sweep.kernel_for(CPU) == "torch"
    assert GPTQ().solve(problem_of("int4-g16")).diagnostics.kernel == "torch"


@pytest.mark.usefixtures("found_out_anew")
def test_other_and_older_gpus_sweep_with_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert sweep.kernel_for(GPU) == "torch"
    sweep._triton_works.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert sweep.kernel_for(GPU) == "torch"


@pytest.mark.usefixtures("found_out_anew")
@pytest.mark.parametrize("error", [ImportError, RuntimeError, FileNotFoundError])
def test_a_gpu_without_triton_or_a_compiler_sweeps_with_torch(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error("no such thing")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(sweep, "round_columns", fail)
    with FakeTensorMode():
        assert not sweep.supports("triton", GPU)
        sweep._triton_works.cache_clear()
        monkeypatch.setattr(sweep, "round_columns", lambda *args, **kwargs: None)
        assert sweep.supports("triton", GPU)


@pytest.mark.parametrize(("kernel", "module"), [("triton", "triton_sweep"), ("numba", "cpu_sweep")])
def test_a_missing_package_is_an_import_error_that_supports_expects(monkeypatch, kernel, module):
    monkeypatch.setitem(sys.modules, f"prismquant.kernels.{module}", None)
    monkeypatch.delattr(f"prismquant.kernels.{module}", raising=False)
    with pytest.raises(ImportError):
        Block.of(IntGrid(4), 2, 3).round(kernel)


@runs_numba
def test_without_a_place_for_a_cache_functions_are_compiled_all_the_same(monkeypatch):
    """The package's folder cannot be written to, and the user has none."""
    import numba
    from numba.core.caching import CacheImpl

    from prismquant.kernels.compiled import compiled

    def add_one(x):
        return x + 1

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert compiled(numba.float64(numba.float64))(add_one)(1.0) == 2.0


@runs_numba
def test_what_numba_cannot_compile_counts_as_missing():
    import numba

    from prismquant.kernels.compiled import compiled

    with pytest.raises(ImportError, match="cannot compile"):
        compiled(numba.float64(numba.float64))(lambda x: x.no_such_thing)


@pytest.mark.usefixtures("found_out_anew")
def test_what_works_is_found_out_once_and_not_in_every_solve(monkeypatch):
    asked = []
    tried = sweep._new_enough
    monkeypatch.setattr(sweep, "_new_enough", lambda device: asked.append(device) or False)
    assert [sweep.kernel_for(GPU) for _ in range(3)] == ["torch"] * 3
    assert asked == [GPU]
    monkeypatch.setattr(sweep, "_new_enough", tried)
    sweep.kernel_for(CPU)
    rounded = []
    original = sweep.round_columns
    monkeypatch.setattr(
        sweep, "round_columns", lambda *a, **k: rounded.append(len(a[1])) or original(*a, **k)
    )
    GPTQ(block_size=144, refine_passes=0).solve(problem_of("int4-g16"))
    assert rounded == [144, 144]


@with_each_kernel
@pytest.mark.parametrize("rows", [1, 33, 70])
def test_columns_become_lines_and_lines_columns_in_any_order(kernel, rows):
    device = device_of(kernel)
    columns = torch.tensor([5, 0, 99, 3, 98, 40], device=device)
    whole = normal(rows, 103, seed=0).to(device)[:, 1:101]
    lines = torch.full((6, rows + 3), CANARY, device=device)
    transpose.columns_as_lines(kernel, whole, columns, lines[:, 1:-2])
    assert torch.equal(lines[:, 1:-2], whole[:, columns].T)
    assert bool((lines[:, [0, -2, -1]] == CANARY).all())
    codes = torch.arange(rows * 100, device=device).reshape(rows, 100).to(torch.int8)
    expected, new = codes.clone(), -codes[:, :6].T
    expected[:, columns] = new.T
    transpose.lines_as_columns(kernel, new, columns, codes)
    assert torch.equal(codes, expected)


def test_nothing_imports_a_compiler_before_a_device_asks():
    script = (
        "import sys, torch; before = set(sys.modules); import prismquant.algorithms.gptq; "
        "assert not {'triton', 'numba', 'llvmlite'} & (set(sys.modules) - before)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
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
    def of(
        grid: Grid,
        columns: int,
        rows: int,
        *,
        zeros: bool = False,
        seed: int = 0,
        device: str = "cpu",
    ) -> Block:
        def inside(values: Tensor) -> Tensor:
            whole = torch.full((len(values) + 2, values.shape[1] + 5), CANARY, device=device)
            part = whole[1:-1, 2:-3]
            part.copy_(values)
            return part

        weights = normal(columns, rows, seed=seed)
        coefficients = normal(columns, columns, seed=seed + 1) / math.sqrt(columns)
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
            ScaleLines(inside(steps), shifts, lines.to(device)),
            grid,
            inside(0.1 * normal(columns, rows, seed=seed + 5)),
            inside(torch.zeros(columns, rows)),
        )

    def round(self, kernel: str, **options) -> None:
        round_columns(
            kernel,
            self.targets,
            self.weights,
            self.coefficients,
            self.scales,
            self.grid,
            errors=self.errors,
            **({"points": self.points} | options),
        )

    def accumulator(self) -> LossAccumulator:
        """Costs of its columns, and sums that are not empty."""
        columns, rows = self.targets.shape
        costs = 0.5 + normal(3, columns, seed=50).abs()
        sums = normal(3, rows, seed=51).double()
        return LossAccumulator(costs.to(self.targets.device), sums.to(self.targets.device))


def around(part: Tensor) -> Tensor:
    """What lies around the part of a larger matrix."""
    whole = part._base
    assert whole is not None
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside[1:-1, 2:-3] = False
    return whole[outside]


SHAPES = {
    "grid": st.sampled_from(GRIDS),
    "columns": st.sampled_from([1, 2, 15, 16, 31, 128, 131]),
    "rows": st.sampled_from([1, 5, 32, 33, 64, 200]),
    "zeros": st.booleans(),
    "aim": st.sampled_from(["before", "others", "nearest"]),
    "seed": st.integers(0, 1000),
}


@with_each_kernel
@settings(max_examples=20)
@given(**SHAPES)
def test_every_column_is_the_nearest_point_to_a_float64_target(
    kernel, grid, columns, rows, zeros, aim, seed
):
    zeros = zeros and isinstance(grid, IntGrid)
    block = Block.of(grid, columns, rows, zeros=zeros, seed=seed, device=device_of(kernel))
    if aim != "others":
        # What is not below the diagonal is not read.
        block.coefficients[torch.ones(columns, columns).triu().bool()] = math.nan
    start, former, accumulator = block.targets.clone(), block.errors.double(), block.accumulator()
    sums = accumulator.sums.clone()
    block.round(kernel, aim=aim, accumulator=accumulator)
    step = block.scales.steps[block.scales.lines]
    zero = torch.zeros_like(step)
    if block.scales.zeros is not None:
        zero = block.scales.zeros[block.scales.lines]
    # Errors are those of the points: to the bit, which torch may fuse with a multiplication.
    values = (block.points - zero) * step
    rounded = torch.finfo(torch.float32).eps * (values.abs() + block.weights.abs())
    rounded *= kernel == "torch" or (kernel == "triton" and aim == "nearest")
    assert bool(((block.errors - (block.weights - values)).abs() <= rounded).all())
    below = torch.tril(block.coefficients, -1).nan_to_num().double()
    above = torch.triu(block.coefficients, 1).nan_to_num().double()
    errors = block.errors.double()
    exact = start.double() + below @ errors + above @ former
    reach = start.abs().double() + below.abs() @ errors.abs() + above.abs() @ former.abs()
    assert bool(((block.targets - exact).abs() <= 1e-5 * reach).all())
    # Points are what torch makes of the same targets.
    aimed = block.weights if aim == "nearest" else block.targets
    assert torch.equal(block.points, grid.round_(aimed / step + zero))
    # Sums are those of the squares.
    pulls, costs = exact - block.weights.double(), accumulator.costs.double()
    squares = torch.stack([pulls + errors, errors, errors]).square()
    if aim == "others":
        squares -= torch.stack([pulls + former, former, former]).square()
    expected = (costs.unsqueeze(2) * squares).sum(1)
    size = costs.sum() * (reach.amax() + errors.abs().amax()).square()
    assert bool(((accumulator.sums - sums - expected).abs() <= 1e-5 * size).all())
    for part in (block.targets, block.weights, block.errors, block.points):
        assert bool((around(part) == CANARY).all())


@with_each_compiled_kernel
@settings(max_examples=20)
@given(**SHAPES)
def test_codes_may_be_asked_for_in_place_of_points(kernel, grid, columns, rows, zeros, aim, seed):
    zeros = zeros and isinstance(grid, IntGrid)
    given_block = {"zeros": zeros, "seed": seed, "device": device_of(kernel)}
    first, second = (Block.of(grid, columns, rows, **given_block) for _ in range(2))
    first.round(kernel, aim=aim)
    codes, expected = (torch.zeros_like(first.points, dtype=torch.int8) for _ in range(2))
    second.round(kernel, aim=aim, points=codes)
    grid.write(first.points, expected)
    assert torch.equal(codes, expected)
    assert torch.equal(first.errors, second.errors)


@with_each_kernel
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_points_ties_and_what_lies_beyond_round_as_in_torch(grid, kernel):
    """To the bit, the sign of zero included."""
    device = device_of(kernel)
    if isinstance(grid, IntGrid):
        points = torch.arange(grid.qmin, grid.qmax + 1).float()
    else:
        codes = torch.arange(2**grid.bits).to(torch.int8)
        points = grid.read(codes)
        points = points[points.isfinite()].unique()
    ties = (points[1:] + points[:-1]) / 2
    up, down = (ties.nextafter(torch.tensor(end)) for end in (math.inf, -math.inf))
    zeros = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    values = torch.cat([points, ties, 3 * points, up, down, zeros]).unsqueeze(0).to(device)
    one, zero = torch.ones_like(values), torch.zeros(1, 1, device=device)
    found, errors = torch.empty_like(values), torch.empty_like(values)
    scales = ScaleLines(one, None, torch.zeros(1, dtype=torch.int64, device=device))
    round_columns(kernel, values.clone(), values, zero, scales, grid, errors=errors, points=found)
    expected = grid.round_(values.clone())
    if isinstance(grid, IntGrid):
        assert torch.equal(found, expected)
    else:
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(errors, values - expected)


@runs_numba
@pytest.mark.parametrize("aim", ["before", "others", "nearest"])
def test_threads_change_no_result_of_the_kernel(monkeypatch, aim):
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        block = Block.of(IntGrid(3), 40, 64 * 13 + 5, seed=3)
        accumulator = block.accumulator()
        block.round("numba", aim=aim, accumulator=accumulator)
        found.append((block.targets, block.errors, block.points, accumulator.sums))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@with_each_compiled_kernel
def test_what_a_kernel_cannot_address_is_refused(kernel):
    block = Block.of(IntGrid(4), 4, 6, device=device_of(kernel))
    turned = torch.zeros(6, 4, device=device_of(kernel)).T
    with pytest.raises(FormatError, match="contiguous"):
        round_columns(
            kernel, turned, block.weights, block.coefficients, block.scales, block.grid,
            errors=block.errors, points=block.points,
        )  # fmt: skip


@runs_numba
@settings(max_examples=20)
@given(
    grid=SHAPES["grid"],
    columns=st.sampled_from([1, 3, 40]),
    rows=st.sampled_from([1, 15, 16, 40, 300]),
    zeros=st.booleans(),
    final=st.booleans(),
    seed=SHAPES["seed"],
)
def test_descent_keeps_products_errors_and_sums_as_they_are_in_float64(
    grid, columns, rows, zeros, final, seed
):
    zeros = zeros and isinstance(grid, IntGrid)
    block = Block.of(grid, columns, rows, zeros=zeros, seed=seed)
    wide, column = columns + 9, 4
    own = slice(column, column + columns)
    root = normal(wide, 2 * wide, seed=seed + 6)
    hessian = (root @ root.T / wide).double()
    whole = normal(wide, rows, seed=seed + 7)
    # Errors to begin with are those of any points.
    codes = torch.zeros(columns, rows, dtype=torch.int8)
    block.round("torch", points=codes)
    whole[own] = block.errors
    former = whole.double()
    products = torch.zeros(-(-rows // descent.STRIP), wide, descent.STRIP)
    products[:] = descent.in_strips((hessian @ former).float())
    accumulator = block.accumulator()
    accumulator.costs[0] = hessian.diagonal()[own]
    sums = accumulator.sums.clone()
    coefficients = (hessian / hessian.diagonal().unsqueeze(1)).float()[own]
    errors = whole[own].clone()
    descent.round_again(
        products, block.weights, coefficients, block.scales, grid, errors, codes, accumulator,
        column=column, final=final,
    )  # fmt: skip
    after = former.clone()
    after[own] = errors.double()
    # Errors are those of the codes.
    step = block.scales.steps[block.scales.lines]
    zero = torch.zeros_like(step)
    if block.scales.zeros is not None:
        zero = block.scales.zeros[block.scales.lines]
    assert torch.equal(errors, block.weights - (grid.read(codes) - zero) * step)
    # The loss is lower by what the sums say, and the products are those of the new errors.
    losses = [((hessian @ e) * e).sum(0) for e in (former, after)]
    change = accumulator.sums - sums
    scale = 1e-5 * losses[0]
    assert bool((change[0] <= scale).all())
    assert bool(((losses[1] - losses[0] - change[0]).abs() <= scale).all())
    growth = accumulator.costs[1:].double() @ (after[own].square() - former[own].square())
    assert bool(((change[1:] - growth).abs() <= 1e-5 * (1 + growth.abs())).all())
    kept = slice(own.stop if final else 0, wide)
    exact = descent.in_strips((hessian @ after).float())
    size = float(exact.abs().max()) + 1
    assert float((products - exact)[:, kept].abs().max()) <= 1e-5 * size


# The sweep in a solve


def problem_of(
    name: str, rows: tuple[int, ...] = (20, 7), features: int = 144, device: str = "cpu"
) -> LayerProblem:
    mixed = normal(400, features // 4, seed=10) @ normal(features // 4, features, seed=11)
    record = Hessian(features, device)
    record.update(mixed / math.sqrt(features // 4) + 0.3 * normal(400, features, seed=12))
    weights = tuple(normal(r, features, seed=20 + i).to(device) for i, r in enumerate(rows))
    names = tuple(f"layers.0.{i}" for i in range(len(rows)))
    rule = RangeRule("minmax", norm=2.0)
    return LayerProblem(names, weights, spec(name), rule, torch.bfloat16, record.result())


@with_each_compiled_kernel
@pytest.mark.parametrize(
    "name",
    ["int4-g16", "int2-channel", "int3-g16-asym", "int8-tensor", "fp4-g16", "fp8-channel", "nvfp4"],
)
def test_a_solve_with_the_kernel_is_that_with_torch(name, kernel, monkeypatch):
    """Sweep and descent; no weight of these lies so near a tie that the order of sums decides."""
    problem, solver = problem_of(name, device=device_of(kernel)), GPTQ()
    monkeypatch.setattr(sweep, "kernel_for", lambda device: "torch")
    reference = solver.solve(problem)
    monkeypatch.setattr(sweep, "kernel_for", lambda device: kernel)
    result = solver.solve(problem)
    assert (reference.diagnostics.kernel, result.diagnostics.kernel) == ("torch", kernel)
    assert result.losses == pytest.approx(reference.losses, rel=1e-5)
    assert result.baseline_losses == pytest.approx(reference.baseline_losses, rel=1e-5)
    for key in ("swept_loss", "refined_loss"):
        own, other = getattr(result.diagnostics, key), getattr(reference.diagnostics, key)
        assert own == pytest.approx(other, rel=1e-5)
    for own, other in zip(result.weights, reference.weights, strict=True):
        assert torch.equal(own.codes.view(torch.int8), other.codes.view(torch.int8))


@with_each_kernel
@pytest.mark.parametrize("passes", [0, 2])
def test_the_block_size_does_not_change_the_codes_of_the_kernel(kernel, passes, monkeypatch):
    """Smaller and larger than what the kernel holds."""
    monkeypatch.setattr(sweep, "kernel_for", lambda device: kernel)
    problem = problem_of("int3-g16", (5,), device=device_of(kernel))
    solvers = (GPTQ(block_size=size, refine_passes=passes) for size in (128, 50, 1000))
    first, *others = (solver.solve(problem).weights[0].codes for solver in solvers)
    for codes in others:
        assert torch.equal(codes, first)


# The sweep as it is compiled

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from prismquant.kernels.rounding import Rounding
from prismquant.kernels.sweep import MOST_COLUMNS, TILE_ROWS
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
        cwd=Path(__file__).parents[2],
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
