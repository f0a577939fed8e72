"""Globs for groups of layers: each means its own group, in any block."""

from __future__ import annotations

import fnmatch

import pytest

from prismquant.errors import RecipeError
from prismquant.recipe.exporters.written_globs import layer_globs_of
from prismquant.recipe.exporters.written_scope import WrittenLayer

INSIDE, BESIDE = "model.layers.*.mlp.experts.*.down_proj", "model.layers.*.experts.*.down_proj"


def layer(path: str, block: int, expert: int = 0) -> WrittenLayer:
    """A layer of an expert."""
    name = path.replace("*", str(block), 1).replace("*", str(expert))
    return WrittenLayer(name, "llm", "mlp.down", path, block)


def meant(settings: dict[WrittenLayer, str]) -> dict[str, str | None]:
    """What globs give each layer: those of single blocks count more."""
    groups = layer_globs_of(settings)
    globs = [(glob, one.setting) for one in groups for glob in one.all_blocks]
    globs += [(glob, one.setting) for one in groups for glob in one.single_blocks]
    found: dict[str, str | None] = {}
    for one in settings:
        own = [setting for glob, setting in globs if fnmatch.fnmatchcase(one.name, glob)]
        found[one.name] = own[-1] if own else None
    return found


def test_experts_beside_an_mlp_are_told_from_those_inside_one() -> None:
    settings = {
        layer(path, block, expert): setting
        for path, setting in ((INSIDE, "a"), (BESIDE, "b"))
        for block in (0, 9, 12)
        for expert in (0, 7)
    }
    assert meant(settings) == {one.name: setting for one, setting in settings.items()}


def test_all_experts_of_a_single_block_are_meant() -> None:
    settings = {
        layer(INSIDE, block, expert): "b" if block == 3 else "a"
        for block in range(5)
        for expert in (0, 7)
    }
    assert meant(settings) == {one.name: setting for one, setting in settings.items()}


def test_paths_that_no_glob_tells_apart_are_refused() -> None:
    inside = layer("model.layers.*.mlp.3.gate", 0)
    beside = WrittenLayer("model.layers.0.gate", "llm", "mlp.gate", "model.layers.*.gate", 0)
    with pytest.raises(RecipeError, match="cannot tell layers apart"):
        layer_globs_of({inside: "a", beside: "b"})
