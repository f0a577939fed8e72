"""Regular expressions mean what they mean in Python, and never take long."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismquant.errors import PrismQuantError
from prismquant.patterns import compile_pattern

NAME = "model.language_model.layers.0.self_attn.q_proj.weight"
HONEST = (
    r".*\.layers\.0\..*",
    r"model\.(visual|language_model)\..*proj.*",
    r"(?!.*visual).*q_proj.*",
    r"^lm_head$",
    r"[^.]+",
    r"model(\.\w+){3,5}",
)


@given(st.sampled_from(HONEST), st.text("modelayrs.0_qpjv", max_size=20) | st.just(NAME))
def test_matches_are_those_of_the_standard_library(expression: str, text: str) -> None:
    pattern = compile_pattern(expression)
    assert pattern.match(text) == (re.match(expression, text) is not None)
    assert pattern.fullmatch(text) == (re.fullmatch(expression, text) is not None)


def test_a_runaway_ends_with_an_error() -> None:
    pattern = compile_pattern(r"(a|aa)+[^b]c")
    with pytest.raises(PrismQuantError, match="takes too long"):
        pattern.fullmatch("a" * 100)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("(((a?){500}){500}){500}", "repeats too often"),
        ("a" * 5000, "too long"),
        ("(" * 900 + ")" * 900, "too deeply"),
        ("(", "not a regular expression"),
        ("a{99999999999999999999}", "repeats too often"),
    ],
)
def test_what_is_no_expression_or_a_bomb_is_refused(expression: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        compile_pattern(expression)
