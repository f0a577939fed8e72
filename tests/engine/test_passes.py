"""Passes of a step that halt and go on see what passes from the beginning see."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import prismquant as pq
from prismquant.engine import streamed_model
from prismquant.engine.calls import StepCall
from prismquant.engine.passes import PausedPasses, ReplayedPasses, StepRun

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WIDTH = 4


class Block(nn.Module):
    """Two layers that share an input, one that reads their product, and one that few calls pass."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("gate", "up", "down", "rare"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, x: Tensor, *, rare: bool = False) -> Tensor:
        hidden = self.down(torch.tanh(self.gate(x)) * self.up(x))
        return x + (self.rare(hidden) if rare else hidden)


class Model(nn.Module):
    """Holds a block, as models do."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()


STAGES = [["block.gate", "block.up"], ["block.down"], ["block.rare"]]


def made(rare: tuple[bool, ...] = (True, False, True)) -> StepRun:
    torch.manual_seed(0)
    model = Model().requires_grad_(False)
    kept = [torch.randn(2, WIDTH) for _ in rare]

    def calls() -> Iterator[StepCall]:
        for x, passes in zip(kept, rare, strict=True):
            yield StepCall((x,), {"rare": passes}, None, None, lambda _: None)

    return StepRun(model, "block", calls, contextlib.nullcontext)


def replaced(run: StepRun, name: str, *, anew: bool) -> None:
    """Change a layer's weight, in place or with another module in its stead."""
    layer = run.model.get_submodule(name)
    weight = nn.Parameter(layer.weight.round(decimals=1), requires_grad=False)  # type: ignore[operator]
    if anew:
        layer = nn.Linear(WIDTH, WIDTH, bias=False)
        setattr(run.module, name.rpartition(".")[2], layer)
    layer.weight = weight


@pytest.mark.parametrize("anew", [False, True], ids=["weight replaced", "module replaced"])
@pytest.mark.parametrize("kind", [ReplayedPasses, PausedPasses])
def test_every_stage_sees_what_the_stages_before_it_leave(kind: Any, anew: bool) -> None:
    """Against the module run from its beginning, with hooks of the test's own."""
    run = made()
    passes = kind(run)
    for stage in STAGES:
        expected = []
        for call in run.calls():
            seen: list[Tensor] = []
            layer = run.model.get_submodule(stage[0])
            handle = layer.register_forward_pre_hook(lambda _, args, s=seen: s.append(args[0]))
            run.module(*call.args, **call.kwargs)
            handle.remove()
            expected.append(seen)
        later = [name for names in STAGES[STAGES.index(stage) + 1 :] for name in names]
        for _ in range(2):  # asked twice, the answer is the same
            found = [inputs for _, inputs in passes.inputs(stage[:1], stage, later)]
            assert len(found) == len(expected)
            for inputs, seen in zip(found, expected, strict=True):
                assert list(inputs) == stage[:1][: len(seen)]
                assert all(torch.equal(inputs[stage[0]], x) for x in seen)
        for name in stage:
            replaced(run, name, anew=anew)
    outputs = [output for _, output in passes.outputs()]
    for call, output in zip(run.calls(), outputs, strict=True):
        assert torch.equal(output, run.module(*call.args, **call.kwargs))


def test_a_layer_runs_once_for_each_call() -> None:
    """That is what halting is for."""
    run = made()
    count: Counter[str] = Counter()
    for name in ("gate", "up", "down", "rare"):
        layer = run.module.get_submodule(name)
        layer.register_forward_hook(lambda *_, n=name: count.update([n]))
    passes = PausedPasses(run)
    for stage in STAGES:
        list(passes.inputs(stage, stage, ()))
    list(passes.outputs())
    # A halted call counts again when it goes on through the layer that is there by then.
    assert count == {"gate": 6, "up": 3, "down": 6, "rare": 4}


def test_a_pass_through_a_layer_that_changes_later_begins_anew() -> None:
    """Stages in another order than the module's: what went through the old weight is not kept."""
    run = made()
    passes = PausedPasses(run)
    later = ["block.gate", "block.up"]
    first = [inputs["block.down"] for _, inputs in passes.inputs(STAGES[1], STAGES[1], later)]
    replaced(run, "block.down", anew=False)
    list(passes.inputs(later, later, ()))
    for name in later:
        replaced(run, name, anew=False)
    assert len(first) == 3
    for call, (_, output) in zip(run.calls(), passes.outputs(), strict=True):
        assert torch.equal(output, run.module(*call.args, **call.kwargs))


@pytest.mark.parametrize("kind", [ReplayedPasses, PausedPasses])
def test_a_restart_forgets_what_was_computed(kind: Any) -> None:
    run = made()
    passes = kind(run)
    list(passes.inputs(STAGES[1], STAGES[1], ()))
    replaced(run, "block.gate", anew=True)
    passes.restart()
    for call, inputs in passes.inputs(STAGES[1], STAGES[1], ()):
        x = call.args[0]
        module = run.module
        expected = torch.tanh(module.gate(x)) * module.up(x)  # type: ignore[operator]
        assert torch.equal(inputs["block.down"], expected)


def test_an_error_in_a_pass_reaches_the_caller_and_leaves_the_module_as_it_was() -> None:
    run = made()
    passes = PausedPasses(run)
    list(passes.inputs(STAGES[0], STAGES[0], ()))

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = run.module.get_submodule("down").register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        list(passes.outputs())
    handle.remove()
    assert not any("forward" in vars(module) for module in run.model.modules())
    passes.restart()
    assert len(list(passes.outputs())) == 3


@pytest.mark.slow
def test_whole_checkpoints_are_the_same_either_way(
    tiny_folder: Path,
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every family, ranges before moments, and a float chain beside the first."""
    recipe = pq.load_recipe("w4a8-static-all").with_rules({"correction": "auto"})
    recipe = recipe.with_calibration(samples=4, batch_size=2)
    pq.quantize(tiny_folder, recipe, tmp_path / "paused", calibration_file)
    monkeypatch.setattr(streamed_model, "PausedPasses", ReplayedPasses)
    pq.quantize(tiny_folder, recipe, tmp_path / "replayed", calibration_file)
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("paused", "replayed")
    )
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one)
