"""Mixed precision: linear layers multiply in bfloat16, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import prismquant as pq
from prismquant.algorithms.problem import LayerResult
from prismquant.engine import collectives, quantize, run
from prismquant.engine.collectives import Ranks, Task
from prismquant.engine.memory_forecast import narrow_modules
from prismquant.kernels.instructions import multiplies_bfloat16
from prismquant.models.bind import bind
from prismquant.runtime.linear import quant_linear
from prismquant.runtime.mixed import Precision
from prismquant.shards import ShardReader

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MIXED = Precision(torch.float32, torch.bfloat16)


def test_a_linear_layer_multiplies_rounded_numbers_and_keeps_its_dtype() -> None:
    """Against float64: the numbers are rounded once, sums are as good as float32's."""
    torch.manual_seed(0)
    layer = nn.Linear(300, 40)
    x = torch.randn(3, 7, 300)
    with MIXED.in_force():
        y = layer(x)
    assert y.dtype == torch.float32
    exact = x.bfloat16().double() @ layer.weight.bfloat16().double().T
    # What is left is the rounding of the result, half a unit of 8 digits.
    allowed = 2.0**-8 * exact.abs() + 1e-5
    assert bool(((y.double() - layer.bias.double() - exact).abs() <= allowed).all())
    # The layer's own parameters are as they were.
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("bias", [True, False])
def test_quantized_layers_do_so_too(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 8, bias=bias))
    x = torch.randn(4, 16)
    with MIXED.in_force():
        plain = model(x)
        quant_linear(model, "0")
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize("shape", [(1300, 24), (2, 700, 24), (512, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_rows_multiplied_in_turns_give_what_they_give_at_once(
    shape: tuple[int, ...], bias: bool
) -> None:
    """Without gradients, against the rounded operands multiplied at once, in float64."""
    torch.manual_seed(2)
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(shape)
    with torch.no_grad(), MIXED.in_force():
        y = layer(x)
        strided = layer(x.mT.contiguous().mT)
    assert y.dtype == torch.float32
    assert y.shape == (*shape[:-1], 40)
    assert torch.equal(y, strided)
    exact = x.bfloat16().double() @ layer.weight.bfloat16().double().T
    rest = y.double() - (layer.bias.double() if bias else 0)
    assert bool(((rest - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all())


@pytest.mark.parametrize("grad", [True, False])
def test_a_convolution_over_its_whole_input_is_one_product_in_float32(grad: bool) -> None:
    torch.manual_seed(3)
    embed, x = nn.Conv3d(3, 16, (2, 4, 4), stride=(2, 4, 4)), torch.randn(9, 3, 2, 4, 4)
    with torch.set_grad_enabled(grad), MIXED.in_force():
        y = embed(x)
    expected = nn.functional.linear(x.flatten(1), embed.weight.flatten(1), embed.bias)
    assert torch.equal(y, expected.reshape(9, 16, 1, 1, 1))
    torch.testing.assert_close(y, embed(x))


@pytest.mark.parametrize(
    ("embed", "shape"),
    [
        (nn.Conv2d(3, 8, 4, stride=4), (2, 3, 8, 8)),
        (nn.Conv2d(3, 8, 4, padding=1), (2, 3, 4, 4)),
        (nn.Conv2d(3, 8, 3, padding="same"), (2, 3, 3, 3)),
        (nn.Conv2d(4, 8, 4, groups=2), (2, 4, 4, 4)),
    ],
)
def test_any_other_convolution_stays_as_it_is(embed: nn.Conv2d, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with MIXED.in_force():
        y = embed(x)
    assert torch.equal(y, embed(x))


def test_all_else_stays_as_it_is() -> None:
    torch.manual_seed(1)
    norm, x = nn.LayerNorm(32), torch.randn(1, 2, 5, 32)
    attend = nn.functional.scaled_dot_product_attention
    plain = [norm(x), attend(x, x, x), x @ x.mT, torch.softmax(x, -1)]
    with MIXED.in_force():
        again = [norm(x), attend(x, x, x), x @ x.mT, torch.softmax(x, -1)]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


class _MLP(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 60, bias=bias), nn.Linear(60, 24, bias=bias)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)) * scale)


@pytest.mark.parametrize("bias", [True, False])
def test_what_flows_in_a_narrow_module_is_held_as_products_are(bias: bool) -> None:
    torch.manual_seed(4)
    mlp, x = _MLP(bias), torch.randn(2, 5, 24)
    seen: list[torch.dtype] = []
    mlp.down.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.no_grad(), MIXED.in_force([mlp]):
        y = mlp(x, scale=2.0)
        by_keyword = mlp(x=x, scale=2.0)
    assert seen == [torch.bfloat16] * 2
    assert y.dtype == torch.float32
    assert torch.equal(y, by_keyword)
    with torch.no_grad():
        assert torch.equal(mlp(x), _MLP.forward(mlp, x))
        # Against float64: some roundings to 8 digits.
        torch.testing.assert_close(
            y.double(), mlp.double()(x.double(), scale=2.0), atol=0.02, rtol=0.02
        )


def test_a_narrow_module_is_plain_for_gradients_after_errors_and_without_mixed_precision() -> None:
    mlp, x = _MLP(bias=True), torch.randn(5, 24)
    with MIXED.in_force():
        wide = mlp(x)
    with MIXED.in_force([mlp]):
        assert torch.equal(mlp(x), wide)
    with pytest.raises(ZeroDivisionError), MIXED.in_force([mlp]):
        raise ZeroDivisionError
    plain = mlp(x)
    with torch.no_grad(), Precision().in_force([mlp]):
        assert torch.equal(mlp(x), plain)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llama_3"])
def test_the_narrow_modules_of_a_block_are_its_mlp(tiny: Callable[..., Path], family: str) -> None:
    bound = bind(tiny(family))
    for step in bound.steps:
        names = narrow_modules(bound, step)
        assert names == ([f"{step.name}.mlp"] if step.kind == "block" else [])
    # With a norm inside it is left as it is.
    block = next(step for step in bound.steps if step.kind == "block")
    normed = replace(bound, shapes={**bound.shapes, f"{block.name}.mlp.norm.weight": (8,)})
    assert narrow_modules(normed, block) == []


def test_it_ends_with_the_block_even_after_an_error() -> None:
    layer, x = nn.Linear(64, 4), torch.randn(8, 64)
    plain = layer(x)
    with pytest.raises(ZeroDivisionError), MIXED.in_force():
        raise ZeroDivisionError
    assert torch.equal(layer(x), plain)
    with Precision().in_force():
        assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("native", [True, False])
def test_the_default_follows_device_checkpoint_and_processor(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    assert Precision.chosen(None, CPU, torch.bfloat16) == (MIXED if native else Precision())
    assert Precision.chosen(None, CPU, torch.bfloat16, runs=False) == Precision()
    for stored in (torch.float32, torch.float16):
        assert Precision.chosen(None, CPU, stored) == Precision()
    assert Precision.chosen(None, GPU, torch.float16) == Precision(torch.float16)
    assert Precision.chosen("mixed", CPU, torch.float16) == MIXED
    assert Precision.chosen(torch.bfloat16, CPU, torch.float32) == Precision(torch.bfloat16)


def test_a_torch_that_tells_nothing_of_the_processor_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not multiplies_bfloat16()


def test_the_record_tells_the_precision_and_resuming_in_another_is_refused(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    recipe = pq.load_recipe("w4a16").with_calibration(samples=4, batch_size=2)
    given = tiny("qwen2_vl"), recipe, tmp_path / "out", calibration_file
    result = pq.quantize(*given, dtype="mixed")
    assert "linear layers in torch.bfloat16" in str(asdict(result.record.identity))
    with pytest.raises(pq.PrismQuantError, match="linear layers in"):
        pq.quantize(*given, dtype=torch.float32, resume=True)


@pytest.mark.parametrize("recipe", ["w4a16", "w4a8-static"])
def test_how_weights_are_held_is_not_seen_in_the_result(
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
) -> None:
    """In bfloat16 where they are multiplied in it and nothing changes them, or in float32."""
    rules = pq.load_recipe(recipe).with_rules({"correction": "auto"})
    given = tiny("qwen2_vl", dtype=torch.bfloat16), rules.with_calibration(samples=4, batch_size=2)
    pq.quantize(*given, tmp_path / "narrow", calibration_file, dtype="mixed")
    monkeypatch.setattr(run, "weight_dtype", lambda plan, step, precision: precision.dtype)
    pq.quantize(*given, tmp_path / "wide", calibration_file, dtype="mixed")
    for path in (tmp_path / "narrow").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "wide" / path.name).read_bytes()


def test_each_step_asks_for_the_next_ones_weights_and_gives_back_what_is_free(
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[str]] = []
    freed: list[None] = []
    solved: list[int] = []

    def solve_all(tasks: list[Task], ranks: Ranks) -> list[LayerResult]:
        solved.append(len(tasks))
        return collectives.solve_all(tasks, ranks)

    monkeypatch.setattr(ShardReader, "read_ahead", lambda _, names: asked.append(list(names)))
    for module in (run, quantize):
        monkeypatch.setattr(module, "give_back_freed", lambda: freed.append(None))
    monkeypatch.setattr(quantize, "solve_all", solve_all)
    recipe = pq.load_recipe("w4a16").with_calibration(samples=4, batch_size=2)
    folder = tiny("qwen2_vl")
    result = pq.quantize(folder, recipe, tmp_path / "out", calibration_file)
    assert len(asked) == len(result.record.steps)
    # After each step, and before each solve.
    assert len(freed) == len(asked) + len(solved) > len(asked)
    stored = ShardReader(folder).names
    ahead = {name for names in asked for name in names}
    assert any("layers.1." in name for name in ahead)
    assert len(ahead & stored) > 20
