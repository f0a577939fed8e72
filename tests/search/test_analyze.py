"""Analyzing a model: words, the file, going on after a break, and what is told."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import prismquant as pq
from prismquant.errors import ArgumentError, DataError, PrismQuantError, StorageError
from prismquant.report.sensitivities import modality_table, unit_table
from prismquant.run.directory import NOTHING_TO_RESUME
from prismquant.search.analysis_methods import METHODS
from prismquant.search.analysis_request import (
    SilentAnalysis,
    as_modalities,
    as_token_weights,
)
from prismquant.search.sensitivity_file import read_sensitivity

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prismquant.search.analysis import UnitScores

GIVEN: dict[str, Any] = {"formats": "int4-g32,w8a8", "method": "kl_div", "solver": "rtn"}


class Stopper(SilentAnalysis):
    """Stops after so many units; counts and notes what it is told."""

    def __init__(self, units: int = -1) -> None:
        self.left, self.scores, self.remarks = units, [], []  # type: ignore[var-annotated]

    def remark(self, line: str) -> None:
        self.remarks.append(line)

    def scored(self, scores: UnitScores, seconds: float) -> None:
        self.scores.append(scores.unit)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def run(folder: Path, out: Path, calibration: Path | None, **options: Any) -> Any:
    return pq.analyze(folder, out=out, calibration=calibration, **(GIVEN | options))


def test_the_file_is_what_is_returned(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.json"
    found = run(tiny("qwen2_vl"), out, calibration_file, weight="answer=1,text=0.5")
    assert read_sensitivity(out) == found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json"]
    assert found.weights == {"answer": 1.0, "text": 0.5, "image": 0.0, "video": 0.0}
    assert found.calibration["samples"] == {"text": 2, "image": 2, "video": 2}
    assert set(found.calibration["tokens"]) == {"answer", "text", "image", "video"}
    assert (found.method, found.solver, found.architecture) == ("kl_div", "rtn", "qwen2_vl")
    first = out.read_bytes()
    assert run(tiny("qwen2_vl"), out, calibration_file, weight="answer=1,text=0.5") == found
    assert out.read_bytes() == first


@pytest.mark.parametrize("method", ["fisher", pytest.param("kl_div", marks=pytest.mark.slow)])
@pytest.mark.parametrize("units", [1, 6, pytest.param(10, marks=pytest.mark.slow)])
def test_an_analysis_that_is_cut_off_goes_on_to_the_same_bytes(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path, units: int, method: str
) -> None:
    folder, given = tiny("qwen2_vl"), {"formats": "int4-g32,kv:int8", "method": method}
    run(folder, tmp_path / "whole.json", calibration_file, **given)
    cut = tmp_path / "cut.json"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(folder, cut, calibration_file, reporter=Stopper(units), resume=True, **given)
        assert not cut.exists()
        assert (tmp_path / "cut.json.partial").is_dir()
    last = Stopper()
    run(folder, cut, calibration_file, reporter=last, resume=True, **given)
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert len(last.scores) == len(whole["units"]) - 2 * units
    assert cut.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not (tmp_path / "cut.json.partial").exists()


def test_what_was_cut_off_is_neither_lost_nor_mixed_up(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    out, folder = tmp_path / "s.json", tiny("qwen2_vl")
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, calibration_file, reporter=Stopper(2))
    with pytest.raises(StorageError, match="an earlier analysis that was cut off") as caught:
        run(folder, out, calibration_file)
    assert "--resume" in str(caught.value.remedy)
    changes: dict[str, dict[str, Any]] = {
        "solver: .*gptq": {"solver": "gptq"},
        "formats": {"formats": "int4-g32"},
        "samples instead of": {"samples": 4},
        "units": {"disable": "*lm_head*"},
    }
    for said, change in changes.items():
        with pytest.raises(StorageError, match=said):
            run(folder, out, calibration_file, resume=True, **change)
    with pytest.raises(StorageError, match="cannot resume"):
        run(tiny("qwen2_vl", seed=1), out, calibration_file, resume=True)
    unit = next((tmp_path / "s.json.partial").glob("unit-*.json"))
    unit.write_text(unit.read_text().replace('"loss": ', '"lost": '))
    with pytest.raises(StorageError, match="the file is damaged"):
        run(folder, out, calibration_file, resume=True)


def test_a_strangers_files_are_left_alone(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.json"
    out.write_text("{}")
    with pytest.raises(StorageError, match="not an earlier result of this command"):
        run(tiny("qwen2_vl"), out, calibration_file)
    (tmp_path / "t.json.partial").mkdir()
    (tmp_path / "t.json.partial" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="notes"):
        run(tiny("qwen2_vl"), tmp_path / "t.json", calibration_file)
    with pytest.raises(StorageError, match="a file in what the command reads"):
        run(tiny("qwen2_vl"), tiny("qwen2_vl") / "s.json", calibration_file)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "kldiv"}, "did you mean 'kl_div'"),
        ({"solver": "gtpq"}, "did you mean 'gptq'"),
        ({"formats": "w4a9"}, "did you mean 'w4a"),
        ({"modalities": "lllm"}, "did you mean 'llm'"),
        ({"weight": "answers=1"}, "did you mean 'answer'"),
        ({"weight": "answer"}, "no class of tokens with its weight"),
        ({"weight": {"answer": -1}}, "neither 0 nor from 1e-06 to 1000"),
        ({"weight": "answer=1e-320"}, "neither 0 nor from 1e-06 to 1000"),
        ({"weight": "answer=inf"}, "neither 0 nor from 1e-06 to 1000"),
        ({"weight": "answer=nan"}, "neither 0 nor from 1e-06 to 1000"),
        ({"weight": ""}, "has a weight above 0"),
        ({"modalities": ""}, "no modality is named"),
        ({"modalities": [" , "]}, "leave it out to choose for all"),
        ({"weight": "answer=0"}, "has a weight above 0"),
        ({"disable": [""]}, "no name of layers"),
        ({"disable": 5}, "5 is no name of layers"),
        ({"modalities": 5}, "no modality 5"),
        ({"modalities": "LLM"}, "did you mean 'llm'"),
        ({"solver": "GPTQ"}, "did you mean 'gptq'"),
        ({"formats": "int4-g32+fp8"}, "did you mean 'mxfp8'"),
        ({"weight": 5}, "5 is no class of tokens"),
        ({"formats": 5}, "5 is not the name of a format"),
        ({"draws": 0}, "not a whole number"),
        ({"draws": 4}, "kl_div has no draws"),
        ({"method": "fisher", "draws": 5000}, "not a whole number"),
        ({"samples": 0}, "not a whole number"),
        ({"memory_budget": "4 apples"}, "no size such as 4GiB"),
        ({"modalities": "vision", "formats": "kv:fp8"}, "language model is left out"),
        ({"disable": "*"}, "nothing is left to choose"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_read(
    tiny: Callable[..., Path], tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ArgumentError) as caught:
        run(tiny("qwen2_vl"), tmp_path / "s.json", tmp_path / "missing.jsonl", **options)
    assert said in f"{caught.value} {caught.value.remedy}"
    assert not list(tmp_path.iterdir())


def test_an_analysis_that_scores_nothing_is_an_error_and_writes_nothing(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match="scores none of the formats on offer") as caught:
        run(tiny("qwen2_vl"), tmp_path / "s.json", None, method="weight", formats="kv:fp8")
    assert "another --method" in str(caught.value.remedy)
    assert not (tmp_path / "s.json").exists()


def test_what_the_samples_lack_is_told(
    tiny: Callable[..., Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import tiny_vlm

    folder = tiny("qwen2_vl")
    with pytest.raises(DataError, match="needs calibration samples"):
        run(folder, tmp_path / "s.json", None)
    words = tmp_path / "words.jsonl"
    words.write_text('{"text": "red blue green"}\n{"text": "what is it"}\n')
    with pytest.raises(DataError, match="no sample shows a picture") as caught:
        run(folder, tmp_path / "s.json", words)
    assert "--modalities llm" in str(caught.value.remedy)
    told = Stopper()
    found = run(folder, tmp_path / "s.json", words, modalities="llm", reporter=told)
    assert found.notes == tuple(told.remarks)
    for name in ("answer", "image", "video"):
        assert any(f"no score is about {name} tokens" in note for note in found.notes)
    assert {k for u in found.units for o in u.options for k in o.scores} == {"text"}
    pictures = tiny_vlm.samples(tmp_path_factory.mktemp("pictures"), ("text", "image"))
    found = run(folder, tmp_path / "s.json", pictures)
    assert [note for note in found.notes if "no score" in note] == [
        "no sample has a clip: no score is about video tokens"
    ]


def test_units_without_a_score_are_told(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    given = {"method": "weight", "formats": "int4-g32,kv:int8"}
    found = run(tiny("qwen2_vl"), tmp_path / "s.json", calibration_file, **given)
    assert [note for note in found.notes if "no score" in note] == [
        "kv_cache has no score by this method"
    ]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_scores_every_layer(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path, method: str
) -> None:
    found = run(tiny("qwen3_vl"), tmp_path / "s.json", calibration_file, method=method)
    kinds = {"answer"} if method == "gradient" else {"answer", "text", "image", "video"}
    for unit in found.units:
        for option in unit.options[1:]:
            assert set(option.scores) == kinds
            assert all(score.loss >= 0 for score in option.scores.values())


def test_a_memory_budget_that_is_too_small_is_told(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(PrismQuantError, match="memory budget of"):
        run(tiny("qwen2_vl"), tmp_path / "s.json", calibration_file, memory_budget="1MiB")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_options_without_use_are_told(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    folder, out = tiny("qwen2_vl"), tmp_path / "s.json"
    for method in ("fisher", "gradient"):
        found = run(folder, out, calibration_file, method=method, batch_size=4)
        assert f"{method} takes samples one by one: --batch-size has no effect" in found.notes
        found = run(folder, out, calibration_file, method=method, batch_size=1)
        assert not [note for note in found.notes if "no effect" in note]
    given = {"samples": 3, "max_length": 400}
    found = run(folder, out, calibration_file, method="weight", formats="int4-g32", **given)
    needless = "weight with rtn needs no calibration data:"
    assert f"{needless} those that were given were not read" in found.notes
    assert f"{needless} --samples, --max-length have no effect" in found.notes
    assert found.calibration["samples"] == {}
    found = run(folder, out, None, method="weight", formats="int4-g32")
    assert not [note for note in found.notes if "calibration data" in note]


def test_nothing_to_resume_is_told_but_is_not_in_the_file(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    folder, out = tiny("qwen2_vl"), tmp_path / "s.json"
    told = Stopper(2)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, calibration_file, reporter=told, resume=True)
    assert NOTHING_TO_RESUME in told.remarks
    again = Stopper()
    found = run(folder, out, calibration_file, reporter=again, resume=True)
    assert NOTHING_TO_RESUME not in (*again.remarks, *found.notes)


def test_words_of_weights_and_modalities() -> None:
    assert as_token_weights(None)["text"] == 0.2
    assert as_token_weights("answer=1, video=.5")["video"] == 0.5
    assert as_modalities(["llm,vision", "llm"]) == ("llm", "vision")
    assert as_modalities(None) == ()


def test_tables_show_the_most_sensitive_units_and_sums(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    found = run(tiny("qwen2_vl"), tmp_path / "s.json", calibration_file)
    table = unit_table(found, most=3)
    assert table.row_count == 3
    names = [str(cell) for cell in table.columns[0].cells]

    def weighted(name: str) -> float:
        unit = next(unit for unit in found.units if unit.name == name)
        return max(
            sum(found.weights[kind] * score.loss for kind, score in option.scores.items())
            for option in unit.options
        )

    losses = [weighted(name) for name in names]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == max(weighted(unit.name) for unit in found.units)
    sums = modality_table(found)
    assert [str(cell) for cell in sums.columns[0].cells] == ["vision", "projector", "llm"]
