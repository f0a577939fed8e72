"""Going back through a model unit by unit gives the gradients of the whole model's graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch
from torch import Tensor

from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.engine import activation_store
from prismquant.engine.placement import Placement
from prismquant.engine.visit import Visit
from prismquant.engine.walk import ModelWalk, Unit
from prismquant.models.arch import Modality
from prismquant.models.bind import bind
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor
from prismquant.runtime.mixed import Precision
from prismquant.shards import ShardReader

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from prismquant.data.batches import Batch
    from prismquant.engine.activation_store import ActivationStore
    from prismquant.engine.calls import Gradients
    from prismquant.models.bound import BoundModel

LOSSES = 3
Found = dict[str, list[list[Tensor]]]


def batches_of(folder: Path, data: Path, size: int) -> list[Batch]:
    ids = bind(folder).vision_token_ids
    samples = read_samples(data)
    return list(
        make_batches(samples, load_processor(folder), batch_size=size, vision_token_ids=ids)
    )


def slopes(batches: list[Batch], vocabulary: int) -> list[list[Tensor]]:
    """Gradients of some losses at the logits of each batch; padding has no part in them."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for batch in batches:
        shape = (*batch.attended.shape, vocabulary)
        own = [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(LOSSES)]
        found.append([slope * batch.attended[..., None] for slope in own])
    return found


def outputs_watched(
    model: nn.Module, names: list[str], outputs: dict[str, list[Tensor]]
) -> list[Any]:
    """Keep the outputs of layers, pass by pass, where gradients reach them."""

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            outputs.setdefault(name, []).append(output.requires_grad_(True))

        return hook

    return [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]


def whole_gradients(folder: Path, names: list[str], batches: list[Batch]) -> Found:
    """Gradients at the outputs of all layers, in the graph of the whole model."""
    model = load_float(folder, torch.float64)
    vocabulary = model.get_output_embeddings().out_features
    found: Found = {name: [] for name in names}
    for batch, own in zip(batches, slopes(batches, vocabulary), strict=True):
        outputs: dict[str, list[Tensor]] = {}
        handles = outputs_watched(model, names, outputs)
        logits = model(**batch.whole().inputs, use_cache=False).logits
        for handle in handles:
            handle.remove()
        flat = [(name, output) for name, passes in outputs.items() for output in passes]
        by_loss = [
            torch.autograd.grad(logits, [o for _, o in flat], slope, retain_graph=True)
            for slope in own
        ]
        for number, (name, _) in enumerate(flat):
            found[name].append([gradients[number] for gradients in by_loss])
    return found


def streamed_gradients(
    bound: BoundModel,
    names: list[str],
    batches: list[Batch],
    store: ActivationStore | None = None,
    seen: Callable[[Unit], None] = lambda unit: None,
) -> Found:
    """The same, one unit in memory at a time."""
    placement = Placement(precision=Precision(torch.float64))
    visit = Visit(layers=names, backward=True)
    reader = ShardReader(bound.folder)
    walk = ModelWalk(bound, reader, batches, placement, visit=visit, store=store)
    found: Found = {}
    given = slopes(batches, bound.site("lm_head").out_features)
    for unit in walk.units():
        with unit.loaded():
            seen(unit)
            if not unit.backward:
                with torch.no_grad():
                    unit.advance()
                continue
            for call in unit.graph_calls():
                outputs: dict[str, list[Tensor]] = {}
                own = [site.name for site in unit.layers]
                handles = outputs_watched(walk.models[0].model, own, outputs)
                output = unit.module(*call.call.args, **call.call.kwargs)
                for handle in handles:
                    handle.remove()
                head = unit.step.kind == "head"
                arriving: Gradients = [*given[call.call.batch]] if head else call.arriving
                watched = [(name, one) for name, passes in outputs.items() for one in passes]
                gradients = call.backward(output, arriving, [one for _, one in watched])
                for (name, one), losses in zip(watched, gradients, strict=True):
                    filled = [torch.zeros_like(one) if g is None else g for g in losses]
                    found.setdefault(name, []).append(filled)
    return found


def assert_same(found: Found, expected: Found) -> None:
    assert {*found} == {*expected}
    for name, passes in expected.items():
        assert len(found[name]) == len(passes), name
        for own, losses in zip(found[name], passes, strict=True):
            for a, b in zip(own, losses, strict=True):
                # Norms and rotary embeddings of transformers are float32 in any model.
                limit = 1e-5 * float(b.abs().max()) + 1e-12
                torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-4, atol=limit, msg=name)


@pytest.mark.parametrize("size", [1, 4, 6])
def test_gradients_of_every_layer_of_every_tower_equal_those_of_the_whole_model(
    tiny_folder: Path, calibration_file: Path, size: int
) -> None:
    """Texts, pictures and clips, alone and mixed in padded batches; several losses at once."""
    bound = bind(tiny_folder)
    names = [site.name for site in bound.sites]
    batches = batches_of(tiny_folder, calibration_file, size)
    expected = whole_gradients(tiny_folder, names, batches)
    entry = next(step.sites[0].name for step in bound.steps if step.kind == "entry")
    assert all(float(g.abs().max()) > 0 for losses in expected[entry] for g in losses)
    assert_same(streamed_gradients(bound, names, batches), expected)


def test_several_pictures_and_a_clip_in_one_sample(tiny_folder: Path, tmp_path: Path) -> None:
    bound = bind(tiny_folder)
    names = [site.name for site in bound.sites]
    kinds = ("image+image+video", "text", "video+image", "image+image")
    batches = batches_of(tiny_folder, tiny_vlm.samples(tmp_path, kinds, count=4), 2)
    expected = whole_gradients(tiny_folder, names, batches)
    assert_same(streamed_gradients(bound, names, batches), expected)


def test_gradients_reach_a_block_before_the_last_from_which_features_are_read(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """The last block of this vision tower has no part in the logits."""
    folder = tiny("llava")
    bound = bind(folder)
    names = [
        s.name for s in bound.sites if not s.name.startswith("model.vision_tower.encoder.layers.1")
    ]
    batches = batches_of(folder, tiny_vlm.samples(tmp_path, ("text", "image"), count=4), 4)
    expected = whole_gradients(folder, names, batches)
    assert_same(streamed_gradients(bound, names, batches), expected)


def test_the_way_back_ends_at_the_first_layer_that_is_wanted(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    """And what nothing after it needs is not kept: a walk back holds one unit, too."""
    folder = tiny("qwen3_vl")
    bound, batches = bind(folder), batches_of(folder, calibration_file, 3)
    for first in ("model.language_model.layers.1", "model.visual.blocks.1"):
        names = [site.name for site in bound.sites if site.name.startswith(first)]
        back: list[str] = []

        def see(unit: Unit, back: list[str] = back) -> None:
            back += [unit.name] * unit.backward
            real = {
                step.name
                for step in bound.steps
                if not next(unit.walk.models[0].module(step.name).parameters()).is_meta
            }
            assert real == {unit.name}

        found = streamed_gradients(bound, names, batches, seen=see)
        assert_same(found, whole_gradients(folder, names, batches))
        assert (back[0], back[-1]) == ("lm_head", first)
        assert ("model.visual.merger" in back) == ("visual" in first)


def test_texts_alone_go_back_through_the_language_model(tiny_folder: Path, tmp_path: Path) -> None:
    bound = bind(tiny_folder)
    names = [site.name for site in bound.sites]
    batches = batches_of(tiny_folder, tiny_vlm.samples(tmp_path, kinds=("text",)), 3)
    language = [site.name for site in bound.sites if site.modality is Modality.LLM]
    found = streamed_gradients(bound, names, batches)
    assert_same(found, whole_gradients(tiny_folder, language, batches))


def test_outputs_and_gradients_may_wait_in_files(
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(activation_store, "_LEAST_BYTES", 1)
    folder = tiny("qwen3_vl")
    bound, batches = bind(folder), batches_of(folder, calibration_file, 3)
    names = [site.name for site in bound.sites]
    store = activation_store.OnDisk(tmp_path / "waiting")
    kept = streamed_gradients(bound, names, batches)
    filed = streamed_gradients(bound, names, batches, store)
    for name, passes in kept.items():
        for own, other in zip(passes, filed[name], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    assert not list((tmp_path / "waiting").iterdir())
