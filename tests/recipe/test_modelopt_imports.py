"""Imports of ModelOpt's recipe files: its own parts, files beside the recipe, and what is wrong."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import settings, strategies

from prismquant.errors import PrismQuantError, RecipeError
from prismquant.recipe.importers import modelopt
from prismquant.recipe.importers.import_recipe import import_recipe
from prismquant.recipe.importers.imported import Imported
from prismquant.recipe.importers.modelopt_presets import PRESETS
from prismquant.recipe.importers.modelopt_units import UNITS

PARTS = json.loads(
    (Path(__file__).parent.parent / "golden" / "modelopt-quantizers.json").read_text()
)["parts"]
OFF = {"quantizer_name": "*", "enable": False}
IMPORTS = {
    "off": "configs/ptq/units/base_disable_all",
    "int4": "configs/numerics/int4_per_block",
    "fp8": "configs/numerics/fp8.yaml",
    "kv": "configs/ptq/units/kv_fp8",
    "left": "configs/ptq/units/default_disabled_quantizers",
}


def of(content: Any) -> Imported:
    imported = import_recipe(content)
    assert imported.dialect == "modelopt"
    return imported


def refused(content: Any, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        import_recipe(content, "modelopt")
    assert words in str(caught.value)


def plain(value: Any, key: str = "") -> Any:
    """A part as its tool tells it: pairs for words such as e4m3, nothing that says nothing."""
    if isinstance(value, dict):
        said = {k: v for k, v in value.items() if (k, v) != ("algorithm", "max")}
        return {str(k): plain(v, str(k)) for k, v in said.items() if k != "effective_bits"}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if key in ("num_bits", "scale_bits") and isinstance(value, str):
        return [int(value[1]), int(value[3])]
    return value


# Ours has no part of what pictures are made with.
@pytest.mark.parametrize("path", [p for p in PARTS if not p.endswith("nvfp4_fp8_mha")])
def test_every_part_is_that_of_the_tool(path: str) -> None:
    if PARTS[path] is None:
        assert "quant_cfg" in UNITS[path]
    else:
        assert plain(UNITS[path]) == plain(PARTS[path])


def test_no_part_is_made_up() -> None:
    assert UNITS.keys() <= PARTS.keys()
    models = [one for path, one in UNITS.items() if "presets/model" in path]
    assert models == [one for name, one in PRESETS.items() if not name.endswith("KV_CFG")]


def test_imports_stand_for_what_they_name() -> None:
    imported = of(
        {
            "imports": IMPORTS,
            "metadata": {"recipe_type": "ptq"},
            "quantize": {
                "algorithm": "max",
                "quant_cfg": [
                    {"$import": "off"},
                    {"quantizer_name": "*weight_quantizer", "cfg": {"$import": "int4"}},
                    {
                        "quantizer_name": "*mlp*weight_quantizer",
                        "cfg": {"$import": ["int4", "fp8"], "block_sizes": None},
                    },
                    {"$import": "kv"},
                    {"$import": "left"},
                ],
            },
        }
    )
    four = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
    written = [
        OFF,
        {"quantizer_name": "*weight_quantizer", "cfg": four},
        {"quantizer_name": "*mlp*weight_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}},
        {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}},
        *UNITS["configs/ptq/units/default_disabled_quantizers"],
    ]
    same = of({"quant_cfg": written, "algorithm": "max"})
    assert imported.recipe.rules == same.recipe.rules
    assert imported.recipe.kv_cache == same.recipe.kv_cache
    places = {one.place for one in imported.honoured}
    assert {"imports.off", "quantize.quant_cfg[0]", "quantize.quant_cfg[3][0]"} <= places


def test_a_whole_configuration_can_be_imported_and_added_to() -> None:
    path = "configs/ptq/presets/model/int8"
    imported = of({"imports": {"int8": path}, "quantize": {"$import": "int8"}})
    assert imported.recipe.rules == of("INT8_DEFAULT_CFG").recipe.rules


def test_a_search_may_import_its_formats() -> None:
    content = {
        "imports": {
            "fp8": "configs/ptq/presets/model/fp8",
            "left": "configs/auto_quantize/units/base_disabled_layers",
        },
        "auto_quantize": {
            "constraints": {"effective_bits": 6.0},
            "candidate_formats": [{"$import": "fp8"}],
            "disabled_layers": [{"$import": "left"}, "*o_proj*"],
        },
    }
    with pytest.raises(RecipeError) as caught:
        import_recipe(content)
    assert "--formats fp8-tensor+fp8-tensor" in str(caught.value)
    assert "--disable '*router*'" in str(caught.value)
    assert "--disable '*o_proj*'" in str(caught.value)


def test_files_are_found_beside_the_recipe_and_above_it(tmp_path: Path) -> None:
    inner = tmp_path / "models" / "mine"
    inner.mkdir(parents=True)
    (tmp_path / "models" / "eight.yaml").write_text("num_bits: 8\naxis: 0\n")
    (inner / "entries.yml").write_text(
        "# what is quantized\nimports:\n  eight: models/eight\n---\n"
        "- {quantizer_name: '*', enable: false}\n"
        "- quantizer_name: '*weight_quantizer'\n  cfg: {$import: eight}\n"
    )
    (inner / "more.yaml").write_text(
        "imports: {entries: entries}\n---\nquant_cfg: [{$import: entries}]\nalgorithm: max\n"
    )
    (inner / "recipe.yaml").write_text("imports: {more: more}\nquantize: {$import: more}\n")
    imported = of(inner / "recipe.yaml")
    weights = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}}
    assert imported.recipe.rules == of({"quant_cfg": [OFF, weights]}).recipe.rules


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"imports": {"a": "configs/numerics/fp88"}}, "did you mean 'configs/numerics/fp8'?"),
        ({"imports": {"a": "../secrets"}}, "imports.a: ModelOpt has no part '../secrets'"),
        ({"imports": {"a": "/etc/hostname"}}, "imports.a: ModelOpt has no part '/etc/hostname'"),
        ({"imports": {"a": 3}}, "imports.a: a path, not 3"),
        ({"imports": ["a"]}, "imports: expected a mapping"),
        ({"imports": {str(n): "x" for n in range(101)}}, "imports: too many parts"),
        ({"quant_cfg": [{"$import": "a"}]}, "quant_cfg[0].$import: nothing is imported as 'a'"),
        (
            {"imports": {"off": IMPORTS["off"]}, "quant_cfg": [{"$import": "of"}]},
            "did you mean 'off'?",
        ),
        (
            {
                "imports": {"kv": IMPORTS["kv"]},
                "quant_cfg": [{"quantizer_name": "*", "cfg": {"$import": "kv"}}],
            },
            "'kv' is a list, and here stands a mapping",
        ),
        ({"imports": {}, "quant_cfg": [{"$import": ["a"]}]}, 'nothing is imported as ["a"]'),
    ],
)
def test_what_cannot_be_imported_is_an_error(content: dict[str, Any], words: str) -> None:
    refused({"quant_cfg": [OFF]} | content, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("imports: {a: part}\n---\n- {$import: a}\n", "too many parts, or parts of parts"),
        ("a: 1\n---\nb: 2\n---\nc: 3\n", "one document, or two"),
        ("- 1\n---\nb: 2\n", "the document before its content is no mapping"),
        ("a: [", "cannot be read"),
        ("", "one document, or two"),
    ],
)
def test_what_a_part_may_not_hold(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text(text)
    (tmp_path / "recipe.yaml").write_text("imports: {a: part}\nquant_cfg: [{$import: a}]\n")
    refused(tmp_path / "recipe.yaml", words)


def test_parts_in_parts_have_a_bound(tmp_path: Path) -> None:
    (tmp_path / "0.yaml").write_text("- {quantizer_name: '*', enable: false}\n" * 100)
    for number in range(1, 7):
        text = f"imports: {{below: '{number - 1}'}}\n---\n" + "- {$import: below}\n" * 100
        (tmp_path / f"{number}.yaml").write_text(text)
    (tmp_path / "recipe.yaml").write_text("imports: {a: '6'}\nquant_cfg: [{$import: a}]\n")
    refused(tmp_path / "recipe.yaml", "more than 50000 values")


NAMES = strategies.sampled_from(["off", "int4", "fp8", "kv", "left", "nobody", 3, None, ["fp8"]])
CONTENTS = strategies.recursive(
    NAMES | NAMES.map(lambda name: {"$import": name}),
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.dictionaries(
            strategies.sampled_from(["quant_cfg", "$import", "cfg", "quantizer_name", "imports"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@drawn(content=CONTENTS, imports=strategies.just(IMPORTS) | CONTENTS)
def test_any_imports_are_read_or_refused_in_words(content: Any, imports: Any) -> None:
    for one in ({"quant_cfg": content}, {"quantize": content}, {"auto_quantize": content}):
        with contextlib.suppress(PrismQuantError):
            modelopt.read({"imports": imports, **one}, "x")
