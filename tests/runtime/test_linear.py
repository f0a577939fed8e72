"""A quantized layer at run time: what it multiplies, and what its input goes through."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prismquant.formats.spec import spec
from prismquant.runtime.input_rotation import rotate_inputs
from prismquant.runtime.linear import (
    ActivationQuantizer,
    QuantLinear,
    activations_in_float,
    quantize_inputs,
    quantize_outputs,
)


def brute_force(x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Quantize and dequantize in float64, with the rounded float32 scale of compressed-tensors."""
    bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = torch.maximum(low.abs(), high.abs()).float() / ((top - bottom) / 2)
        zero = torch.zeros_like(scale)
    else:
        scale = (high - low).float() / (top - bottom)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = (bottom - low.float() / scale).round().clamp(bottom, top)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (x.float() / scale + zero).double().round().clamp(bottom, top)
    return (codes - zero.double()) * scale.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int8-token", "int4-token-asym"])
def test_scales_of_16_bit_tokens_are_float32(name: str, dtype: torch.dtype) -> None:
    """What float32 gives for the same values, rounded once; scales of 8 digits give other codes."""
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    quantizer = ActivationQuantizer(spec(name))
    assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(3, 8),
    symmetric=st.booleans(),
    shape=st.sampled_from([(3, 8), (2, 5, 8), (1, 1, 1, 8), (8,)]),
)
def test_every_token_has_its_own_scale(
    seed: int, bits: int, symmetric: bool, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.rand((*shape[:-1], 1), generator=generator)
    quantizer = ActivationQuantizer(spec(f"int{bits}-token" + ("" if symmetric else "-asym")))
    seen = quantizer(x)
    assert seen.shape == x.shape
    assert seen.dtype == x.dtype
    for row, out in zip(x.reshape(-1, shape[-1]), seen.reshape(-1, shape[-1]), strict=True):
        expected = brute_force(row, row.min(), row.max(), bits, symmetric)
        step = (row.max().clamp(min=0) - row.min().clamp(max=0)) / (2**bits - 1)
        # A value on the edge between two codes may fall either way; elsewhere nothing may differ.
        away = (out.double() - expected).abs()
        assert (away <= 2 * step * 1.001).all()
        assert (away <= 1e-5 * (1 + row.abs().max())).float().mean() >= 0.75


def test_tokens_do_not_influence_one_another() -> None:
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    quantizer = ActivationQuantizer(spec("int8-token"))
    together = quantizer(x)
    x[1, 3] *= 1000
    other = quantizer(x)
    same = torch.ones(2, 6, dtype=torch.bool)
    same[1, 3] = False
    assert torch.equal(together[same], other[same])


@pytest.mark.parametrize("name", ["int8-tensor", "int8-tensor-asym", "int4-token"])
def test_the_input_lands_on_the_grid_and_stays_there(name: str) -> None:
    number = spec(name)
    scale = None if number.dynamic else torch.tensor([0.05])
    zero = torch.tensor([-3], dtype=torch.int8) if not number.symmetric else None
    quantizer = ActivationQuantizer(number, scale, zero)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    once = quantizer(x)
    if scale is not None:
        codes = once / scale + (0 if zero is None else zero)
        torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
        assert codes.min() >= number.grid.qmin
        assert codes.max() <= number.grid.qmax
        assert torch.equal(quantizer(once), once)
    for row in once:
        assert len(row.unique()) <= number.grid.levels


def test_a_static_scale_clips_what_lies_outside() -> None:
    quantizer = ActivationQuantizer(spec("int8-tensor"), torch.tensor([0.5]))
    x = torch.tensor([[1000.0, -1000.0, 0.3, 0.0]])
    assert quantizer(x).tolist() == [[63.5, -64.0, 0.5, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_input_of_no_tokens_and_one_of_zeros_pass(dtype: torch.dtype) -> None:
    """An image-free batch reaches the vision tower with no rows at all."""
    quantizer = ActivationQuantizer(spec("int8-token"))
    assert quantizer(torch.empty(0, 8, dtype=dtype)).shape == (0, 8)
    zeros = torch.zeros(2, 8, dtype=dtype)
    assert torch.equal(quantizer(zeros), zeros)
    assert quantizer(zeros).dtype == dtype


class Block(nn.Module):
    """Two layers, nested as in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


def test_a_layer_is_replaced_in_place_and_keeps_its_parameters() -> None:
    block = Block().eval()
    weight, bias = block.inner[0].weight, block.inner[0].bias
    quantize_inputs(block, "inner.0", spec("int8-token"), None, None)
    layer = block.inner[0]
    assert isinstance(layer, QuantLinear)
    assert isinstance(layer, nn.Linear)
    assert layer.weight is weight
    assert layer.bias is bias
    assert (layer.in_features, layer.out_features, layer.training) == (8, 6, False)
    assert isinstance(block.inner[2], nn.Linear)
    assert not isinstance(block.inner[2], QuantLinear)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    assert layer.input_quantizer is not None
    expected = nn.functional.linear(layer.input_quantizer(x), weight, bias)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(layer(x), nn.functional.linear(x, weight, bias))


def test_a_layer_at_the_top_of_a_model_can_be_replaced() -> None:
    model = nn.Sequential()
    model.add_module("lm_head", nn.Linear(4, 4))
    quantize_inputs(model, "lm_head", spec("int8-tensor"), torch.tensor([0.1]), None)
    assert isinstance(model.lm_head, QuantLinear)


def test_a_layer_without_a_quantizer_is_a_plain_layer() -> None:
    linear = nn.Linear(5, 3)
    x = torch.randn(2, 5)
    assert torch.equal(QuantLinear.from_linear(linear)(x), linear(x))


def test_inputs_can_be_left_in_float_for_a_while_even_after_an_error() -> None:
    block = Block()
    for name in ("inner.0", "inner.2"):
        quantize_inputs(block, name, spec("int3-token"), None, None)
    plain = Block()
    plain.inner.load_state_dict(block.inner.state_dict())
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    quantized = block(x)
    with activations_in_float(block):
        assert torch.equal(block(x), plain(x))
    with pytest.raises(RuntimeError), activations_in_float(block):
        raise RuntimeError
    assert torch.equal(block(x), quantized)
    # What was off before stays off.
    block.inner[0].input_quantizer.enabled = False  # type: ignore[union-attr]
    with activations_in_float(block):
        pass
    assert not block.inner[0].input_quantizer.enabled  # type: ignore[union-attr]


def test_static_scales_are_part_of_the_state_and_move_with_it() -> None:
    block = Block()
    zero = torch.tensor([4], dtype=torch.int8)
    quantize_inputs(block, "inner.0", spec("int8-tensor-asym"), torch.tensor([0.25]), zero)
    state = block.state_dict()
    assert state["inner.0.input_quantizer.scale"].item() == 0.25
    assert state["inner.0.input_quantizer.zero_point"].item() == 4
    assert state["inner.0.input_quantizer.zero_point"].dtype == torch.int8


# Around the layer: rotation, columns, outputs


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix, row by row from the parity of common bits."""
    rows = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(rows, dtype=torch.float64) / size**0.5


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("signed", [False, True])
def test_a_rotation_is_undone_by_a_weight_that_was_rotated(signed: bool) -> None:
    block = Block()
    linear: nn.Linear = block.inner[0]  # type: ignore[assignment]
    x = seeded(0, 5, 8)
    expected = linear(x)
    signs = torch.tensor([1, -1, -1, 1, 1, 1, -1, 1], dtype=torch.int8) if signed else None
    matrix = torch.block_diag(hadamard(4), hadamard(4))
    turned = (linear.weight.detach().double() * (1 if signs is None else signs)) @ matrix
    linear.weight = nn.Parameter(turned.float(), requires_grad=False)
    rotate_inputs(block, "inner.0", 4, signs)
    layer: QuantLinear = block.inner[0]  # type: ignore[assignment]
    assert not torch.allclose(expected, nn.functional.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    by_hand = (x.double() * (1 if signs is None else signs)) @ matrix
    torch.testing.assert_close(layer.rotated(x), by_hand.float(), rtol=1e-5, atol=1e-5)
    assert layer.rotated(x.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("first", ["rotation", "quantizer"])
def test_the_input_is_rotated_before_it_is_quantized(first: str) -> None:
    """In whichever order the two were put before the layer."""
    block = Block()
    steps = [
        lambda: rotate_inputs(block, "inner.0", 8, None),
        lambda: quantize_inputs(block, "inner.0", spec("int3-token"), None, None),
    ]
    for step in steps if first == "rotation" else reversed(steps):
        step()
    layer: QuantLinear = block.inner[0]  # type: ignore[assignment]
    quantizer = ActivationQuantizer(spec("int3-token"))
    turned = (seeded(1, 4, 8).double() @ hadamard(8)).float()
    expected = nn.functional.linear(quantizer(turned), layer.weight, layer.bias)
    torch.testing.assert_close(layer(seeded(1, 4, 8)), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=40)
@given(
    columns=st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True),
    name=st.sampled_from(["int4-token", "int8-tensor", "fp8-token", "int4-token-asym"]),
    shape=st.sampled_from([(3,), (2, 3), ()]),
)
def test_columns_pass_as_they_are_and_change_nothing_else(
    columns: list[int], name: str, shape: tuple[int, ...]
) -> None:
    number = spec(name)
    scale = None if number.dynamic else torch.tensor([0.02])
    index = torch.tensor(columns)
    quantizer = ActivationQuantizer(number, scale, None, index)
    x = seeded(2, *shape, 8)
    before, seen = x.clone(), quantizer(x)
    assert torch.equal(x, before)
    assert torch.equal(seen[..., columns], x[..., columns])
    rest = x.clone()
    rest[..., columns] = 0
    others = [c for c in range(8) if c not in columns]
    plain = ActivationQuantizer(number, scale)(rest)
    assert torch.equal(seen[..., others], plain[..., others])
    # However large they become, the others do not notice.
    x[..., columns] *= 1e4
    assert torch.equal(quantizer(x)[..., others], seen[..., others])


@pytest.mark.parametrize("name", ["int8-tensor", "int4-token", "fp8-token"])
def test_outputs_are_quantized_after_the_bias_was_added(name: str) -> None:
    block, number = Block(), spec(name)
    scale = None if number.dynamic else torch.tensor([0.03])
    linear = block.inner[0]
    expected = ActivationQuantizer(number, scale)(linear(seeded(3, 5, 8)))
    quantize_outputs(block, "inner.0", number, scale, None)
    assert torch.equal(block.inner[0](seeded(3, 5, 8)), expected)
    with activations_in_float(block):
        assert torch.equal(block.inner[0](seeded(3, 5, 8)), linear(seeded(3, 5, 8)))


def test_gradients_pass_as_if_nothing_were_rounded() -> None:
    """Tuners descend through quantized inputs; the values themselves are those of the grid."""
    columns = torch.tensor([2])
    for quantizer in (
        ActivationQuantizer(spec("int4-token")),
        ActivationQuantizer(spec("int4-tensor"), torch.tensor([0.1]), None, columns),
    ):
        x, away = seeded(4, 3, 8), seeded(5, 3, 8)
        leaf = x.clone().requires_grad_()
        values = quantizer(leaf)
        torch.testing.assert_close(values, quantizer(x), rtol=0, atol=1e-6)
        (values * away).sum().backward()
        assert torch.equal(leaf.grad, away)  # type: ignore[arg-type]


def test_what_is_around_a_layer_survives_what_comes_after() -> None:
    """And all of it is part of the state, to be moved to a device with the model."""
    block = Block()
    signs = torch.ones(8, dtype=torch.int8)
    rotate_inputs(block, "inner.0", 8, signs)
    layer = block.inner[0]
    columns = torch.tensor([1])
    quantize_inputs(block, "inner.0", spec("int8-tensor"), torch.tensor([0.5]), None, columns)
    quantize_outputs(block, "inner.0", spec("int8-tensor"), torch.tensor([0.25]), None)
    assert block.inner[0] is layer
    state = block.state_dict()
    assert torch.equal(state["inner.0.input_rotation.signs"], signs)
    assert state["inner.0.input_quantizer.columns"].tolist() == [1]
    assert state["inner.0.output_quantizer.scale"].item() == 0.25


def test_the_store_multiplies_and_the_layer_does_what_is_around_it() -> None:
    class Negated:
        """A store that holds the weight with the other sign."""

        def __init__(self, weight: Tensor) -> None:
            self.weight = -weight

        def product(self, layer: nn.Linear, input: Tensor) -> Tensor:
            return nn.functional.linear(input, -self.weight, layer.bias)

    model = nn.Sequential(nn.Linear(8, 4))
    quantize_inputs(model, "0", spec("int8-token"), None, None)
    layer, x = model[0], torch.randn(3, 8)
    wanted = model(x)
    layer.store = Negated(layer.weight.detach())
    assert torch.equal(model(x), wanted)
