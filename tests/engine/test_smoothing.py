"""Moving scale in loaded modules: the function stays, whatever the edge."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from prismquant.engine.smoothing import channel_of_column, move_scale
from prismquant.models.arch import EdgeKind
from prismquant.models.bind import bind
from prismquant.models.bound import BoundEdge

if TYPE_CHECKING:
    from pathlib import Path

SIZE, OUT = 12, 5


def edge(kind: EdgeKind, source: str, *consumers: str, **more: object) -> BoundEdge:
    fields = {
        "kind": kind,
        "norm": source if kind is EdgeKind.NORM else None,
        "producer": None if kind is EdgeKind.NORM else source,
        "consumers": consumers,
        "size": SIZE,
        "first_row": 0,
        "tile": 1,
        "heads": 0,
        "kv_heads": 0,
        "step": 0,
    }
    return BoundEdge(**(fields | more))  # type: ignore[arg-type]


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=generator))
    return model


def drawn(seed: int, size: int = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.exp2(4 * torch.rand(size, generator=generator) - 2)


class Norm(nn.Module):
    """A norm, four neighbours joined, two readers; as in front of a merger."""

    def __init__(self, tile: int = 1) -> None:
        super().__init__()
        self.tile = tile
        self.norm = nn.LayerNorm(SIZE)
        self.a = nn.Linear(SIZE * tile, OUT)
        self.b = nn.Linear(SIZE * tile, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).reshape(-1, SIZE * self.tile)
        return torch.cat([self.a(y), self.b(y)], 1)


class FromOne(nn.Module):
    """A norm that multiplies by one plus its weight, and two readers; all in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.empty(SIZE))
        self.a = nn.Linear(SIZE, OUT)
        self.b = nn.Linear(SIZE, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.rms_norm(x.double(), (SIZE,)) * (1 + self.norm.weight.double())
        parts = [y @ layer.weight.double().mT for layer in (self.a, self.b)]
        return torch.cat([parts[0] + self.a.bias.double(), parts[1]], 1)


class Gated(nn.Module):
    """A gate beside the upper end."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(7, SIZE), nn.Linear(7, SIZE)
        self.down = nn.Linear(SIZE, OUT)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.sigmoid(self.gate(x)) * self.up(x))
        return result


class Attention(nn.Module):
    """Fixed mixing of tokens, heads of values, grouped; the upper end may be a fused layer."""

    def __init__(self, heads: int, kv_heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.fused = heads, kv_heads, fused
        self.width = SIZE // kv_heads
        self.v = nn.Linear(7, SIZE * (3 if fused else 1))
        self.o = nn.Linear(self.width * heads, OUT)

    def forward(self, x: Tensor) -> Tensor:
        values = self.v(x)[:, -SIZE:].unflatten(1, (self.kv_heads, self.width))
        repeated = values.repeat_interleave(self.heads // self.kv_heads, 1)
        mixing = torch.arange(1.0, len(x) ** 2 * self.heads + 1).reshape(self.heads, len(x), -1)
        mixed = torch.einsum("hst,thw->shw", mixing.sin(), repeated)
        result: Tensor = self.o(mixed.flatten(1))
        return result


CASES: dict[str, tuple[nn.Module, BoundEdge, int]] = {
    "norm": (Norm(), edge(EdgeKind.NORM, "norm", "a", "b"), SIZE),
    "norm, four joined": (Norm(4), edge(EdgeKind.NORM, "norm", "a", "b", tile=4), SIZE),
    "gated": (Gated(), edge(EdgeKind.LINEAR, "up", "down"), 7),
    "values": (
        Attention(4, 4, False),
        edge(EdgeKind.VALUE, "v", "o", heads=4, kv_heads=4),
        7,
    ),
    "grouped values": (
        Attention(6, 2, False),
        edge(EdgeKind.VALUE, "v", "o", heads=6, kv_heads=2),
        7,
    ),
    "values of a fused layer": (
        Attention(3, 3, True),
        edge(EdgeKind.VALUE, "v", "o", heads=3, kv_heads=3, first_row=2 * SIZE),
        7,
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_the_function_stays(kind: str) -> None:
    model, moved, width = CASES[kind]
    filled(model)
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(1))
    before, old = model(x), {name: p.clone() for name, p in model.named_parameters()}
    changed = move_scale(model, moved, drawn(2), torch.float32)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    differ = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert differ == set(changed)
    assert {f"{moved.source}.weight", f"{moved.source}.bias"} <= differ
    assert {f"{name}.weight" for name in moved.consumers} <= differ
    assert not [name for name in moved.consumers if f"{name}.bias" in differ]


@pytest.mark.parametrize("kind", CASES)
def test_the_channel_of_a_column_is_the_one_that_feeds_it(kind: str) -> None:
    """Found by disturbing one channel at a time."""
    model, moved, width = CASES[kind]
    filled(model)
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(1))
    reader = model.get_submodule(moved.consumers[0])
    seen: list[Tensor] = []
    reader.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    upper = model.get_submodule(moved.source)
    columns = torch.full((seen[0].shape[1],), -1)
    for channel in range(SIZE):
        upper.bias[moved.first_row + channel] += 3.0  # type: ignore[index, operator]
        model(x)
        fed = ((seen[-1] - seen[0]).abs() > 1e-4).any(0)
        assert (columns[fed] == -1).all()
        columns[fed] = channel
        upper.bias[moved.first_row + channel] -= 3.0  # type: ignore[index, operator]
    assert torch.equal(channel_of_column(moved, len(columns)), columns)


def test_readers_take_what_a_stored_norm_was_really_divided_by() -> None:
    """The norm is rounded to bfloat16 first; what is left of the product is float32 noise."""
    model, moved, width = CASES["norm"]
    filled(model)
    model.norm.weight.copy_(model.norm.weight.to(torch.bfloat16))  # type: ignore[operator, union-attr]
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(1))
    before = model(x)
    move_scale(model, moved, drawn(3), torch.bfloat16)
    stored = model.norm.weight.to(torch.bfloat16).float()  # type: ignore[operator, union-attr]
    torch.testing.assert_close(stored, model.norm.weight, rtol=1e-6, atol=0)  # type: ignore[union-attr]
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_a_norm_that_is_zero_somewhere_stays_zero_there() -> None:
    """Nothing passes but the shift, which is scaled all the same."""
    model, moved, width = CASES["norm"]
    filled(model)
    model.norm.weight[[0, 5]] = 0.0  # type: ignore[index, operator]
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(1))
    before = model(x)
    move_scale(model, moved, drawn(4), torch.bfloat16)
    assert model.norm.weight[[0, 5]].tolist() == [0.0, 0.0]  # type: ignore[index]
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_plus_the_weight_is_divided_where_that_is_what_a_norm_multiplies_by(
    dtype: torch.dtype,
) -> None:
    """The reader of ``b`` is left alone, and takes the scale all the same."""
    model = filled(FromOne())
    moved = edge(EdgeKind.NORM, "norm", "a", others=("b",), from_one=True)
    old = model.norm.weight.to(dtype).float()  # type: ignore[operator, union-attr]
    # No gain at all; a gain that a coarse dtype loses beside one; a negative one.
    old[:3] = torch.tensor([-1.0, 0.0, -3.0])
    model.norm.weight.copy_(old)  # type: ignore[operator, union-attr]
    scale = drawn(5)
    scale[1] = 4096.0
    x = torch.randn(8, SIZE, generator=torch.Generator().manual_seed(1))
    before = model(x)
    changed = move_scale(model, moved, scale, dtype)
    assert changed == ["norm.weight", "a.weight", "b.weight"]
    new: Tensor = model.norm.weight  # type: ignore[assignment, union-attr]
    assert torch.equal(new.to(dtype).float(), new)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    gain = ((1 + old.double()) / scale)[3:]
    torch.testing.assert_close(1 + new[3:].double(), gain, rtol=0, atol=torch.finfo(dtype).eps * 8)
    assert new[0] == -1
    assert new[1] > -1
    assert new[2] < -1


def test_powers_of_two_are_moved_without_any_rounding() -> None:
    model, moved, _ = CASES["gated"]
    filled(model)
    old = {name: p.clone() for name, p in model.named_parameters()}
    scale = torch.exp2(torch.arange(SIZE) - 5.0)
    move_scale(model, moved, scale, torch.bfloat16)
    assert torch.equal(model.up.weight * scale[:, None], old["up.weight"])  # type: ignore[operator]
    assert torch.equal(model.up.bias * scale, old["up.bias"])  # type: ignore[operator]
    assert torch.equal(model.down.weight / scale, old["down.weight"])  # type: ignore[operator]


def test_every_edge_of_every_family_names_columns_that_exist(tiny_folder: Path) -> None:
    """Each channel feeds the same number of columns; behind a merger four, behind groups two."""
    bound = bind(tiny_folder)
    widths = {site.name: site.in_features for site in bound.sites}
    for bound_edge in bound.edges:
        for name in bound_edge.consumers:
            columns = channel_of_column(bound_edge, widths[name])
            counts = columns.bincount(minlength=bound_edge.size)
            assert len(counts) == bound_edge.size
            assert (counts == widths[name] // bound_edge.size).all()


def test_a_scale_of_one_changes_no_bit() -> None:
    for model, moved, _ in CASES.values():
        filled(model)
        old = {name: p.clone() for name, p in model.named_parameters()}
        move_scale(model, moved, torch.ones(SIZE), torch.float32)
        assert all(torch.equal(p, old[name]) for name, p in model.named_parameters())
