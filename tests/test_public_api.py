"""What ``import prismquant`` gives, and that it costs nothing."""

from __future__ import annotations

import inspect
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import prismquant as pq
from prismquant import errors
from prismquant.recipe.presets import PRESETS

NAMES = [
    "FoundMix",
    "PrismQuantError",
    "Recipe",
    "Result",
    "__version__",
    "analyze",
    "check_family",
    "draft_family",
    "export_recipe",
    "find_mix",
    "import_recipe",
    "inspect",
    "load",
    "load_recipe",
    "measure",
    "quantize",
]


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running ``code``."""
    tail = "; import sys, json; print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    command = [sys.executable, "-c", code + tail]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_public_names_are_exactly_these() -> None:
    assert pq.__all__ == NAMES
    assert dir(pq) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_resolves_and_is_described(name: str) -> None:
    value = getattr(pq, name)
    if name != "__version__":
        assert value.__name__ == name
        assert len(inspect.getdoc(value) or "") > 40


def test_no_public_name_is_that_of_a_module() -> None:
    """Importing a submodule binds its name in the package: it would replace the function."""
    modules = {module.name for module in pkgutil.iter_modules(pq.__path__)}
    assert not modules & set(NAMES)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        pq.quantise  # noqa: B018


def test_a_star_import_gives_all_names() -> None:
    space: dict[str, object] = {}
    exec("from prismquant import *", space)
    assert set(NAMES) <= set(space)


def test_importing_the_package_imports_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "numpy", "accelerate", "safetensors", "pydantic", "PIL"}
    assert not heavy & loaded_by("import prismquant")


def test_the_help_of_the_command_line_imports_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "numpy", "accelerate", "safetensors", "pydantic", "PIL"}
    assert not heavy & loaded_by("import prismquant.cli")


@pytest.mark.parametrize(
    "commands",
    [
        # What a user mistypes is answered at once as well.
        [["--version"], ["--help"], ["inspect"], ["inspect", "--recipes", "x"], ["quantize", "."]],
        [["recipe", "list"], *(["recipe", "show", name] for name in PRESETS)],
        # A method is loaded to check options that are given for it, and only then.
        [["recipe", "validate", "w4a8-static-all"], ["recipe", "show", "FILE"]],
    ],
    ids=["usage", "presets", "files"],
)
def test_commands_that_compute_nothing_import_no_model_library(
    commands: list[list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "{kv_cache: fp8-head, rules: [{weights: nvfp4, weight_range: four_over_six},"
        " {match: {modality: vision}, weights: int4-g128, solver: rtn, tuner: zeroquant}]}"
    )
    named = [[str(file) if word == "FILE" else word for word in words] for words in commands]
    code = (
        f"from prismquant.cli import app\nfor words in {named}:\n"
        "    try: app(words, standalone_mode=False)\n"
        # What the parser raises of wrong usage can show itself.
        "    except Exception as error: assert hasattr(error, 'show'), error\n"
        "pass"
    )
    loaded = loaded_by(code)
    assert "typer" in loaded
    assert not {"torch", "transformers", "numpy", "safetensors", "PIL"} & loaded


def test_importing_the_package_leaves_the_environment_as_it_is() -> None:
    code = "import os; a = dict(os.environ); import prismquant, prismquant.api, prismquant.cli"
    loaded_by(code + "; assert a == dict(os.environ)")


def test_the_version_is_that_of_the_project() -> None:
    project = Path(__file__).parent.parent / "pyproject.toml"
    if not project.is_file():
        pytest.skip("the tests run without the source tree")
    assert tomllib.loads(project.read_text())["project"]["version"] == pq.__version__


def test_every_error_on_purpose_has_one_base_and_three_lines() -> None:
    kinds = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if kind.__module__ == errors.__name__
    ]
    assert len(kinds) == 11
    for kind in kinds:
        assert issubclass(kind, pq.PrismQuantError)
        error = kind("it broke", where="here", remedy="mend it")
        assert str(error) == "it broke\n  where: here\n  remedy: mend it"
        assert str(kind("it broke")) == "it broke"


def test_suggestions_name_the_nearest_and_all() -> None:
    assert errors.suggest("w4a61", ["w8a8", "w4a16"]) == "did you mean 'w4a16'? known: w4a16, w8a8"
    assert errors.suggest("zzz", ["b", "a"]) == "known: a, b"


def test_public_functions_are_typed_and_name_their_errors() -> None:
    for name in ("analyze", "inspect", "load", "measure", "quantize"):
        function = getattr(pq, name)
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty
        documented = inspect.getdoc(function) or ""
        for parameter in signature.parameters:
            assert re.search(rf"^\s*{parameter}: ", documented, re.MULTILINE), (name, parameter)
        assert "Raises:" in documented
