"""Verify and repair: what is measured decides, and only beyond its noise."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
from sensitivities import made, of_model

import prismquant as pq
from prismquant import api
from prismquant.errors import ArgumentError, DataError, ModelError, PrismQuantError
from prismquant.evaluate.figures import Deviation, Fidelity, Outcome, summarize
from prismquant.models.bind import bind
from prismquant.plan.make_plan import make_plan
from prismquant.recipe.schema import load_recipe
from prismquant.report.fronts import prediction_table
from prismquant.search.allocate import Mix, allocate
from prismquant.search.constraints import parse_constraints
from prismquant.search.repair import NOISE, PATIENCE, Measured, difference, measured, verify
from prismquant.search.sensitivity import Sensitivity
from prismquant.search.sensitivity_file import write_sensitivity

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SAMPLES = 24


def outcome(name: str, kind: str = "image", **deviations: tuple[float, int]) -> Outcome:
    told = {k: Deviation(tokens, kl, 0) for k, (kl, tokens) in deviations.items()}
    return Outcome(name, kind, "", 1, 0.0, True, None, 0.0, True, None, told)


class World:
    """A model whose true losses differ from the scores, measured on samples that are not alike.

    Args:
        found: The sensitivity; true losses are its scores, but for ``wrong``.
        wrong: Factor of the true loss of some units.
        noise: Of each measured sample, in units of the mean loss.
    """

    def __init__(self, found: Sensitivity, wrong: dict[str, float], noise: float = 0.0) -> None:
        self.found, self.wrong, self.noise = found, wrong, noise
        self.runs: list[Mix] = []
        dice = random.Random(0)
        self.hardness = [dice.lognormvariate(0, 1.5) for _ in range(SAMPLES)]

    def true(self, mix: Mix) -> float:
        losses = 0.0
        for unit in self.found.units:
            option = next(o for o in unit.options if o.format == mix.formats[unit.name])
            own = sum(self.found.weights[k] * s.loss for k, s in option.scores.items())
            losses += self.wrong.get(unit.name, 1.0) * own
        return losses

    def run(self, mix: Mix) -> Measured:
        self.runs.append(mix)
        dice, loss = random.Random(len(self.runs)), self.true(mix)
        outcomes = [
            outcome(str(n), answer=(loss * hard + self.noise * loss * dice.gauss(0, 1), 1))
            for n, hard in enumerate(self.hardness)
        ]
        return measured(outcomes, {"answer": 1.0})


def test_a_score_that_was_far_too_low_is_repaired() -> None:
    """One unit loses fifty times what was scored; the mix gives it more bits in the end."""
    found = made(1)
    constraints = parse_constraints({"bits": 4.6})
    mix = allocate(found, constraints)
    unit = next(u for u in found.units if mix.formats[u.name] == "int4-g128")
    world = World(found, {unit.name: 50.0})
    done = verify(found, mix, constraints, world.run, trials=40)
    assert world.true(done.mix) < 0.8 * world.true(mix)
    assert done.last.loss < done.first.loss
    assert any(swap.kept for swap in done.swaps)
    for swap in done.swaps:
        assert swap.kept == (swap.measured < -NOISE * swap.error)
    for tried in world.runs:
        assert tried.stored_bytes <= mix.stored_bytes
        assert tried.bits <= 4.6
    kept = sum(swap.measured for swap in done.swaps if swap.kept)
    assert done.last.loss == pytest.approx(done.first.loss + kept)
    # Of the mix that is given nothing is left to guess.
    assert done.mix.formats in [tried.formats for tried in world.runs]


def test_where_scores_are_right_nothing_changes_and_few_swaps_are_tried() -> None:
    found = made(1)
    constraints = parse_constraints({"bits": 4.6})
    mix = allocate(found, constraints)
    world = World(found, {})
    done = verify(found, mix, constraints, world.run, trials=40)
    assert done.mix == mix
    assert len(done.swaps) == PATIENCE
    assert not any(swap.kept for swap in done.swaps)
    assert (done.first, len(world.runs)) == (done.last, PATIENCE + 1)


def test_gains_below_noise_are_not_kept() -> None:
    found = made(1)
    constraints = parse_constraints({"bits": 4.6})
    mix = allocate(found, constraints)
    unit = next(u for u in found.units if mix.formats[u.name] == "int4-g128")
    kept = [
        any(s.kept for s in verify(found, mix, constraints, World(found, w, 30.0).run, 3).swaps)
        for w in ({}, {unit.name: 1.05})
    ]
    assert kept == [False, False]


def test_swaps_keep_to_every_constraint() -> None:
    found = made(4)
    asked = {"bits": 5.0, "cap": "vision=5", "floor": "llm=4.9"}
    constraints = parse_constraints(asked)  # type: ignore[arg-type]
    mix = allocate(found, constraints)
    dice = random.Random(2)
    wrong = {unit.name: dice.choice((0.02, 1.0, 30.0)) for unit in found.units}
    world = World(found, wrong)
    verify(found, mix, constraints, world.run, trials=30)
    weights = {
        name: sum(la.weights for u in found.units if u.modality == name for la in u.layers)
        for name in ("vision", "llm")
    }
    for tried in world.runs:
        taken = dict.fromkeys(weights, 0)
        for unit in found.units:
            option = next(o for o in unit.options if o.format == tried.formats[unit.name])
            taken[unit.modality] += option.stored_bytes
        assert 8 * taken["vision"] <= 5 * weights["vision"]
        assert 8 * taken["llm"] >= 4.9 * weights["llm"]
    assert len({tuple(tried.formats.items()) for tried in world.runs}) == len(world.runs)


def test_trials_bound_the_runs() -> None:
    found = made(1)
    constraints = parse_constraints({"max_loss": 5000})
    mix = allocate(found, constraints)
    for trials in (0, 2):
        world = World(found, {})
        done = verify(found, mix, constraints, world.run, trials)
        assert len(done.swaps) == trials
        assert all(tried.stored_bytes <= mix.stored_bytes for tried in world.runs)


# Figures


def test_the_loss_is_the_weighted_mean_of_a_token_of_each_class() -> None:
    outcomes = [
        outcome("a", answer=(1.0, 2), text=(3.0, 6), vision=(8.0, 4)),
        outcome("b", "video", answer=(5.0, 4), vision=(2.0, 10)),
        outcome("a", "text", answer=(0.0, 2), text=(1.0, 2)),
    ]
    found = measured(outcomes, {"answer": 1.0, "text": 0.5, "image": 0.25, "video": 2.0})
    means = {kind: score.loss for kind, score in found.losses.items()}
    assert means == pytest.approx({"answer": 6 / 8, "text": 4 / 8, "image": 8 / 4, "video": 0.2})
    assert found.loss == pytest.approx(0.75 + 0.5 * 0.5 + 0.25 * 2.0 + 2.0 * 0.2)
    assert sum(found.parts.values()) == pytest.approx(found.loss)
    # The errors are those of an evaluation.
    same = summarize([replace(o, kind="image") for o in outcomes]).overall.divergence
    answer = found.losses["answer"]
    assert answer.error == pytest.approx(same["answer"].kl_error)


def test_differences_are_taken_sample_by_sample() -> None:
    """Samples that differ a thousandfold, all a tenth better: the difference is certain."""
    hard = [10.0**n for n in range(-1, 3)]
    before = measured([outcome(str(n), answer=(h, 1)) for n, h in enumerate(hard)], {"answer": 1})
    after = measured(
        [outcome(str(n), answer=(h - 0.05, 1)) for n, h in enumerate(hard)], {"answer": 1}
    )
    change, error = difference(before, after)
    assert change == pytest.approx(-0.05)
    assert error == pytest.approx(0, abs=1e-12)
    assert before.error > 10
    values = [h - s for h, s in zip(hard, (0.1, 0.0, 0.3, 0.2), strict=True)]
    third = measured([outcome(str(n), answer=(v, 1)) for n, v in enumerate(values)], {"answer": 1})
    change, error = difference(before, third)
    mean, spread = -0.15, math.sqrt(sum((x - 0.15) ** 2 for x in (0.1, 0.0, 0.3, 0.2)) / 3)
    assert (change, error) == (pytest.approx(mean), pytest.approx(spread / 2))


@pytest.mark.parametrize(
    ("outcomes", "told"),
    [
        ([outcome("a", answer=(1.0, 1))], "fewer than two"),
        ([outcome(n, text=(1.0, 1)) for n in "ab"], "no sample has answer tokens"),
    ],
)
def test_samples_that_cannot_verify(outcomes: list[Outcome], told: str) -> None:
    with pytest.raises(DataError, match=told):
        measured(outcomes, {"answer": 1.0})


# With a model


@pytest.fixture
def file(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A sensitivity of a small model whose losses are a die's."""
    bound = bind(tiny("qwen2_vl"))
    found = replace(of_model(bound, 5, "int4-g32,int8-channel"), solver="rtn")
    write_sensitivity(tmp_path / "s.json", found)
    return tmp_path / "s.json"


def test_a_mix_is_run_measured_and_repaired(
    file: Path, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "recipe.yaml"
    seen: list[str] = []
    asked: dict[str, Any] = {"cap": "llm=16", "verify": calibration_file, "out": out}
    found = pq.find_mix(file, swaps=3, progress=lambda a, b, name: seen.append(name), **asked)
    verified = found.verified
    assert verified is not None
    assert 1 <= len(verified.swaps) <= 3
    assert seen == [f"measuring mix {n + 1}" for n in range(len(verified.swaps) + 1)]
    text = out.read_text()
    assert f"# measured on {calibration_file}, 6 samples: loss " in text
    assert f"# swaps tried: {len(verified.swaps)}, kept: " in text
    # What is written is the mix that was measured last, and measures the same again.
    folder = tiny("qwen2_vl")
    assert make_plan(load_recipe(out), bind(folder)).total_bytes == found.mix.stored_bytes
    pq.quantize(folder, out, tmp_path / "out")
    again = pq.measure(tmp_path / "out", calibration_file, reference=folder)
    kl = again.overall.divergence["answer"].kl
    assert kl == pytest.approx(verified.last.losses["answer"].loss, rel=1e-6)
    # Nothing of the runs is left.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "recipe.yaml", "s.json"]


def test_another_model_than_the_one_that_was_analyzed(
    file: Path, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    deeper = tiny("qwen2_vl", llm_blocks=3)
    with pytest.raises(PrismQuantError) as caught:
        pq.find_mix(file, cap="llm=6", verify=calibration_file, model=deeper, swaps=0)
    assert isinstance(caught.value, ModelError)
    assert "it is of another model" in caught.value.what


def test_data_that_cannot_verify_are_found_before_any_run(file: Path, tmp_path: Path) -> None:
    with pytest.raises(PrismQuantError, match="nowhere"):
        pq.find_mix(file, cap="llm=6", verify=tmp_path / "nowhere.jsonl")
    with pytest.raises(ArgumentError, match="swaps"):
        pq.find_mix(file, cap="llm=6", verify=file, swaps=-1)


def test_an_evaluation_tells_what_was_predicted(
    file: Path, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    found = pq.find_mix(file, cap="llm=6", out=tmp_path / "r.yaml")
    done = pq.quantize(tiny("qwen2_vl"), tmp_path / "r.yaml", tmp_path / "out")
    (note,) = [note for note in done.notes if "a search predicted" in note]
    assert f"answer {found.mix.losses['answer']:.3g}" in note
    result = pq.measure(tmp_path / "out", calibration_file, reference=tiny("qwen2_vl"))
    assert result.predicted == pytest.approx(dict(found.mix.losses))
    assert Fidelity.from_dict(result.to_dict()) == result
    table = prediction_table(result.to_dict())
    assert table is not None
    kl = result.overall.divergence["answer"].kl
    cells = [str(next(iter(column.cells))) for column in table.columns]
    assert cells[0] == "answer tokens"
    assert float(cells[1]) == pytest.approx(found.mix.losses["answer"], rel=0.01)
    assert float(cells[2].partition(" ")[0]) == pytest.approx(kl, rel=0.01)
    # What has no recipe of a search has no prediction, and no table.
    plain = pq.measure(tiny("qwen2_vl"), calibration_file, reference=tiny("qwen2_vl"))
    assert plain.predicted == {}
    assert prediction_table(plain.to_dict()) is None


def test_calibration_is_that_of_the_analysis(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "what is the colour of the bar ? " * 40
    text = tmp_path / "text.txt"
    text.write_text(f"{words}\f{words}", encoding="utf-8")
    pq.analyze(tiny("llama"), "int4-g64", tmp_path / "s.json", text, seq_length=48, samples=5)
    asked: list[tuple[int | None, int | None]] = []
    for name in ("quantize", "measure"):
        real = getattr(api, name)

        def told(*given: Any, _real: Any = real, **named: Any) -> Any:
            asked.append((named.get("samples"), named["seq_length"]))
            return _real(*given, **named)

        monkeypatch.setattr(api, name, told)
    pq.find_mix(tmp_path / "s.json", bits="14", verify=text, swaps=0)
    assert asked == [(5, 48), (None, 48)]
    # Conversations are not cut, and other calibration data are taken as the recipe says.
    asked.clear()
    talk = tiny_vlm.samples(tmp_path / "talk", kinds=("text",))
    pq.find_mix(tmp_path / "s.json", bits="14", verify=talk, calibration=text, swaps=0)
    assert asked == [(None, None), (None, None)]
