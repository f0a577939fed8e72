"""Names of formats on offer: what each means, and what is refused with a suggestion."""

from __future__ import annotations

import pytest

from prismquant.errors import ArgumentError
from prismquant.formats.spec import spec
from prismquant.recipe.presets import PRESETS
from prismquant.recipe.resolve import resolve
from prismquant.recipe.schema import load_recipe, parse_recipe
from prismquant.search.format_grammar import formats_on_offer, numbers_of, rule_of


@pytest.mark.parametrize(
    ("name", "weights", "activations", "kind"),
    [
        ("int4-g128", "int4-g128", None, "mse"),
        ("int8-channel", "int8-channel", None, "minmax"),
        (
            "int4-channel-narrow+int8-token-narrow",
            "int4-channel-narrow",
            "int8-token-narrow",
            "mse",
        ),
        ("fp8-channel+fp8-tensor", "fp8-channel", "fp8-tensor", "mse"),
        ("nvfp4+none", "nvfp4", None, "mse"),
    ],
)
def test_a_name_of_the_grammar_means_its_parts(
    name: str, weights: str, activations: str | None, kind: str
) -> None:
    choice = formats_on_offer(name)[name]
    assert numbers_of(choice) == (spec(weights), activations and spec(activations))
    assert choice.weight_range == {"kind": kind}
    assert choice.cache is None


@pytest.mark.parametrize("name", ["w4a8", "w8a8", "fp8", "nvfp4", "mxfp4", "nvfp4a16", "w4a16"])
def test_a_recipes_name_means_what_the_recipe_does_to_a_layer(name: str) -> None:
    choice = formats_on_offer([name])[name]
    offered = parse_recipe({"rules": [rule_of(choice)]}, source=name)
    layer = {"modality": "llm", "role": "mlp.down", "name": "x"}
    ours, theirs = (resolve(r, **layer).config for r in (offered, load_recipe(name)))
    assert ours == theirs


def test_every_recipe_is_a_format_or_refused_with_those_that_are() -> None:
    accepted = set()
    for name in PRESETS:
        try:
            accepted |= set(formats_on_offer(name))
        except ArgumentError:
            with pytest.raises(ArgumentError, match="more than a format") as caught:
                formats_on_offer(name)
            assert "w4a8" in str(caught.value.remedy)
    assert {"w4a16", "w4a8", "w8a8", "fp8", "nvfp4", "mxfp4a16", "mxint8"} <= accepted
    assert not {"w8a8-all", "w8a8-static", "fp8-kv", "awq-w4a16"} & accepted


def test_commas_and_lists_are_alike() -> None:
    assert formats_on_offer("w4a8, fp8") == formats_on_offer(["w4a8", "fp8"])
    assert list(formats_on_offer("fp8,kv:int8-head")) == ["fp8", "kv:int8-head"]
    assert formats_on_offer("kv:int8-head")["kv:int8-head"].cache == {
        "format": "int8",
        "granularity": "head",
        "rotated": False,
    }


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("", "0 formats"),
        ("float", "always on offer"),
        ("int4-g12x8", "did you mean 'int4-g128'"),
        ("w4a9", "did you mean 'w4a"),
        ("int4-g128+int8-tokn", "did you mean 'int8-token'"),
        ("kv:fp9", "did you mean 'fp8'"),
        ("int4-token", "weights are neither dynamic"),
        ("int4-g128+int8-channel", "channel scales are not supported"),
        ("w8a8-static", "it sets transforms, too"),
        ("w8a8-all", "layer by layer"),
        ("w8a8,int8-channel+int8-token", "means the same as 'w8a8'"),
        ("fp8,fp8", "named twice"),
    ],
)
def test_a_wrong_name_is_refused_with_what_was_meant(names: str, said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        formats_on_offer(names)
    assert said in str(caught.value)


def test_a_wrong_name_is_told_every_known_one_once() -> None:
    with pytest.raises(ArgumentError, match="no number format 'int4g128'") as caught:
        formats_on_offer("int4g128")
    remedy = str(caught.value.remedy)
    known = remedy.partition("known: ")[2].split(", ")
    assert "did you mean 'int4-g128'?" in remedy
    assert len(known) == len(set(known)) > 20
