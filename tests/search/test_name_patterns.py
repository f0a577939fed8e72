"""Patterns mean the layers they were made of, and no others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismquant.recipe.match import Match
from prismquant.search.name_patterns import name_patterns

STEMS = ("model.layers.{}.mlp.experts.{}.up", "model.layers.{}.attn.qkv{}", "m{}.1.x.{}", "lm_head")
NAMES = [stem.format(a, b) for stem in STEMS for a in range(4) for b in range(3)]


def meant(patterns: list[str], names: list[str]) -> set[str]:
    if not patterns:
        return set()
    match = Match(name=tuple(patterns))
    return {name for name in names if match.matches(modality="llm", role="mlp.up", name=name)}


@given(st.sets(st.sampled_from(NAMES)))
def test_patterns_are_exact(names: set[str]) -> None:
    assert meant(name_patterns(sorted(names)), NAMES) == names


def test_blocks_and_experts_are_folded() -> None:
    layers = [f"model.layers.{n}.mlp.down_proj" for n in (0, 3, 17)]
    assert name_patterns(layers) == [r"re:model\.layers\.(0|3|17)\.mlp\.down_proj"]
    experts = [f"a.{block}.experts.{expert}.up" for block in (1, 2) for expert in range(4)]
    assert name_patterns(experts) == [r"re:a\.(1|2)\.experts\.(0|1|2|3)\.up"]
    assert len(name_patterns([*experts, "a.3.experts.0.up"])) == 2


@pytest.mark.parametrize("name", ["a[0].b", "a*", "what?", "re:x", "a+b"])
def test_names_with_characters_of_globs_mean_themselves(name: str) -> None:
    others = ["a0.b", "ab", "whatx", "x", "aab"]
    assert meant(name_patterns([name]), [name, *others]) == {name}
