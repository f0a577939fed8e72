"""A sensitivity survives its file, and what no analysis writes is refused with its place."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest
from sensitivities import made

from prismquant.errors import StorageError
from prismquant.search.sensitivity_file import read_sensitivity, write_sensitivity

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("seed", range(5))
def test_what_is_written_is_read_back(tmp_path: Path, seed: int) -> None:
    found = made(seed, noise=0.1, notes=("a note",))
    write_sensitivity(tmp_path / "s.json", found)
    assert read_sensitivity(tmp_path / "s.json") == found


def unit(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["units"][0]
    return found


CACHE: dict[str, Any] = {"weights": None, "cache": {"format": "fp9"}}

DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda c: c.update(version=99), "version 99 cannot be read"),
    "units": (lambda c: c.update(units=[]), "there are no units"),
    "another file": (lambda c: c.pop("units"), "no file of a sensitivity"),
    "a field more": (lambda c: unit(c).update(bits=4), "units.0.bits"),
    "a field less": (lambda c: unit(c).pop("step"), "units.0.step"),
    "a number as text": (lambda c: c.update(fixed_bytes="7"), "fixed_bytes"),
    "a unit twice": (lambda c: c["units"].append(unit(c)), "is there twice"),
    "no float": (lambda c: unit(c)["options"].pop(0), "the first option is not 'float'"),
    "an option twice": (
        lambda c: unit(c)["options"].append(unit(c)["options"][1]),
        "an option is there twice",
    ),
    "no such format": (
        lambda c: unit(c)["options"][1].update(format="int9"),
        "there is no format 'int9'",
    ),
    "negative bytes": (lambda c: unit(c)["options"][1].update(stored_bytes=-1), "no size"),
    "far too many bytes": (lambda c: c.update(fixed_bytes=10**40), "no size"),
    "a negative weight": (lambda c: c["weights"].update(answer=-1.0), "neither 0 nor from 1e-06"),
    "a weight of next to nothing": (
        lambda c: c["weights"].update(text=1e-320),
        "neither 0 nor from 1e-06",
    ),
    "no weights": (lambda c: c.update(weights={}), "no class of tokens has a weight"),
    "no such option of the solver": (
        lambda c: c.update(solver_options={"x": 1}),
        "solver_options: gptq has no option 'x'",
    ),
    "a format of nothing": (
        lambda c: c["formats"]["int4-g128"].update(weights=None),
        "format 'int4-g128': it is of weights or of a cache",
    ),
    "a format of half a number": (
        lambda c: c["formats"]["int4-g128"]["weights"].pop("bits"),
        "format 'int4-g128': a number format needs 'bits'",
    ),
    "a format with a range of no kind": (
        lambda c: c["formats"]["int4-g128"].update(weight_range={"x": 1}),
        "format 'int4-g128': rules.0.*weight_range",
    ),
    "a cache of no kind": (
        lambda c: c["formats"].update(kv=c["formats"]["int4-g128"] | CACHE),
        "format 'kv':",
    ),
    "a layer in no format": (
        lambda c: unit(c)["options"][1].update(formats={"a": "int4-g32/fp9"}),
        "a format of a layer: .*'fp9'",
    ),
    "no such solver": (lambda c: c.update(solver="gtpq"), "did you mean 'gptq'"),
    "no such method": (lambda c: c.update(method="fischer"), "did you mean 'fisher'"),
    "too few losses of layers": (
        lambda c: unit(c)["options"][1].update(layer_losses=[1.0, 2.0]),
        "not as many layer_losses as layers",
    ),
    "a loss of a layer below zero": (
        lambda c: unit(c)["options"][1].update(layer_losses=[-1.0]),
        "no number from 0",
    ),
    "a loss beyond all": (
        lambda c: unit(c)["options"][1]["scores"]["text"].update(loss=-1e300),
        "no number",
    ),
    "not a number": (
        lambda c: unit(c)["options"][1]["scores"]["answer"].update(loss=float("nan")),
        "no number",
    ),
    "no such modality": (lambda c: unit(c).update(modality="audio"), "no modality 'audio'"),
    "no shape": (lambda c: unit(c)["layers"][0].update(in_features=0), "has no shape"),
    "no such role": (lambda c: unit(c)["layers"][0].update(role="x"), "there is no role 'x'"),
    "an error below zero": (
        lambda c: unit(c)["options"][1]["scores"]["answer"].update(error=-1.0),
        "no number from 0",
    ),
    "no layers": (lambda c: unit(c).update(layers=[]), "kind layers with 0 layers"),
    "no such class": (
        lambda c: unit(c)["options"][1].update(scores={"audio": {"loss": 1.0}}),
        "audio",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_with_its_place(tmp_path: Path, name: str) -> None:
    damage, told = DAMAGE[name]
    content = json.loads(json.dumps(asdict(made())))
    damage(content)
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(StorageError, match=told) as caught:
        read_sensitivity(tmp_path / "s.json")
    assert caught.value.remedy
    assert caught.value.where == str(tmp_path / "s.json")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"units": 1, "units": 2}', "7"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(StorageError) as caught:
        read_sensitivity(tmp_path / "s.json")
    assert "prismquant analyze" in str(caught.value.remedy)
