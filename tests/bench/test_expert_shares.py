"""The table of how tokens were shared among experts."""

from __future__ import annotations

from bench.expert_shares import routed_tokens, share_rows


def layer(name: str, routed: dict[str, int] | None) -> dict[str, object]:
    return {"name": name, "routed": routed}


def test_shares_are_of_all_choices_and_of_those_of_vision_tokens() -> None:
    none: dict[str, object] = layer("blocks.0.attn", None)
    layers = [none]
    for number, (text, image) in enumerate(((6, 1), (2, 0), (0, 1))):
        for leaf in ("gate_proj", "down_proj"):
            name = f"blocks.0.mlp.experts.{number}.{leaf}"
            layers.append(layer(name, {"text": text, "image": image}))
    record = {"steps": [{"layers": layers}, {"layers": []}]}
    assert share_rows(routed_tokens(record)) == [
        ["blocks.0.mlp.experts", "70.0 % (50.0 %)", "20.0 % (0.0 %)", "10.0 % (50.0 %)"]
    ]
