"""Recipes of any dialect: told apart, read, refused, and what became of their settings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from toy_dialect import TOY, install, read_toy

import prismquant as pq
from prismquant.diagnostics.translation import TranslatedSetting
from prismquant.errors import RecipeError
from prismquant.models.bind import bind
from prismquant.plan.make_plan import make_plan
from prismquant.recipe.importers.import_recipe import dialect_names, import_recipe
from prismquant.recipe.importers.imported import Imported
from prismquant.recipe.importers.ledger import shown
from prismquant.recipe.plain_yaml import read_yaml, yaml_comment
from prismquant.recipe.recipe_file import read_recipe_file
from prismquant.recipe.schema import load_recipe, parse_recipe
from prismquant.report.translations import translation_table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


# Files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "a: [1, x]\nb: {c: null}"),
        ("a.anything", "a: [1, x]\nb: {c: null}"),
        ("a.json", '{"a": [1, "x"],\n\t"b": {"c": null}}'),
        ("a.py", "{'a': [1, 'x'], 'b': {'c': None}}"),
        ("a.py", '"""A text."""\n# A remark.\nCONFIG = {"a": [1, "x"], "b": {"c": None}}\n'),
        ("a.PY", "config: dict = {'a': [1, 'x'], 'b': {'c': None}}"),
    ],
)
def test_a_file_is_yaml_json_or_one_python_literal(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_recipe_file(tmp_path / name) == {"a": [1, "x"], "b": {"c": None}}


def test_python_literals_keep_their_numbers_tuples_and_keys(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("A = {-1: 128, 'type': (4, 3), None: 1e-3}")
    assert read_recipe_file(tmp_path / "a.py") == {-1: 128, "type": (4, 3), None: 1e-3}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.py", "import os\nA = {}", "only a single literal, or a single assignment of one"),
        ("a.py", "A = {}\nB = {}", "is read, line 2"),
        ("a.py", "A = open('x')", "line 1: it has names or calls in it"),
        ("a.py", "A = {'a': max}", "names or calls"),
        ("a.py", "A = B = {}", "only a single literal"),
        ("a.py", "A['x'] = {}", "only a single literal"),
        ("a.py", "", "only a single literal"),
        ("a.py", "A: dict", "only a single literal"),
        ("a.py", "A = {", "not valid Python: '{' was never closed, line 1"),
        ("a.py", "A = {'a': 1, 'a': 2}", "a dictionary has a key twice, line 1"),
        ("a.py", "A = {**{}}", "names or calls"),
        ("a.py", "A = " + "[" * 5000 + "]" * 5000, "nested"),
        ("a.json", '{"a": 1, "a": 2}', "not valid JSON: key 'a' is there twice"),
        ("a.json", "{", "not valid JSON"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.yaml", "a: *b", "aliases"),
    ],
)
def test_what_a_file_may_not_hold(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_recipe_file(tmp_path / name)
    assert words in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_a_python_file_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()")
    with pytest.raises(RecipeError, match="names or calls"):
        read_recipe_file(tmp_path / "a.py")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["a.yaml", "a.json", "a.py"])
def test_a_file_has_a_bound_and_must_be_there_and_be_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe_file(path)
    path.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(RecipeError, match="at most 1048576 are read"):
        read_recipe_file(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not valid"):
        read_recipe_file(path)


def test_our_own_recipes_may_be_json_and_python_too(tmp_path: Path) -> None:
    body = {"version": 1, "rules": [{"weights": "int8-channel"}]}
    (tmp_path / "one.json").write_text(json.dumps(body))
    (tmp_path / "one.py").write_text(f"RECIPE = {body!r}")
    wanted = parse_recipe(body | {"name": "one"}, source="test")
    for name in ("one.json", "one.py"):
        assert load_recipe(tmp_path / name) == wanted
        assert import_recipe(tmp_path / name) == Imported("prismquant", wanted)


# Told apart


@pytest.mark.parametrize("given", [TOY, "a.yaml", "a.json", "a.py"])
def test_a_dialect_is_told_by_its_content_wherever_it_stands(given: Any, tmp_path: Path) -> None:
    if isinstance(given, str):
        text = repr(TOY) if given == "a.py" else json.dumps(TOY)
        (tmp_path / given).write_text(text)
        given = tmp_path / given
    imported = import_recipe(given)
    assert imported.dialect == "toy"
    assert imported.source == ("recipe" if given is TOY else str(given))
    assert import_recipe(given, "toy") == imported
    assert import_recipe(imported) is imported
    where = "rules[0].weights: int8-channel"
    assert imported.honoured == (TranslatedSetting("toy_bits", "8", where),)
    assert [one.place for one in imported.changed] == ["toy_order"]
    assert imported.dropped[0].nearest == "solver: rtn"


def test_a_text_of_a_tool_is_read_where_no_file_is_called_so() -> None:
    imported = import_recipe("-8")
    assert (imported.dialect, imported.source) == ("toy", "-8")
    assert not imported.changed
    assert not imported.dropped


@pytest.mark.parametrize("preset", ["w4a16", "auto-w4a8"])
def test_presets_dictionaries_and_recipes_of_our_own_stay_as_they_are(preset: str) -> None:
    own = load_recipe(preset)
    for source in (preset, own, own.to_dict()):
        imported = import_recipe(source)
        assert imported == Imported("prismquant", own)
        assert imported.translation is None
        assert imported.lines == ()
        imported.require_exact()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("w4a61", "no preset and no file is called 'w4a61'"),
        ({"rulez": []}, "rulez: unknown key"),
        (3, "a recipe is a preset's name"),
        ("rules: []", "a recipe's text was given"),
    ],
)
def test_what_is_nobodys_is_refused_in_the_words_of_our_grammar(source: Any, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        import_recipe(source)
    assert words in str(caught.value)


def test_a_file_that_is_nobodys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(RecipeError, match="holds no mapping"):
        import_recipe(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"rulez": 1}')
    with pytest.raises(RecipeError, match="unknown key; did you mean 'rules'"):
        import_recipe(tmp_path / "a.json")


def test_an_unknown_dialect_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(RecipeError) as caught:
        import_recipe(TOY, "toi")
    assert "there is no dialect 'toi'" in str(caught.value)
    assert "did you mean 'toy'" in str(caught.value)
    assert dialect_names()[:2] == ("prismquant", "toy")


# The ledger


def test_all_that_is_wrong_stands_in_one_error() -> None:
    with pytest.raises(RecipeError) as caught:
        import_recipe({"toy_bits": 5, "toy_sped": 1, 3: 4})
    assert len(caught.value.findings) == 3
    said = str(caught.value)
    assert "toy_bits: 4 or 8, not 5" in said
    assert "toy_sped: unknown key; did you mean 'toy_speed'?" in said
    assert "a key is a word, not 3" in said
    with pytest.raises(RecipeError, match="expected a mapping, found \\[1\\]"):
        read_toy([1], "x")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        (None, "null"),
        (True, "true"),
        ([1, "a"], '[1, "a"]'),
        ({"b", "a"}, '["a", "b"]'),
    ],
)
def test_values_of_the_source_are_shown_as_text(value: Any, text: str) -> None:
    assert shown(value) == text


def test_a_long_value_is_shortened() -> None:
    assert shown("x" * 1000) == "x" * 200 + ".."


def test_exact_translations_are_told_from_others() -> None:
    import_recipe("-4").require_exact()
    with pytest.raises(RecipeError) as caught:
        import_recipe(TOY).require_exact()
    assert len(caught.value.findings) == 2
    assert "dropped: toy_speed: fast (nothing here is slow); nearest: solver: rtn" in str(
        caught.value
    )


def test_a_comment_never_ends_early() -> None:
    text = yaml_comment(["a\nb: 1", "c\x00\u2028d"]) + "rules: 1"
    assert text.splitlines()[0] == "# a b: 1"
    assert read_yaml(text) == {"rules": 1}


def test_an_optional_rule_that_means_nothing_is_a_note(tiny: Callable[..., Path]) -> None:
    bound = bind(tiny("qwen3_vl"))
    nothing = {"match": {"name": "*nothing*"}, "skip": True}
    rules = [{"weights": "int8-channel", "match": {"modality": "llm"}}, nothing]
    with pytest.raises(pq.PrismQuantError, match="matches no layer"):
        make_plan(parse_recipe({"rules": rules}, source="x"), bound)
    rules[1] = nothing | {"optional": True}
    plan = make_plan(parse_recipe({"rules": rules}, source="x"), bound)
    assert "rules[1].match: name '*nothing*' means no layer of this model" in plan.remarks
    rules[1] = {"match": {"modality": "vision", "name": "lm_head"}, "skip": True, "optional": True}
    plan = make_plan(parse_recipe({"rules": rules}, source="x"), bound)
    assert "rules[1].match: modality 'vision' means no layer of this model" in plan.remarks
    with pytest.raises(RecipeError, match="the rule sets nothing"):
        parse_recipe({"rules": [{"optional": True}]}, source="x")


def test_the_table_of_a_translation_has_a_row_for_each_setting() -> None:
    translation = import_recipe(TOY).translation
    assert translation is not None
    table = translation_table(translation)
    assert table.row_count == 3
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    assert cells[0] == ["honoured", "changed", "dropped"]
    assert cells[3][2] == "nearest: solver: rtn"
