"""The first pass: everything is looked at before any work, and no more is held than fits."""

from __future__ import annotations

import json
import shutil
import weakref
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch
from tiny_data import image, mixed_samples, save_picture, text, turns, write_lines

import prismquant as pq
from prismquant.data import Sample, read_samples
from prismquant.data import survey as surveying
from prismquant.data.batch_fingerprint import fingerprint_batch
from prismquant.data.batches import Batch, Batches, make_batches
from prismquant.data.media import Cost, Limits
from prismquant.data.survey import Survey, let_go, position_limit, survey
from prismquant.engine.memory_forecast import TowerTokens, forecast
from prismquant.engine.placement import Placement, placements
from prismquant.errors import DataError
from prismquant.memory import resident_bytes
from prismquant.models.arch import Modality
from prismquant.models.bind import bind
from prismquant.plan.make_plan import make_plan
from prismquant.quantization import prepare
from prismquant.runtime.mixed import Precision

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

PLENTY = 1 << 40


def batches_of(samples: Sequence[Sample], processor: Any, **limits: int) -> Batches:
    return make_batches(
        samples,
        processor,
        batch_size=1,
        vision_token_ids=(5, 6),
        limits=Limits(**limits),
    )


def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surveying, "_KEPT_BYTES", 0)


class Counting:
    """How many batches with pixels were made, and how many there were at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = self.most = 0
        self._alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        make = Batches._made

        def counted(batches: Batches, samples: Sequence[Sample]) -> Batch:
            batch = make(batches, samples)
            for pixels in list(batch.pixels.values())[:1]:
                self.made += 1
                self._alive.add(pixels)
                self.most = max(self.most, len(self._alive))
            return batch

        monkeypatch.setattr(Batches, "_made", counted)


# Memory


def test_what_is_kept_of_a_batch_gives_it_back(
    tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_stays(monkeypatch)
    batches = batches_of(mixed_samples(tmp_path), processor)
    found = survey(batches, most_bytes=PLENTY)
    assert found.prints == tuple(fingerprint_batch(batch) for batch in batches)
    assert found.kept_bytes == 0
    assert found.making == max((batches.cost(n) for n in range(len(batches))), key=lambda c: c.peak)
    for small, batch in zip(found.batches, batches, strict=True):
        assert small.ids == batch.ids
        held = sum(value.untyped_storage().nbytes() for value in small.inputs.values())
        assert held < 4000
        assert small.pixel_bytes == batch.pixel_bytes
        whole = small.whole()
        assert whole.inputs.keys() == small.inputs.keys() == batch.inputs.keys()
        for name, value in batch.inputs.items():
            assert torch.equal(whole.inputs[name], value)
            assert small.inputs[name].shape == value.shape


def test_small_sets_stay_as_far_as_there_is_room(
    tmp_path: Path, processors: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [one for one in mixed_samples(tmp_path) if one.kind != "text"]
    batches = batches_of(samples, processors("qwen2_vl"))
    sizes = [batch.pixel_bytes for batch in batches]
    found = survey(batches, most_bytes=PLENTY)
    assert found.kept_bytes == sum(sizes)
    assert found.making == Cost()
    assert all(batch.again is None for batch in found.batches)
    monkeypatch.setattr(surveying, "_KEPT_BYTES", sum(sizes) - 1)
    found = survey(batches, most_bytes=PLENTY)
    assert sum(batch.again is not None for batch in found.batches) == 1
    # A quarter of what is left.
    monkeypatch.setattr(surveying, "resident_bytes", lambda: PLENTY - 4 * sizes[0] - 10**8)
    monkeypatch.setattr(surveying, "_KEPT_PART", 10**8)
    assert survey(batches, most_bytes=PLENTY).kept_bytes == 0
    hollow = let_go(survey(batches, most_bytes=PLENTY), batches)
    assert all(batch.again is not None for batch in hollow.batches)
    assert torch.equal(
        hollow.batches[0].whole().inputs["input_ids"], batches[0].inputs["input_ids"]
    )


@pytest.mark.parametrize("recipe", ["w4a16", "w4a8-static-all"])
def test_pixels_are_made_when_due_and_let_go(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """However many samples there are, also where the entry is quantized and a float chain runs."""
    data = tiny_vlm.samples(tmp_path / "data", kinds=("image", "video"), count=5)
    chosen = pq.load_recipe(recipe).with_rules({"correction": "auto"})
    chosen = chosen.with_calibration(batch_size=1)
    folder = tiny("qwen2_vl", llm_blocks=1, vision_blocks=1)
    with monkeypatch.context() as patch:
        counting = Counting(patch)
        pq.quantize(folder, chosen, tmp_path / "kept", data)
        assert counting.made == 5
    nothing_stays(monkeypatch)
    counting = Counting(monkeypatch)
    pq.quantize(folder, chosen, tmp_path / "again", data)
    assert counting.made > 10
    # One passes the entry step while statistics still look at the one before.
    assert counting.most <= 2
    for path in (tmp_path / "kept").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_evaluation_holds_one_batch_at_a_time(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_vlm.samples(tmp_path / "data", kinds=("image",), count=6)
    folder = tiny("qwen2_vl")
    expected = pq.measure(folder, data, reference=folder, batch_size=1)
    nothing_stays(monkeypatch)
    counting = Counting(monkeypatch)
    assert pq.measure(folder, data, reference=folder, batch_size=1) == expected
    assert counting.made == 12
    assert counting.most <= 2


def test_pixels_count_in_the_forecast_where_they_are_made(tiny: Callable[..., Path]) -> None:
    bound = bind(tiny("qwen2_vl"))
    tokens = {Modality.VISION: TowerTokens(400, 40), Modality.LLM: TowerTokens(100, 10)}
    given: dict[str, Any] = {
        "resident": 0,
        "placement": placements(torch.device("cpu"), Precision())[-1],
    }
    for recipe, held in (("w4a16", 0), ("w4a16-all", 1)):
        plan = make_plan(pq.load_recipe(recipe), bound)
        making = Cost(peak=3 << 30, pixels=1 << 30)
        found = forecast(plan, bound, tokens, making=making, **given)
        assert found.where == "model.visual.patch_embed"
        # Statistics hold a batch while the next one is made.
        expected = making.peak + held * making.pixels
        assert expected < found.peak_bytes < expected + (512 << 20)
    plan = make_plan(pq.load_recipe("w4a16").with_rules({"solver": "rtn"}), bound)
    assert forecast(plan, bound, tokens, making=making, **given).peak_bytes < 1 << 30


def test_a_batch_that_takes_more_than_is_left_is_refused_before_it_is_made(
    tmp_path: Path, processors: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_picture(tmp_path / "a.png", size=(600, 400))
    line = {"id": "wide", **turns([image("a.png"), text("what ?")])}
    samples = read_samples(write_lines(tmp_path / "data.jsonl", [line]))
    batches = batches_of(samples, processors("qwen2_vl"))
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "_made", lambda *_: pytest.fail("it was made"))
        left = resident_bytes() + batches.cost(0).peak // 2
        with pytest.raises(DataError, match=r"takes \d MiB, and \d MiB are left") as caught:
            survey(batches, most_bytes=left)
    assert caught.value.where == "sample wide"
    assert "--max-pixels" in str(caught.value.remedy)
    smaller = batches_of(samples, processors("qwen2_vl"), max_pixels=2000)
    assert smaller.cost(0).pixels < batches.cost(0).pixels / 20
    # It must be decoded all the same.
    assert 10 * 600 * 400 <= smaller.cost(0).peak < batches.cost(0).peak


def test_a_budget_refuses_a_picture_that_unpacks_to_more(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """A file of some kilobytes; neither is it decoded, nor anything written."""
    from PIL import Image

    side = 9000
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 20_000
    line = {"id": "bomb", **turns([image("bomb.png"), text("what ?")])}
    data, out = write_lines(tmp_path / "data.jsonl", [line]), tmp_path / "out"
    budget = resident_bytes() + (64 << 20)
    with pytest.raises(DataError, match=f"of {side} x {side} pixels takes 772 MiB to read"):
        pq.quantize(tiny("qwen2_vl"), "w4a16", out, data, memory_budget=budget)
    assert not out.exists() or not list(out.iterdir())


def test_the_least_that_helps_is_to_let_pixels_go(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before hidden states wait on disk or passes are repeated."""
    folder = tiny("qwen2_vl")
    bound, plan = bind(folder), make_plan(pq.load_recipe("w4a16"), bind(folder))
    samples = read_samples(tiny_vlm.samples(tmp_path, kinds=("image",), count=3))
    batches = batches_of(samples, pq.load(folder)[1])
    found = survey(batches, most_bytes=PLENTY)
    assert found.kept_bytes > 0
    given = plan, bound, batches, found
    rest = torch.device("cpu"), Precision()
    monkeypatch.setattr(prepare, "resident_bytes", lambda: 10**9)
    wide, kept = prepare.forecast_memory(*given, None, *rest)
    assert kept is found
    narrow, gone = prepare.forecast_memory(*given, wide.peak_bytes - 1, *rest)
    assert gone.kept_bytes == 0
    assert (narrow.placement, narrow.where) == (Placement(), wide.where)
    assert narrow.peak_bytes == wide.peak_bytes - found.kept_bytes


# What is wrong


def test_a_file_that_changes_during_the_run_is_noticed(
    tmp_path: Path, processors: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_stays(monkeypatch)
    save_picture(tmp_path / "a.png")
    line = {"id": "moving", **turns([image("a.png"), text("what ?")])}
    samples = read_samples(write_lines(tmp_path / "data.jsonl", [line]))
    found = survey(batches_of(samples, processors("qwen2_vl")), most_bytes=PLENTY)
    save_picture(tmp_path / "a.png", seed=1)
    with pytest.raises(DataError, match="have changed since the run began") as caught:
        found.batches[0].whole()
    assert caught.value.where == "sample moving"


def test_all_that_is_wrong_is_told_at_once(
    tmp_path: Path, processors: Callable[[str], Any]
) -> None:
    save_picture(tmp_path / "thin.png", size=(1000, 2))
    lines = [
        {"id": "thin", **turns([image("thin.png")])},
        {"id": "long", **turns("what ? " * 40)},
        {"id": "fine", **turns()},
        {"id": "sly", **turns("what is <|image_pad|> ?")},
        {"id": "longer", **turns("what ? " * 60)},
    ]
    samples = read_samples(write_lines(tmp_path / "data.jsonl", lines))
    with pytest.raises(DataError, match="cannot be used, 3 findings") as caught:
        survey(batches_of(samples, processors("qwen2_vl")), most_bytes=PLENTY, positions=60)
    told = caught.value.what
    assert "sample thin: the model's processor refuses the data" in told
    assert "crop the picture" in told
    assert "sample sly: 0 images, but 1 placeholders" in told
    assert "samples long, longer: 91 tokens, 131 tokens: more than the 60 positions" in told
    assert "fine" not in told
    many = [Sample(str(n), "text", samples[3].messages, tmp_path, {}) for n in range(30)]
    with pytest.raises(DataError, match="10 findings"):
        survey(batches_of(many, processors("qwen2_vl")), most_bytes=PLENTY)


@pytest.mark.parametrize("positions", [64, 1024])
def test_a_sample_has_no_more_tokens_than_the_model_has_positions(
    tiny: Callable[..., Path], tmp_path: Path, positions: int
) -> None:
    """Refused in a run and in an evaluation, before any work; cut where that is asked for."""
    folder = shutil.copytree(tiny("qwen2_vl"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = positions
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"id": "long", **turns("what is it ? " * 20)}, {"id": "short", **turns()}]
    data = write_lines(tmp_path / "data.jsonl", lines)

    def both(**given: int) -> tuple[Any, Any]:
        out = tmp_path / f"out{len(given)}"
        return pq.quantize(folder, "w4a16", out, data, **given), pq.measure(folder, data, **given)  # type: ignore[arg-type]

    if positions == 64:
        for run in (
            lambda: pq.quantize(folder, "w4a16", tmp_path / "none", data),
            lambda: pq.measure(folder, data),
        ):
            with pytest.raises(DataError, match="91 tokens: more than the 64 positions") as caught:
                run()
            assert caught.value.where == "sample long"
            assert "--max-length 64" in str(caught.value.remedy)
    else:
        result, measured = both()
        assert not any("cut" in line for line in (*result.plan.remarks, *measured.notes))
    result, measured = both(max_length=50)
    line = "1 sample (long) is cut to the greatest length"
    assert line in result.plan.remarks
    assert line in measured.notes
    assert measured.overall.answers == 1


def test_positions_are_those_of_the_language_model() -> None:
    def limit(**values: Any) -> int | None:
        text_config = SimpleNamespace(**values)
        return position_limit(SimpleNamespace(get_text_config=lambda: text_config))

    assert limit(max_position_embeddings=512) == 512
    assert limit() is None
    stretched = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert limit(max_position_embeddings=512, rope_parameters=stretched) == 2048
    assert limit(max_position_embeddings=4096, rope_parameters=stretched) == 4096


def test_remarks_say_only_what_matters() -> None:
    names = tuple(f"sample-{number}" for number in range(30))
    found = Survey(cut=names, unknown={"a": "this", "b": "that", "c": "this"})
    cut, left = found.remarks(answers=True)
    assert cut.startswith("30 samples (sample-0, sample-1")
    assert len(cut) < 120
    assert left.startswith("3 samples (a, b, c) are left out")
    assert left.endswith(": that; this")
    assert found.remarks(answers=False) == (cut,)
    assert Survey().remarks(answers=True) == ()
