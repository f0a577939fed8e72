"""A run keeps to its memory budget, and the placement that does so is not seen in the result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import prismquant as pq
from prismquant.engine.memory_forecast import (
    _COMPILER,
    _SLACK,
    Forecast,
    TowerTokens,
    choose_placement,
    forecast,
)
from prismquant.engine.placement import Placement, placements
from prismquant.errors import PlanError
from prismquant.models.arch import Modality
from prismquant.models.bind import bind
from prismquant.models.experts import DealtExperts
from prismquant.plan.make_plan import make_plan
from prismquant.quantization import prepare
from prismquant.runtime.mixed import Precision

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PLACEMENTS = placements(CPU, Precision())
TOKENS = {Modality.VISION: TowerTokens(40_000, 4_000), Modality.LLM: TowerTokens(10_000, 1_000)}


def peaks(folder: Path, recipe: Any, tokens: dict[Modality, TowerTokens] = TOKENS) -> list[int]:
    bound = bind(folder)
    plan = make_plan(pq.load_recipe(recipe), bound)
    found = [forecast(plan, bound, tokens, resident=0, placement=one) for one in PLACEMENTS]
    return [one.peak_bytes - _SLACK - _COMPILER for one in found]


def test_leaner_placements_take_less(tiny_folder: Path) -> None:
    found = peaks(tiny_folder, "w4a16-all")
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(PLACEMENTS)


def test_more_tokens_take_more_only_where_they_are_held(tiny: Callable[..., Path]) -> None:
    """On disk only the largest batch counts."""
    more = {modality: TowerTokens(3 * t.total, t.largest) for modality, t in TOKENS.items()}
    few, many = peaks(tiny("qwen2_vl"), "w4a16"), peaks(tiny("qwen2_vl"), "w4a16", more)
    assert [a < b for a, b in zip(few, many, strict=True)] == [True, True, False]


def test_a_float_chain_holds_everything_twice(tiny: Callable[..., Path]) -> None:
    one = peaks(tiny("qwen2_vl"), "w4a16")[0]
    recipe = pq.load_recipe("w4a16").with_rules({"correction": "auto"})
    assert peaks(tiny("qwen2_vl"), recipe)[0] > 1.5 * one


def test_dealt_rows_are_held_where_passes_halt(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four experts of 128 features: a row for each of 10,000 tokens, elsewhere of 1,000."""
    dealt = peaks(tiny("llama4"), "w4a16")
    monkeypatch.setattr(DealtExperts, "dealt", False)
    sent = peaks(tiny("llama4"), "w4a16")
    rows = [10_000 if one.paused else 1_000 for one in PLACEMENTS]
    more = [a - b for a, b in zip(dealt, sent, strict=True)]
    assert more == [count * 4 * 128 * 4 for count in rows]


def test_weights_in_bfloat16_take_less_where_nothing_but_a_solver_changes_them(
    tiny: Callable[..., Path],
) -> None:
    """Not where scale is moved, nor where rotation has given them digits."""
    bound = bind(tiny("qwen2_vl", dtype=torch.bfloat16))

    def peak(recipe: str, precision: Precision) -> int:
        plan = make_plan(pq.load_recipe(recipe), bound)
        given: dict[str, Any] = {"resident": 0, "placement": placements(CPU, precision)[-1]}
        found = forecast(plan, bound, {modality: TowerTokens(1, 1) for modality in TOKENS}, **given)
        assert "layers" in found.where
        return found.peak_bytes

    mixed = Precision(torch.float32, torch.bfloat16)
    assert peak("w4a16", mixed) < peak("w4a16", Precision())
    assert peak("smoothquant-gptq-w4a16", mixed) == peak("smoothquant-gptq-w4a16", Precision())


def test_without_data_only_weights_count(tiny: Callable[..., Path]) -> None:
    recipe = pq.load_recipe("w4a16").with_rules({"solver": "rtn"})
    found = peaks(tiny("qwen2_vl"), recipe)
    assert len(set(found)) == 1
    assert found[0] < peaks(tiny("qwen2_vl"), "w4a16")[-1]


def test_the_first_placement_that_fits_is_taken_and_none_is_an_error_with_figures() -> None:
    forecasts = [Forecast(p, 2**30 * (3 - n), "layers.3") for n, p in enumerate(PLACEMENTS)]
    assert choose_placement(forecasts, None) is forecasts[0]
    assert choose_placement(forecasts, 3 * 2**30) is forecasts[0]
    assert choose_placement(forecasts, 2 * 2**30) is forecasts[1]
    with pytest.raises(PlanError, match=r"0\.50 GiB is too small: 1\.00 GiB are needed") as caught:
        choose_placement(forecasts, 2**29)
    assert caught.value.where == "layers.3"
    assert "--batch-size" in str(caught.value.remedy)


@pytest.mark.parametrize("number", range(1, len(PLACEMENTS)))
def test_the_placement_is_not_seen_in_the_result(
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """Static ranges, moments, and a float chain, in mixed precision: bytes of the fastest way."""
    recipe = pq.load_recipe("w4a8-static").with_rules({"correction": "auto"})
    recipe = recipe.with_calibration(samples=4, batch_size=2)
    given = tiny("qwen2_vl"), recipe
    pq.quantize(*given, tmp_path / "fast", calibration_file, dtype="mixed")
    monkeypatch.setattr(prepare, "placements", lambda *given: placements(*given)[number:])
    result = pq.quantize(*given, tmp_path / "lean", calibration_file, dtype="mixed")
    assert result.record.memory["placement"] == PLACEMENTS[number].describe()
    assert not list((tmp_path / "lean").rglob("states*"))
    for path in (tmp_path / "fast").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "lean" / path.name).read_bytes()


def test_a_budget_that_is_too_small_is_refused_before_anything_is_written(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(PlanError, match="memory budget"):
        pq.quantize(tiny("qwen2_vl"), "w4a16", out, calibration_file, memory_budget=2**20)
    assert not out.exists() or not list(out.iterdir())


def test_placements_say_what_they_do() -> None:
    assert Placement().describe() == "passes halted, hidden states in memory"
    for device in (CPU, GPU):
        ladder = placements(device, Precision())
        assert len({one.describe() for one in ladder}) == len(ladder)
    assert placements(GPU, Precision())[1].describe() == (
        "passes halted, hidden states in the host's memory"
    )


def test_a_device_of_its_own_takes_what_the_host_does_not(tiny: Callable[..., Path]) -> None:
    """Weights and passes lie on the device wherever states wait; the host holds these at most."""
    bound = bind(tiny("qwen2_vl"))
    plan = make_plan(pq.load_recipe("w4a16-all"), bound)
    found = [
        forecast(plan, bound, TOKENS, resident=0, placement=one)
        for one in placements(GPU, Precision())
    ]
    device = [one.device_bytes for one in found]
    host = [one.peak_bytes for one in found]
    assert device[0] > device[1] > device[2] == device[3] > 0
    assert host[0] == host[3] < host[1] == host[2]
    assert device[0] - device[1] < host[1] - host[0] <= device[0]
    on_cpu = forecast(plan, bound, TOKENS, resident=0, placement=PLACEMENTS[0])
    assert on_cpu.device_bytes == 0
    assert device[0] == on_cpu.peak_bytes - _SLACK - _COMPILER


def test_what_is_free_on_a_device_chooses_too() -> None:
    sizes = ((1, 8), (3, 4), (3, 2), (1, 2))
    ladder = zip(placements(GPU, Precision()), sizes, strict=True)
    found = [Forecast(one, host, "layers.3", device) for one, (host, device) in ladder]
    assert choose_placement(found, None, 8) is found[0]
    assert choose_placement(found, None, 5) is found[1]
    assert choose_placement(found, 2, 5) is found[3]
    # No placement fits: the device itself has the last word.
    assert choose_placement(found, None, 1) is found[3]
