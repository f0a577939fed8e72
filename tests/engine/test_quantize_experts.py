"""Experts are calibrated on the tokens that are sent to them: losses, counts, few tokens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch

import prismquant as pq
from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.diagnostics.expert_coverage import coverage_lines
from prismquant.engine.placement import Placement
from prismquant.engine.setup import Silent
from prismquant.export.load_quantized import load_model
from prismquant.models.bind import bind
from prismquant.models.config import import_transformers
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor
from prismquant.quantization import prepare
from prismquant.shards import ShardReader

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from prismquant.data.batches import Batch
    from prismquant.diagnostics.step_record import LayerRecord, StepRecord
    from prismquant.runtime.mixed import Precision

BLOCK = "model.language_model.layers.0"
EXPERTS = [{"match": {"role": "mlp.experts"}, "weights": "int4-g32", "min_tokens": 0}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, pictures and clips of several lengths."""
    return tiny_vlm.samples(tmp_path_factory.mktemp("data"), count=6)


def batches_of(folder: Path, data: Path, size: int) -> list[Batch]:
    ids = bind(folder).vision_token_ids
    samples, processor = read_samples(data), load_processor(folder)
    return make_batches(samples, processor, batch_size=size, vision_token_ids=ids)


def routed_by_transformers(
    folder: Path, batches: list[Batch], *, everything: bool = False
) -> tuple[list[Tensor], list[Tensor], Any]:
    """Inputs and modalities of each expert of the first block in transformers' own model.

    Padding is left out; modalities are 0 for text, 1 for images, 2 for videos. With ``everything``
    each expert is given all tokens.
    """
    kind: Any = import_transformers().Qwen3VLMoeForConditionalGeneration
    model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    seen: list[tuple[Tensor, Tensor]] = []
    experts = model.get_submodule(f"{BLOCK}.mlp.experts")
    experts.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    inputs, kinds = [[] for _ in range(4)], [[] for _ in range(4)]
    image, video = (model.config.image_token_id, model.config.video_token_id)
    model.requires_grad_(False)
    for batch in batches:
        model(**batch.inputs, use_cache=False)
        hidden, index = seen.pop()
        ids = batch.inputs["input_ids"].flatten()
        kind_of_token = (ids == image).long() + 2 * (ids == video).long()
        counted = batch.inputs["attention_mask"].flatten().bool()
        for expert in range(4):
            chosen = counted if everything else (index == expert).any(dim=1) & counted
            inputs[expert].append(hidden[chosen].double())
            kinds[expert].append(kind_of_token[chosen])
    return [torch.cat(x) for x in inputs], [torch.cat(k) for k in kinds], experts


def layers_of(out: Path, result: Any) -> dict[str, LayerRecord]:
    return {layer.name: layer for step in result.record.steps for layer in step.layers}


@pytest.mark.parametrize(("batch_size", "least"), [(1, 0), (6, 0), (6, 100_000)])
def test_losses_are_those_over_the_tokens_that_transformers_sends(
    batch_size: int, least: int, tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """In float64, from the fused model; with padding, whose rows are sent to experts, too.

    Experts that are sent too few have all tokens in their place.
    """
    folder, out = tiny("qwen3_vl_moe"), tmp_path / "out"
    rules = [EXPERTS[0] | {"min_tokens": least}]
    result = pq.quantize(folder, {"rules": rules}, out, data, batch_size=batch_size)
    found, model = layers_of(out, result), load_model(out)
    batches = batches_of(folder, data, batch_size)
    inputs, kinds, experts = routed_by_transformers(folder, batches, everything=least > 0)
    if batch_size > 1:
        assert any((batch.inputs["attention_mask"] == 0).any() for batch in batches)
    for number, x in enumerate(inputs):
        counts = [int((kinds[number] == kind).sum()) for kind in range(3)]
        gate, up = experts.gate_up_proj[number].double().chunk(2)
        path = f"{BLOCK}.mlp.experts.{number}"

        def weight(leaf: str, path: str = path) -> Tensor:
            return model.get_submodule(f"{path}.{leaf}").weight.double()

        middle = experts.act_fn(x @ weight("gate_proj").T) * (x @ weight("up_proj").T)
        for leaf, own, given in (
            ("gate_proj", gate, x),
            ("up_proj", up, x),
            ("down_proj", experts.down_proj[number].double(), middle),
        ):
            record = found[f"{path}.{leaf}"]
            loss = ((own - weight(leaf)) @ given.T).square().sum() / len(given)
            assert record.loss == pytest.approx(float(loss), rel=2e-3)
            tokens = record.tokens["hessian"]
            assert [tokens.text, tokens.image, tokens.video] == counts
            assert least or record.routed == tokens


def test_the_record_and_the_screen_tell_what_each_expert_was_sent(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    result = pq.quantize(tiny("qwen3_vl_moe"), {"rules": EXPERTS}, tmp_path / "out", data)
    [line] = coverage_lines(result.record.steps)
    assert line.startswith("8 experts were sent ")
    content = json.loads((tmp_path / "out" / "prismquant" / "record.json").read_text())
    routed = [layer["routed"] for step in content["steps"] for layer in step["layers"]]
    assert len(routed) == 24
    # Each token has two experts in each of two blocks, and each expert three layers.
    tokens = sum(int(b.inputs["attention_mask"].sum()) for b in batches_of_all(tiny, data))
    assert sum(sum(one.values()) for one in routed) == tokens * 2 * 2 * 3


def batches_of_all(tiny: Callable[..., Path], data: Path) -> list[Batch]:
    return batches_of(tiny("qwen3_vl_moe"), data, 1)


def test_experts_that_few_tokens_reach_take_all_of_their_block(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    folder, out = tiny("qwen3_vl_moe"), tmp_path / "out"
    rules = [EXPERTS[0] | {"min_tokens": 100}]
    result = pq.quantize(folder, {"rules": rules}, out, data)
    whole = sum(int(b.inputs["attention_mask"].sum()) for b in batches_of(folder, data, 1))
    few = [x for x in layers_of(out, result).values() if x.routed and x.routed.total < 100]
    assert few
    for layer in few:
        assert layer.tokens["hessian"].total == whole
        assert layer.failure is None
    said = coverage_lines(result.record.steps)[1]
    assert said.startswith(f"{len(few) // 3} experts were sent fewer tokens than min_tokens")
    assert few[0].name.rpartition(".")[0] in said


def test_experts_that_few_tokens_reach_are_rounded_where_the_recipe_says_so(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    folder, out, plain = tiny("qwen3_vl_moe"), tmp_path / "out", tmp_path / "rtn"
    rules = [EXPERTS[0] | {"min_tokens": 100_000, "few_tokens": "rtn"}]
    result = pq.quantize(folder, {"rules": rules}, out, data)
    for layer in layers_of(out, result).values():
        assert layer.failure is not None
        assert layer.failure.why.endswith("and min_tokens is 100000")
    assert any("rounded to nearest in place of being solved" in note for note in result.notes)
    pq.quantize(folder, {"rules": [EXPERTS[0] | {"solver": "rtn"}]}, plain)
    mine, theirs = ShardReader(out), ShardReader(plain)
    assert mine.names == theirs.names
    assert all(torch.equal(mine.read(name), theirs.read(name)) for name in mine.names)


class Stopping(Silent):
    """Ends a run after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def finish(self, record: StepRecord) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "recipe",
    ["w4a16", *(pytest.param(one, marks=pytest.mark.slow) for one in ("awq-w4a16", "w8a8-static"))],
)
def test_no_placement_and_no_interruption_changes_a_byte(
    recipe: str,
    tiny: Callable[..., Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Halted and repeated passes, and a run that is taken up again, write the same shards."""
    folder = tiny("qwen3_vl_moe")

    def shards(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}

    halted = pq.quantize(folder, recipe, tmp_path / "halted", data)
    assert "halted" in str(halted.record.memory["placement"])
    with pytest.raises(KeyboardInterrupt):
        # The vision tower and its projectors make six steps, then come two blocks.
        pq.quantize(folder, recipe, tmp_path / "cut", data, reporter=Stopping(7))
    pq.quantize(folder, recipe, tmp_path / "cut", data, resume=True)
    assert shards("cut") == shards("halted")

    def repeated(device: torch.device, precision: Precision) -> tuple[Placement, ...]:
        return (Placement(device, precision, paused=False),)

    monkeypatch.setattr(prepare, "placements", repeated)
    pq.quantize(folder, recipe, tmp_path / "repeated", data)
    assert shards("repeated") == shards("halted")


@pytest.mark.parametrize("sequential", [True, False])
def test_layers_may_all_be_taken_at_once(
    sequential: bool, tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """Then no layer sees what became of those before it, and the last one of an expert neither."""
    folder, out = tiny("qwen3_vl_moe"), tmp_path / "out"
    recipe = {"rules": EXPERTS, "calibration": {"layer_sequential": sequential}}
    found = layers_of(out, pq.quantize(folder, recipe, out, data))
    inputs, _, experts = routed_by_transformers(folder, batches_of(folder, data, 1))
    gate, up = experts.gate_up_proj[0].double().chunk(2)
    middle = experts.act_fn(inputs[0] @ gate.T) * (inputs[0] @ up.T)
    error = (
        experts.down_proj[0].double()
        - load_model(out).get_submodule(f"{BLOCK}.mlp.experts.0.down_proj").weight
    )
    loss = float((error @ middle.T).square().sum() / len(middle))
    exact = pytest.approx(loss, rel=2e-3) == found[f"{BLOCK}.mlp.experts.0.down_proj"].loss
    assert exact is not sequential


@pytest.mark.slow
def test_a_search_gives_all_experts_of_a_block_one_format(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """An analysis scores them together, and what is found can be quantized."""
    folder, found = tiny("qwen3_vl_moe"), tmp_path / "sensitivity.json"
    pq.analyze(folder, ("int4-g32", "int8-g32"), found, data, samples=4, modalities="llm")
    mix = pq.find_mix(found, cap="llm=6")
    plan = pq.quantize(folder, mix.recipe, tmp_path / "out", data).plan
    for block in range(2):
        module = f"model.language_model.layers.{block}.mlp.experts"
        formats = {row.config.weights for row in plan.rows if row.site.name.startswith(module)}
        assert len(formats) == 1


@torch.no_grad()
def test_quantized_inputs_of_experts_are_those_that_are_served(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    folder, out = tiny("qwen3_vl_moe"), tmp_path / "out"
    pq.quantize(folder, "w8a8", out, data)
    model, full = load_model(out), load_float(folder)
    [batch] = batches_of(folder, data, 6)
    mine, theirs = (m(**batch.inputs, use_cache=False).logits for m in (model, full))
    difference = (mine - theirs)[batch.attended].abs()
    assert 1e-4 < difference.mean() < 0.1 * theirs.abs().max()
