"""Replaying a model step by step gives what the whole model gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from prismquant.data import read_samples
from prismquant.data.batches import Batch, make_batches
from prismquant.engine.replay import Replay
from prismquant.engine.token_tables import Lookups
from prismquant.errors import ModelError
from prismquant.models.arch import Modality
from prismquant.models.bind import bind
from prismquant.models.bound import BoundStep
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prismquant.models.bound import BoundModel


def batches_of(folder: Path, data: Path, batch_size: int) -> list[Batch]:
    ids = bind(folder).vision_token_ids
    processor = load_processor(folder)
    return list(
        make_batches(read_samples(data), processor, batch_size=batch_size, vision_token_ids=ids)
    )


def tables_of(model: nn.Module, bound: BoundModel) -> Lookups:
    """The model's own embedding."""
    name = bound.arch.embeddings
    table = model.get_submodule(name).get_parameter("weight")
    return {name: lambda ids: nn.functional.embedding(ids, table)}


def replayed_logits(model: nn.Module, folder: Path, batches: list[Batch]) -> list[torch.Tensor]:
    """Logits from a block-by-block run that holds one hidden state for each batch."""
    bound = bind(folder)
    replay = Replay(model, bound, batches, device=torch.device("cpu"), dtype=torch.float32)

    def forward(step: BoundStep) -> None:
        module = model.get_submodule(step.name)
        for call in replay.calls(step):
            call.keep(module(*call.args, **call.kwargs))

    for step in replay.vision_steps():
        forward(step)
    replay.begin_llm(tables_of(model, bound))
    for step in bound.steps:
        if step.modality is Modality.LLM and step.kind == "block":
            forward(step)
    head = bound.steps[-1]
    module = model.get_submodule(head.name)
    return [module(*call.args, **call.kwargs) for call in replay.calls(head)]


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_replay_equals_the_models_own_forward(
    tiny_folder: Path, calibration_file: Path, batch_size: int
) -> None:
    """Text, images and clips mixed in padded batches; equal to float tolerance where counted."""
    batches = batches_of(tiny_folder, calibration_file, batch_size)
    model = load_float(tiny_folder)
    with torch.no_grad():
        replayed = replayed_logits(model, tiny_folder, batches)
        for logits, batch in zip(replayed, batches, strict=True):
            expected = model(**batch.inputs, use_cache=False).logits
            counted = batch.inputs["attention_mask"].bool()
            torch.testing.assert_close(logits[counted], expected[counted], rtol=1e-5, atol=1e-5)


def test_text_alone_passes_no_vision_step(tiny_folder: Path, tmp_path: Path) -> None:
    import tiny_vlm

    batches = batches_of(tiny_folder, tiny_vlm.samples(tmp_path, kinds=("text",)), 3)
    model = load_float(tiny_folder)
    replay = Replay(
        model, bind(tiny_folder), batches, device=torch.device("cpu"), dtype=torch.float32
    )
    assert replay.vision_steps() == []
    with torch.no_grad():
        for logits, batch in zip(
            replayed_logits(model, tiny_folder, batches), batches, strict=True
        ):
            expected = model(**batch.inputs, use_cache=False).logits
            torch.testing.assert_close(
                logits[batch.inputs["attention_mask"].bool()],
                expected[batch.inputs["attention_mask"].bool()],
            )


def test_vision_steps_come_in_the_order_in_which_the_model_runs_them(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    """Qwen3-VL calls a deepstack merger between two blocks, on the output of the first."""
    folder = tiny("qwen3_vl")
    model = load_float(folder)
    replay = Replay(
        model,
        bind(folder),
        batches_of(folder, calibration_file, 6),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    names = [step.name.removeprefix("model.visual.") for step in replay.vision_steps()]
    assert names == [
        "patch_embed",
        "blocks.0",
        "deepstack_merger_list.0",
        "blocks.1",
        "deepstack_merger_list.1",
        "blocks.2",
        "merger",
    ]


def test_a_model_that_fails_between_its_steps_is_told_in_words(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    folder = tiny("qwen2_vl")
    model = load_float(folder)
    model.model.language_model.rotary_emb.forward = lambda *_: torch.ones(2) @ torch.ones(3)
    with pytest.raises(ModelError, match=r"own code fails between its steps: .*inconsistent"):
        replayed_logits(model, folder, batches_of(folder, calibration_file, 6))


def test_the_model_is_as_before_after_a_replay(tiny_folder: Path, calibration_file: Path) -> None:
    """Stand-ins leave no trace, also when the run ends early."""
    batches = batches_of(tiny_folder, calibration_file, 6)
    model = load_float(tiny_folder)
    with torch.no_grad():
        before = model(**batches[0].inputs, use_cache=False).logits
        replayed_logits(model, tiny_folder, batches)
        after = model(**batches[0].inputs, use_cache=False).logits
    assert torch.equal(before, after)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_what_is_kept_does_not_grow_with_the_number_of_blocks(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    """After each step one hidden state a batch is alive, and of the embeddings only the shape."""
    folder = tiny("qwen2_vl", llm_blocks=4)
    batches = batches_of(folder, calibration_file, 6)
    model, bound = load_float(folder), bind(folder)
    replay = Replay(model, bound, batches, device=torch.device("cpu"), dtype=torch.float32)
    kept = []
    with torch.no_grad():
        for step in replay.vision_steps():
            for call in replay.calls(step):
                call.keep(model.get_submodule(step.name)(*call.args, **call.kwargs))
        replay.begin_llm(tables_of(model, bound))
        for step in bound.steps:
            if step.modality is Modality.LLM and step.kind == "block":
                for call in replay.calls(step):
                    call.keep(model.get_submodule(step.name)(*call.args, **call.kwargs))
                state = replay._llm[0]
                tensors = [state.hidden(), *state.inputs().values()]
                kept.append(
                    sum(
                        x.untyped_storage().nbytes() for x in tensors if isinstance(x, torch.Tensor)
                    )
                )
    assert len(set(kept)) == 1
