"""Findings about many layers fit a screen."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prismquant.errors import grouped


def test_what_is_said_of_many_layers_is_one_line_with_a_count() -> None:
    findings = [
        *(f"model.layers.{index}.mlp.up: 96 is no multiple of 64" for index in (0, 1, 2, 7)),
        "model.merger.mlp.0: missing",
        "alpha is 0.5, not 0.7",
        "alpha is 0.5, not 0.8",
        *(f"layers.{a}.experts.{b}: missing" for a in range(2) for b in range(3, 6)),
        "model.layers.9.mlp.up: 96 is no multiple of 64",
    ]
    assert grouped(findings) == [
        "model.layers.*.mlp.up: 96 is no multiple of 64 (5 layers: 0-2, 7, 9)",
        "model.merger.mlp.0: missing",
        "alpha is 0.5, not 0.7",
        "alpha is 0.5, not 0.8",
        "layers.*.experts.*: missing (6 of them)",
    ]


@given(indices=st.sets(st.integers(0, 300), min_size=1))
def test_no_layer_is_lost(indices: set[int]) -> None:
    (line,) = grouped(f"blocks.{index}.attn: wide" for index in indices)
    if len(indices) == 1:
        assert line == f"blocks.{min(indices)}.attn: wide"
        return
    head, _, listed = line.removesuffix(")").partition(f"({len(indices)} layers: ")
    assert head == "blocks.*.attn: wide "
    spans = [span.split("-") for span in listed.removesuffix(", ..").split(", ")]
    named = {index for span in spans for index in range(int(span[0]), int(span[-1]) + 1)}
    assert named == indices if not listed.endswith("..") else named < indices
