"""A walk shows what the model itself would, in its order, and loads no more than it must."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.engine import streamed_model
from prismquant.engine.placement import Placement, placements
from prismquant.engine.visit import Visit
from prismquant.engine.walk import ModelWalk, Unit
from prismquant.models.arch import Modality
from prismquant.models.bind import bind
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor
from prismquant.runtime.mixed import Precision
from prismquant.shards import ShardReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from prismquant.data.batches import Batch
    from prismquant.models.bound import BoundModel

CPU = torch.device("cpu")


def batches_of(folder: Path, data: Path, size: int = 3) -> list[Batch]:
    ids = bind(folder).vision_token_ids
    samples = read_samples(data)
    return list(
        make_batches(samples, load_processor(folder), batch_size=size, vision_token_ids=ids)
    )


def walk_of(
    bound: BoundModel,
    batches: list[Batch],
    layers: list[str] | None = None,
    placement: Placement | None = None,
    **visit: Any,
) -> ModelWalk:
    names = [site.name for site in bound.sites] if layers is None else layers
    reader = ShardReader(bound.folder)
    return ModelWalk(bound, reader, batches, placement, visit=Visit(layers=names, **visit))


def stage_inputs(unit: Unit) -> Iterator[tuple[str, Tensor]]:
    for stage in unit.stages:
        names = [site.name for site in stage]
        for _, inputs in unit.inputs(names, names):
            yield from inputs.items()


def own_inputs(
    model: nn.Module, bound: BoundModel, batches: list[Batch]
) -> dict[str, list[Tensor]]:
    """Inputs of all layers in the model's own forward pass."""
    seen: dict[str, list[Tensor]] = {}

    def see(name: str) -> Callable[..., None]:
        return lambda _, args: seen.setdefault(name, []).append(args[0].detach())

    hooks = [
        model.get_submodule(site.name).register_forward_pre_hook(see(site.name))
        for site in bound.sites
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch.whole().inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("placement", placements(CPU, Precision())[:2])
def test_layers_are_given_what_the_model_gives_them(
    tiny_folder: Path, calibration_file: Path, placement: Placement
) -> None:
    """Every layer of every tower, call by call, where nothing is replaced."""
    bound, batches = bind(tiny_folder), batches_of(tiny_folder, calibration_file)
    expected = own_inputs(load_float(tiny_folder), bound, batches)
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for unit in walk_of(bound, batches, placement=placement).units():
            with unit.loaded():
                for name, x in stage_inputs(unit):
                    found.setdefault(name, []).append(x)
                unit.advance()
    assert set(found) == set(expected) == {site.name for site in bound.sites}
    for name, inputs in expected.items():
        for own, ours in zip(inputs, found[name], strict=True):
            torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5, msg=name)


def test_data_flow_no_further_than_the_last_layer_that_is_wanted(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    folder = tiny("qwen2_5_vl")
    bound, batches = bind(folder), batches_of(folder, calibration_file)
    last = "model.language_model.layers.0"
    wanted = [site.name for site in bound.sites if site.name.startswith(last)]
    flows, loaded = {}, {}
    with torch.no_grad():
        for unit in walk_of(bound, batches, wanted).units():
            with unit.loaded():
                flows[unit.name] = unit.flows
                loaded[unit.name] = not next(unit.module.parameters()).is_meta
                unit.advance()
    assert [*flows] == [step.name for step in bound.steps]
    reached = [name for name, flow in flows.items() if flow]
    assert reached == [*flows][: [*flows].index(last) + 1]
    assert loaded == flows


def test_without_batches_units_only_give_their_weights(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they lie on disk, unless the arithmetic is narrower; no module is made."""
    monkeypatch.setattr(streamed_model, "empty_model", lambda *_: pytest.fail("a model was made"))
    bound = bind(tiny("qwen3_vl", dtype=torch.float16))
    for arithmetic, dtype in ((torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)):
        placement = Placement(precision=Precision(arithmetic))
        units = list(walk_of(bound, [], placement=placement).units())
        assert [unit.name for unit in units] == [step.name for step in bound.steps]
        for unit in units:
            assert not unit.flows
            with unit.loaded():
                for site in unit.layers:
                    weight = unit.weight(site)
                    assert weight.shape == (site.out_features, site.in_features)
                    assert weight.dtype == dtype
            with pytest.raises(RuntimeError, match="no data"):
                _ = unit.module


def test_what_is_replaced_is_seen_by_later_stages_and_not_by_the_float_chain(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    folder = tiny("qwen2_vl")
    bound, batches = bind(folder), batches_of(folder, calibration_file)
    values, out = (
        bound.site(f"model.language_model.layers.0.self_attn.{name}_proj") for name in "vo"
    )
    seen: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for unit in walk_of(bound, batches, [values.name, out.name], float_chain=True).units():
            with unit.loaded():
                if unit.layers:
                    assert [[site.name for site in stage] for stage in unit.stages] == [
                        [values.name],
                        [out.name],
                    ]
                    list(unit.inputs([values.name], [values.name]))
                    unit.replace(values, torch.zeros_like(unit.weight(values)))
                    quantized = unit.inputs([out.name], [out.name])
                    floats = unit.float_inputs([out.name], [out.name])
                    for (_, ours), (_, theirs) in zip(quantized, floats, strict=True):
                        seen.append((ours[out.name], theirs[out.name]))
                unit.advance()
    assert len(seen) == len(batches)
    for ours, theirs in seen:
        # Without values nothing is left but the bias, which is the same for every token.
        torch.testing.assert_close(ours, ours[:, :1].expand_as(ours))
        assert theirs.std(dim=1).min() > 0


def test_a_walk_in_one_stage_takes_all_layers_at_once(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    folder = tiny("qwen2_vl")
    bound, batches = bind(folder), batches_of(folder, calibration_file)
    blocks = []
    with torch.no_grad():
        for unit in walk_of(bound, batches, stagewise=False).units():
            with unit.loaded():
                assert unit.stages == (unit.layers,)
                unit.advance()
            blocks += [unit] if unit.step.kind == "block" else []
    assert {site.modality for unit in blocks for site in unit.layers} == {*Modality} - {
        Modality.PROJECTOR
    }


def test_only_one_unit_at_a_time_has_weights(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    folder = tiny("video_llama_3")
    bound, batches = bind(folder), batches_of(folder, calibration_file)
    going = walk_of(bound, batches)
    names = {step.name for step in bound.steps}
    with torch.no_grad():
        for unit in going.units():
            with unit.loaded():
                real = {n for n, p in going.models[0].model.named_parameters() if not p.is_meta}
                owners = {owner for owner in names if any(n.startswith(f"{owner}.") for n in real)}
                assert owners == {unit.name}
                unit.advance()


def test_a_module_around_units_is_loaded_without_them(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    """A parameter beside the towers must not bring the whole model into memory."""
    folder = tiny("qwen2_vl", layout="native")
    walk = walk_of(bind(folder), batches_of(folder, calibration_file))
    assert walk.main is not None
    walk.main.module("model").register_parameter("newline", torch.nn.Parameter(torch.ones(8)))
    real = walk.main._reader.read

    def read(name: str) -> Tensor:
        return torch.full((8,), 3.0) if name.endswith("newline") else real(name)

    walk.main._reader.read = read  # type: ignore[method-assign]
    assert "model" in walk.main.between_units(vision=False)
    with walk.main.loaded(["model"]):
        loaded = [name for name, one in walk.main.model.named_parameters() if not one.is_meta]
        assert loaded == ["model.newline"]
        assert float(walk.main.module("model").get_parameter("newline").sum()) == 24.0
    assert all(one.is_meta for one in walk.main.model.parameters())
