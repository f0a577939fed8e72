"""The bench of searches: budgets, random mixes, and correlations that can be known beforehand."""

from __future__ import annotations

import argparse
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sensitivities
import torch

from bench.search.__main__ import budgets, random_mix
from bench.search.other_tools import analyses, bits_and_group, effective_bits
from bench.search.rounded import RoundedLayers, uniform_choice
from bench.search.subjects import subjects, versions
from bench.search.tables import Measures, mix_essence, mix_rows, rank_essence, rank_rows
from prismquant.api import quantize
from prismquant.demo.main_job import CHECKPOINT
from prismquant.demo.scenes import write_dataset
from prismquant.export.load_quantized import load_model
from prismquant.search.allocate import set_up
from prismquant.search.constraints import Constraints
from prismquant.search.found_recipe import recipe_of
from prismquant.search.knapsack import Solved
from prismquant.search.public import analyze

INTEGERS = ("int3-g64", "int4-g64")
FORMATS = ("int2-g64", "int3-g128", "int4-g128")


def measures(sign: float) -> Measures:
    """True divergences that are a score's own, or go against it."""
    found = sensitivities.made(formats=FORMATS)
    done: dict[tuple[Any, ...], dict[str, Any]] = {
        ("m", "score", "fisher", "rtn", 0): {"cpu": 2.0, "peak": 1 << 20},
        ("m", "uniform", "rtn", "int3-g128"): {"answer": 0.5, "text": 0.25},
        ("m", "random", "rtn", "int3-g128", 0): {"answer": 0.75, "text": 0.5},
        ("m", "random", "rtn", "int3-g128", 1): {"answer": 0.25, "text": 1.0},
    }
    groups = {}
    for unit in found.units:
        for option in unit.options[1:]:
            truth = {kind: sign * score.loss for kind, score in option.scores.items()}
            done["m", "truth", "rtn", unit.name, option.format] = truth
        losses = [option.scores["answer"].loss for option in unit.options[1:]]
        groups[unit.name] = {"modules": [unit.layers[0].name], "scores": [*losses, 0.0]}
    done["m", "peer", "modelopt gradient", 0] = {"cpu": 1.0, "peak": 1 << 20, "groups": groups}
    return Measures("m", done, lambda *_: found, ["fisher"], ["rtn"], FORMATS, range(1))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_score_that_is_the_truth_has_rank_correlation_one(sign: float) -> None:
    rows = rank_rows(measures(sign))
    assert {row[2] for row in rows} == {"fisher", "modelopt gradient"}
    assert {row[5] for row in rows if row[3] == "answer"} == {f"{sign:.3f}"}


def test_random_mixes_are_told_by_their_mean_and_their_best() -> None:
    told = {row[3]: row[4:] for row in mix_rows(measures(1.0))}
    assert told["uniform"] == ["0.50000", "0.25000", "1"]
    assert told["random"] == ["0.50000", "0.75000", "2"]
    assert told["best of random"] == ["0.25000", "0.50000", "2"]


@pytest.mark.parametrize("seed", range(20))
def test_random_mixes_keep_to_the_budget_and_come_near_it(seed: int) -> None:
    allocation = set_up(sensitivities.made(seed, formats=FORMATS), Constraints())
    sizes = budgets(allocation, FORMATS)
    assert list(sizes) == ["int2-g64 .. int3-g128", "int3-g128", "int3-g128 .. int4-g128"]
    assert sorted(sizes.values()) == list(sizes.values())
    for size in sizes.values():
        chosen = random_mix(allocation, size, seed)
        taken = allocation.mix(Solved(chosen, 0.0, 0.0)).stored_bytes
        assert 0.85 * size < taken <= size
        assert chosen == random_mix(allocation, size, seed)


def test_a_uniform_recipe_leaves_alone_what_is_not_on_offer() -> None:
    found = sensitivities.made(formats=FORMATS)
    first, *others = found.units
    alone = replace(first, options=first.options[:1])
    allocation = set_up(replace(found, units=(alone, *others)), Constraints())
    chosen = uniform_choice(allocation, FORMATS[0])
    assert chosen == (0, *[1] * len(others))


def test_the_essence_of_ranks_has_the_mean_and_the_lowest() -> None:
    found = measures(1.0)
    headers, lines = rank_essence(found, rank_rows(found))
    assert headers == ["scores", "rtn, answer", "rtn, text", "CPU s"]
    assert ["modelopt gradient", "1.00 (1.00)"] in [line[:2] for line in lines]


def test_the_lowest_loss_of_answers_and_a_fifth_of_text_is_bold() -> None:
    headers, lines = mix_essence(measures(1.0))
    assert headers == ["solver, budget", "random", "uniform"]
    # Weighted: uniform .55; the first random mix .85, the second .45.
    assert lines == [["rtn, int3-g128", "**0.2500 / 1.000** of 2", "0.5000 / 0.250"]]


def test_each_folder_is_a_model_with_a_version_with_outliers(tmp_path: Path) -> None:
    assert list(versions({})) == ["plain", "outliers"]
    assert versions({"a": tmp_path}) == {"a": (tmp_path, False), "a-outliers": (tmp_path, True)}


def test_an_unknown_model_is_refused_before_any_work(tmp_path: Path) -> None:
    options = argparse.Namespace(folder=[f"a={tmp_path}"], models=["b"])
    with pytest.raises(SystemExit, match="no model b: there are a, a-outliers"):
        next(subjects(options, tmp_path))


def test_another_tool_gets_the_samples_and_its_figures_come_back(tmp_path: Path) -> None:
    calibration = write_dataset(tmp_path / "c", split="calibration", count=2)
    tool = tmp_path / "python"
    # Writes what it was called with: -m MODULE MODEL SAMPLES OUT ...
    tool.write_text(
        "#!/bin/sh\n"
        'printf \'{"module": "%s", "samples": %s, "rest": "%s"}\' '
        '"$2" "$(ls "$4" | wc -l)" "$(shift 5; echo $*)" > "$5"\n'
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    found = analyses(str(tool), str(tool), ["gradient"])
    assert list(found) == ["modelopt gradient", "autoscheme"]
    bits = "--group-size 64 --formats 3 4 --bits 3.5"
    assert found["modelopt gradient"].run(CHECKPOINT, calibration, INTEGERS, tmp_path) == {
        "module": "bench.search.modelopt",
        "samples": 2,
        "rest": f"--method gradient {bits}",
    }
    assert found["autoscheme"].run(CHECKPOINT, calibration, INTEGERS, tmp_path) == {
        "module": "bench.search.auto_round",
        "samples": 2,
        "rest": bits,
    }


def test_a_tool_that_fails_says_why(tmp_path: Path) -> None:
    calibration = write_dataset(tmp_path / "c", split="calibration", count=1)
    tool = tmp_path / "python"
    tool.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(SystemExit, match="no such module"):
        analyses(None, str(tool), [])["autoscheme"].run(CHECKPOINT, calibration, INTEGERS, tmp_path)


def test_budgets_of_other_tools_are_ours_in_bits_of_the_codes() -> None:
    assert effective_bits(["int2-g32", "int3-g32", "int4-g32"]) == [2.5, 3.0, 3.5]
    assert effective_bits(INTEGERS) == [3.5]
    with pytest.raises(SystemExit, match="not fp8-channel"):
        bits_and_group("fp8-channel")


def test_truths_of_a_sample_are_enough_for_a_rank_correlation() -> None:
    found = measures(1.0)
    truths = [key for key in found.done if key[1] == "truth"]
    for key in truths[::4]:
        del found.done[key]
    assert {row[5] for row in rank_rows(found) if row[3] == "answer"} == {"1.000"}


@pytest.mark.slow
def test_a_mix_of_rounded_layers_is_the_checkpoint_of_its_recipe(tmp_path: Path) -> None:
    found = analyze(
        CHECKPOINT, "int2-g32,int4-g32", tmp_path / "found.json", method="weight", solver="rtn"
    )
    formats = ("int2-g32", "int4-g32")
    allocation = set_up(found, Constraints())
    rounded = RoundedLayers(CHECKPOINT, allocation, formats, tmp_path)
    size = budgets(allocation, formats)["int2-g32 .. int4-g32"]
    mix = allocation.mix(Solved(random_mix(allocation, size, 0), 0.0, 0.0))
    assert set(mix.formats.values()) == {"float", *formats}
    recipe = recipe_of(found, mix, allocation.constraints, "mix").recipe
    quantize(CHECKPOINT, recipe, tmp_path / "out", dtype=torch.float32)
    written = load_model(tmp_path / "out", dtype=torch.float32).state_dict()
    rounded.mixed(dict.fromkeys(mix.formats, "int2-g32"))
    put_together = rounded.mixed(mix.formats).state_dict()
    assert written.keys() == put_together.keys()
    for name, value in written.items():
        assert torch.equal(value, put_together[name]), name
