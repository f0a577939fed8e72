"""Weights of vision tokens: against autograd by hand, and what the engine does with them."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch
from torch.nn import functional

import prismquant as pq
from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.engine import activation_store, gradients
from prismquant.engine.gradients import (
    floored,
    gradient_ratios,
    gradient_samples,
    vision_weights,
    wants_gradients,
)
from prismquant.engine.placement import Placement
from prismquant.engine.setup import Silent
from prismquant.engine.walk import ModelWalk, Unit
from prismquant.errors import DataError, NumericsError, PrismQuantError
from prismquant.export.load_quantized import load_model
from prismquant.models.arch import Modality
from prismquant.models.bind import bind
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor
from prismquant.plan.make_plan import make_plan
from prismquant.plan.source import source_reader
from prismquant.runtime.mixed import Precision
from prismquant.shards import ShardReader

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from prismquant.data import Sample
    from prismquant.data.batches import Batch
    from prismquant.diagnostics.step_record import StepRecord
    from prismquant.models.bound import BoundModel

LAYERS = "model.language_model.layers"
# Little to quantize, and no search for ranges.
LITTLE = (
    {"match": {"name": "re:.*mlp.*|.*layers.0.*"}, "skip": True},
    {"weight_range": "minmax"},
)
GRADIENT = {"match": {"modality": "llm"}, "vision_weight": "gradient"}


def recipe(*rules: dict[str, Any], preset: str = "w4a16", solver: str = "gptq") -> pq.Recipe:
    chosen = pq.load_recipe(preset).with_rules({"solver": solver}, *rules)
    return chosen.with_calibration(batch_size=4)


def batches_of(folder: Path, samples: Sequence[Sample], batch_size: int) -> list[Batch]:
    ids = bind(folder).vision_token_ids
    processor = load_processor(folder)
    return list(make_batches(samples, processor, batch_size=batch_size, vision_token_ids=ids))


def without_answers(data: Path) -> Path:
    """A copy of a calibration file, beside it, whose conversations end with the question."""
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    asked = [line | {"messages": line["messages"][:1], "id": f"q-{line['id']}"} for line in lines]
    path = data.parent / "questions.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in asked) + "\n")
    return path


def llm_inputs(bound: BoundModel) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for site in bound.sites:
        if site.modality is Modality.LLM:
            groups.setdefault(site.input_key, []).append(site.name)
    return groups


class Edited(ShardReader):
    """A checkpoint in which some tensors are others."""

    def __init__(self, bound: BoundModel, edits: dict[str, Callable[[Tensor], Tensor]]) -> None:
        super().__init__(bound.folder)
        self.edits = {bound.names.to_disk(name): edit for name, edit in edits.items()}

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        return self.edits[name](tensor) if name in self.edits else tensor


def ratios_of(
    bound: BoundModel, batches: Sequence[Batch], reader: ShardReader | None = None
) -> dict[str, float]:
    """Ratios in float64."""
    placement = Placement(precision=Precision(torch.float64))
    return gradient_ratios(bound, reader or ShardReader(bound.folder), batches, placement)


def by_hand(model: nn.Module, bound: BoundModel, singles: Sequence[Batch]) -> dict[str, float]:
    """The definition, written out: one sample at a time, all gradients kept, full logits."""
    groups = llm_inputs(bound)
    totals = {key: torch.zeros(2, dtype=torch.float64) for key in groups}
    for batch in singles:
        outputs: dict[str, Tensor] = {}

        def keep(name: str, outputs: dict[str, Tensor] = outputs) -> Callable[..., Tensor]:
            def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
                outputs[name] = output + torch.zeros_like(output, requires_grad=True)
                return outputs[name]

            return hook

        names = [name for members in groups.values() for name in members]
        handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in names]
        logits = model(**batch.inputs, use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        answer = batch.answer_mask[0].nonzero().flatten()
        vision = batch.vision_mask[0]
        if not len(answer) or not vision.any():
            continue
        chosen = functional.log_softmax(logits.double(), dim=-1)[answer - 1]
        loss = -chosen.gather(1, batch.inputs["input_ids"][0, answer][:, None]).sum()
        found = dict(
            zip(names, torch.autograd.grad(loss, [outputs[n] for n in names]), strict=True)
        )
        for key, members in groups.items():
            squares = torch.cat([found[name][0] for name in members], dim=-1).double() ** 2
            if squares.any():
                means = torch.stack([squares[~vision].mean(), squares[vision].mean()])
                totals[key] += means / squares.mean()
    return {key: float(v / t) if t else 1.0 for key, (t, v) in totals.items()}


def test_ratios_equal_autograd_by_hand(tiny_folder: Path, calibration_file: Path) -> None:
    """In one padded batch of texts, pictures and clips as sample by sample, for every layer."""
    bound, samples = bind(tiny_folder), read_samples(calibration_file)
    model = load_float(tiny_folder, torch.float64)
    expected = by_hand(model, bound, batches_of(tiny_folder, samples, 1))
    together = batches_of(tiny_folder, samples, len(samples))
    assert not together[0].attended.all()
    found = ratios_of(bound, together)
    # Norms and rotary embeddings of transformers are float32 in any model.
    assert found == pytest.approx(expected, rel=1e-4)
    assert len({round(ratio, 6) for ratio in found.values()}) > 4


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_ratios_do_not_depend_on_how_samples_are_batched(
    tiny: Callable[..., Path], calibration_file: Path, batch_size: int
) -> None:
    folder, samples = tiny("qwen2_vl"), read_samples(calibration_file)
    bound = bind(folder)
    expected = ratios_of(bound, batches_of(folder, samples, 6))
    other = ratios_of(bound, batches_of(folder, samples[::-1], batch_size))
    assert other == pytest.approx(expected, rel=1e-4)


def test_outputs_may_wait_in_files_and_one_unit_is_in_memory_at_a_time(
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same numbers, bit for bit; what was kept is gone with the walk."""
    monkeypatch.setattr(activation_store, "_LEAST_BYTES", 1)
    folder = tiny("qwen3_vl")
    bound, batches = bind(folder), batches_of(folder, read_samples(calibration_file), 3)
    loaded: list[int] = []

    class Counting(ModelWalk):
        def units(self) -> Generator[Unit, None, None]:
            for unit in super().units():
                yield unit
                real = [p for p in self.models[0].model.parameters() if not p.is_meta]
                loaded.append(sum(p.numel() for p in real))

    monkeypatch.setattr(gradients, "ModelWalk", Counting)
    reader, store = ShardReader(folder), activation_store.OnDisk(tmp_path / "waiting")
    in_memory = gradient_ratios(bound, reader, batches)
    assert gradient_ratios(bound, reader, batches, store=store) == in_memory
    assert not list((tmp_path / "waiting").iterdir())
    between = sum(math.prod(shape) for name, shape in bound.shapes.items() if ".norm." in name)
    assert max(loaded) < between + 20_000


def test_texts_and_samples_without_an_answer_say_nothing(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    folder, samples = tiny("qwen2_vl"), read_samples(calibration_file)
    bound = bind(folder)
    seeing = [sample for sample in samples if sample.kind != "text"]
    questions = read_samples(without_answers(calibration_file))
    expected = ratios_of(bound, batches_of(folder, seeing, 4))
    mixed = ratios_of(bound, batches_of(folder, [*samples, *questions], 12))
    assert mixed == pytest.approx(expected, rel=1e-4)
    with pytest.raises(DataError, match="needs answers"):
        ratios_of(bound, batches_of(folder, questions, 6))


def test_vision_tokens_that_cannot_reach_the_answer_count_nothing(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    """Without the output of attention no token hears of another."""
    folder = tiny("qwen2_vl")
    bound = bind(folder)
    names = [f"{LAYERS}.{block}.self_attn.o_proj.weight" for block in range(2)]
    reader = Edited(bound, dict.fromkeys(names, torch.zeros_like))
    ratios = ratios_of(bound, batches_of(folder, read_samples(calibration_file), 6), reader)
    for key, names in llm_inputs(bound).items():
        # Queries, keys and values have no gradient at any token: nothing to compare.
        assert ratios[key] == (1.0 if len(names) == 3 else 0.0), key
    assert all(weight in (0.0, 1.0) for weight in floored(ratios, bound).values())


def test_vision_tokens_of_the_last_block_count_through_keys_and_values_only(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    folder = tiny("qwen2_vl")
    bound = bind(folder)
    ratios = ratios_of(bound, batches_of(folder, read_samples(calibration_file), 6))
    weights = floored(ratios, bound)
    for key, names in llm_inputs(bound).items():
        reached = ".0." in names[0] or len(names) == 3
        assert (ratios[key] > 0) == reached, key
    down = [bound.site(f"{LAYERS}.{block}.mlp.down_proj").input_key for block in range(2)]
    assert weights[down[0]] == ratios[down[0]]
    assert weights[down[1]] == pytest.approx(ratios[down[0]] / 2)


def test_the_floor_is_the_median_over_blocks_of_the_same_place(tiny: Callable[..., Path]) -> None:
    bound = bind(tiny("qwen2_vl", llm_blocks=3))
    ratios = dict.fromkeys(llm_inputs(bound), 0.0)
    downs = [bound.site(f"{LAYERS}.{block}.mlp.down_proj").input_key for block in range(3)]
    gates = [bound.site(f"{LAYERS}.{block}.mlp.up_proj").input_key for block in range(3)]
    ratios |= dict(zip(downs, (0.1, 0.5, 2.0), strict=True))
    ratios |= dict(zip(gates, (4.0, 3.0, 1.0), strict=True))
    weights = floored(ratios, bound)
    assert [weights[key] for key in downs] == [0.5, 0.5, 2.0]
    assert [weights[key] for key in gates] == [4.0, 3.0, 3.0]
    assert weights[bound.site("lm_head").input_key] == 0


def test_layers_that_read_one_input_share_a_weight(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    """And only those that ask get one, the same whatever else the recipe says."""
    folder = tiny("qwen2_vl")
    bound, samples = bind(folder), read_samples(calibration_file)
    batches, found = batches_of(folder, samples, 3), []
    narrow = {"match": {"role": "attn.qkv", "name": "*layers.1.*"}, "vision_weight": "gradient"}
    for rule in (GRADIENT, narrow):
        plan = make_plan(recipe(rule), bound)
        found.append(vision_weights(plan, bound, batches))
    names = [f"{LAYERS}.1.self_attn.{part}_proj" for part in "qkv"]
    assert list(found[1]) == names
    assert len({found[1][name] for name in names}) == 1
    assert found[1] == {name: found[0][name] for name in names}
    # The head is left alone.
    assert len(found[0]) == 2 * 7


def test_a_rotation_leaves_the_weights_as_they_are(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    """Outputs are turned by orthogonal matrices, which keep the length of a gradient."""
    folder = tiny("qwen2_vl")
    bound = bind(folder)
    batches = batches_of(folder, read_samples(calibration_file), 6)
    turn = {"name": "rotation", "match": {"modality": "llm"}}
    rotated = source_reader(make_plan(recipe().with_transforms(turn), bound), bound)
    name = bound.names.to_disk(f"{LAYERS}.1.mlp.down_proj.weight")
    assert (rotated.read(name) - ShardReader(folder).read(name)).abs().max() > 0.1
    expected = ratios_of(bound, batches)
    assert ratios_of(bound, batches, rotated) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tells_nearly_the_same(
    tiny: Callable[..., Path], calibration_file: Path, dtype: torch.dtype
) -> None:
    folder = tiny("qwen2_vl")
    bound, samples = bind(folder), read_samples(calibration_file)
    plan, batches = make_plan(recipe(GRADIENT), bound), batches_of(folder, samples, 3)
    half = vision_weights(plan, bound, batches, Placement(precision=Precision(dtype)))
    full = vision_weights(plan, bound, batches)
    assert half == pytest.approx(full, rel=0.3)


def test_gradients_are_wanted_only_where_statistics_are(tiny: Callable[..., Path]) -> None:
    bound = bind(tiny("qwen2_vl"))

    def wanted(chosen: pq.Recipe) -> bool:
        return wants_gradients(make_plan(chosen, bound))

    awq = {"name": "awq", "match": {"modality": "llm"}}
    assert wanted(recipe(GRADIENT))
    assert not wanted(recipe())
    assert not wanted(recipe(GRADIENT, solver="rtn"))
    assert wanted(recipe(GRADIENT, solver="rtn").with_transforms(awq))
    tower = {"match": {"name": "*visual*"}, "vision_weight": "gradient"}
    assert not wanted(recipe(tower, preset="w4a16-all"))


def test_samples_are_answered_and_show_something(tmp_path: Path) -> None:
    data = tiny_vlm.samples(tmp_path, count=30)
    samples, questions = read_samples(data), read_samples(without_answers(data))
    chosen = gradient_samples([*samples, *questions], limit=8)
    assert [sample.kind for sample in chosen].count("image") == 4
    assert [sample.kind for sample in chosen].count("video") == 4
    assert all(sample.answer for sample in chosen)
    assert gradient_samples([s for s in questions if s.kind == "text"]) == ()
    with pytest.raises(DataError, match="needs answers"):
        gradient_samples([*questions, *(s for s in samples if s.kind == "text")])


def test_the_engine_weighs_by_gradients(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """As if the recipe had named each layer's number; also after a run that was cut off."""

    class Stops(Silent):
        def finish(self, record: StepRecord) -> None:
            if record.name == f"{LAYERS}.1":
                raise KeyboardInterrupt

    folder = tiny("qwen2_vl")
    awq = {"name": "awq", "match": {"modality": "llm"}, "options": {"grid": 3}}
    plain = recipe(*LITTLE).with_transforms(awq)
    chosen = plain.with_rules(GRADIENT)
    bound, samples = bind(folder), read_samples(calibration_file)
    weights = vision_weights(
        make_plan(chosen, bound),
        bound,
        batches_of(folder, gradient_samples(samples), 1),
    )
    numbers = [{"match": {"name": n}, "vision_weight": w} for n, w in weights.items()]
    pq.quantize(folder, chosen.with_rules(*numbers), tmp_path / "numbers", calibration_file)
    with pytest.raises(KeyboardInterrupt):
        pq.quantize(folder, chosen, tmp_path / "out", calibration_file, reporter=Stops())
    pq.quantize(folder, chosen, tmp_path / "out", calibration_file, resume=True)
    pq.quantize(folder, plain, tmp_path / "plain", calibration_file)
    found, expected, unweighed = (
        load_model(tmp_path / name).state_dict() for name in ("out", "numbers", "plain")
    )
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    assert any(not torch.equal(value, unweighed[name]) for name, value in found.items())


def test_text_alone_needs_no_weights(tiny: Callable[..., Path], tmp_path: Path) -> None:
    data = tiny_vlm.samples(tmp_path / "data", kinds=("text",))
    for name, chosen in (("a", recipe(*LITTLE, GRADIENT)), ("b", recipe(*LITTLE))):
        pq.quantize(tiny("qwen2_vl"), chosen, tmp_path / name, data)
    models = [load_model(tmp_path / name).state_dict() for name in "ab"]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_missing_answers_are_refused_before_any_work(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    data = without_answers(tiny_vlm.samples(tmp_path / "data"))
    with pytest.raises(DataError, match="needs answers"):
        pq.quantize(tiny("qwen2_vl"), recipe(GRADIENT), tmp_path / "out", data)
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_named(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    folder = tiny("qwen2_vl")
    bound = bind(folder)
    broken = {f"{LAYERS}.1.mlp.up_proj.weight": lambda weight: torch.full_like(weight, torch.nan)}
    samples = [s for s in read_samples(calibration_file) if s.kind == "image"]
    with pytest.raises(NumericsError) as caught:
        ratios_of(bound, batches_of(folder, samples, 1), Edited(bound, broken))
    assert samples[0].id in str(caught.value)


def test_a_model_that_does_not_fit_is_explained(
    tiny: Callable[..., Path], calibration_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("qwen2_vl")
    bound = bind(folder)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(gradients, "ModelWalk", full)
    batches = batches_of(folder, read_samples(calibration_file), 6)
    with pytest.raises(PrismQuantError, match="one block does not fit on cpu") as caught:
        vision_weights(make_plan(recipe(GRADIENT), bound), bound, batches)
    assert "vision_weight" in str(caught.value)
