"""Divergences one unit at a time, against whole quantized models that are written and measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import prismquant as pq
from prismquant.models.bind import bind
from prismquant.search import suffix_runs
from prismquant.search.choices import make_choices
from prismquant.search.format_grammar import formats_on_offer, rule_of
from prismquant.search.sensitivity import FLOAT, ChoiceUnit, Sensitivity, TokenClass

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FORMATS = "int4-g32,w8a8,nvfp4,int8-channel+int8-tensor,kv:int8-head"


def analyzed(folder: Path, out: Path, calibration: Path, **options: Any) -> Sensitivity:
    given = {"formats": FORMATS, "method": "kl_div", "solver": "rtn"} | options
    return pq.analyze(folder, out=out, calibration=calibration, **given)


def measured(folder: Path, unit: ChoiceUnit, name: str, calibration: Path, out: Path) -> Any:
    """Deviations of the whole model with one unit quantized, written to disk and read back."""
    choice = formats_on_offer(name)[name]
    recipe: dict[str, Any] = {"rules": []}
    if choice.cache is not None:
        # Scales of each block as the float model gives it keys and values.
        recipe |= {"kv_cache": dict(choice.cache), "calibration": {"block_sequential": False}}
    else:
        match = {"name": [layer.name for layer in unit.layers]}
        recipe["rules"] = [
            {"match": match, "solver": "rtn"} | rule_of(choice),
            {"match": {"role": "patch_embed"}, "activations": "none"},
        ]
    pq.quantize(folder, recipe, out, calibration)
    return pq.measure(out, calibration, reference=folder).overall.divergence


@pytest.mark.parametrize(
    "family", ["qwen3_vl", pytest.param("video_llama_3", marks=pytest.mark.slow)]
)
def test_divergences_are_those_of_whole_quantized_models(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path, family: str
) -> None:
    folder = tiny(family)
    found = analyzed(folder, tmp_path / "found.json", calibration_file)
    tokens: dict[TokenClass, int] = dict(found.calibration["tokens"])
    picked = picks(found)
    assert {unit.modality for unit, _ in picked} == {"vision", "projector", "llm"}
    for number, (unit, name) in enumerate(picked):
        option = next(one for one in unit.options if one.format == name)
        wanted = measured(folder, unit, name, calibration_file, tmp_path / str(number))
        seen = {kind: score.loss for kind, score in option.scores.items()}
        vision = sum(seen[kind] * tokens[kind] for kind in ("image", "video"))
        seen_by_measure = {
            "answer": seen["answer"],
            "text": seen["text"],
            "vision": vision / (tokens["image"] + tokens["video"]),
        }
        for kind, loss in seen_by_measure.items():
            assert loss == pytest.approx(wanted[kind].kl, rel=2e-3, abs=1e-9), (unit.name, name)
        error = option.scores["answer"].error
        assert error == pytest.approx(wanted["answer"].kl_error, rel=1e-2, abs=1e-9)


def picks(found: Sensitivity) -> list[tuple[ChoiceUnit, str]]:
    """Every format in a unit of its own, over all towers; the head; keys and values."""
    layers = [unit for unit in found.units if unit.kind == "layers"]
    names = [name for name in found.formats if not name.startswith("kv:")]
    step = (len(layers) - 1) // 5
    picked = [(layers[n * step], names[n % len(names)]) for n in range(6)]
    cache = found.units[-1]
    return [*picked, (layers[-1], "w8a8"), (cache, cache.options[1].format)]


def losses(found: Sensitivity) -> dict[tuple[str, str, str], float]:
    return {
        (unit.name, option.format, kind): score.loss
        for unit in found.units
        for option in unit.options
        for kind, score in option.scores.items()
    }


@pytest.mark.parametrize("family", [pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "qwen3_vl"])
@pytest.mark.slow
def test_steps_that_are_loaded_one_at_a_time_give_the_same(
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    at_hand = losses(analyzed(tiny(family), tmp_path / "one.json", calibration_file))
    monkeypatch.setattr(suffix_runs, "_fits", lambda _: False)
    streamed = losses(analyzed(tiny(family), tmp_path / "two.json", calibration_file))
    assert streamed == pytest.approx(at_hand, rel=1e-4, abs=1e-10)


def test_every_unit_has_a_score_of_every_format(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    folder = tiny("qwen2_vl")
    found = analyzed(folder, tmp_path / "found.json", calibration_file, disable=["*lm_head*"])
    for unit in found.units:
        for option in unit.options:
            wanted = set() if option.format == FLOAT else {"answer", "text", "image", "video"}
            assert set(option.scores) == wanted
    choices = make_choices(
        bind(folder), formats_on_offer(FORMATS), solver="rtn", disable=["*lm_head*"]
    )
    assert [u.name for u in found.units] == [one.unit.name for one in choices.units]
    assert [o.stored_bytes for u in found.units for o in u.options] == [
        o.stored_bytes for one in choices.units for o in one.unit.options
    ]


def test_the_solver_that_is_asked_for_is_scored(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    given = {"formats": "int4-g32", "modalities": "llm"}
    folder = tiny("qwen2_vl")
    rounded = losses(analyzed(folder, tmp_path / "a.json", calibration_file, **given))
    solved = losses(analyzed(folder, tmp_path / "b.json", calibration_file, solver="gptq", **given))
    assert rounded.keys() == solved.keys()
    better = [solved[key] < rounded[key] for key in rounded if key[2] == "text"]
    assert sum(better) > len(better) / 2
