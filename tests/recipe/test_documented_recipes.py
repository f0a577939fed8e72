"""Documented examples of other tools, resolved on models of their families, as a table to read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from documented_recipes import EXAMPLES

from prismquant.models.bind import BoundModel, bind
from prismquant.recipe.importers.import_recipe import import_recipe
from prismquant.recipe.importers.imported import Imported
from prismquant.recipe.layer_config import LayerConfig
from prismquant.recipe.resolve import resolve

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = Path(__file__).parent.parent / "golden" / "documented-recipes.md"
HEAD = """# Documented recipes of other tools, and what they come to here

Each recipe of `tests/documented_recipes.py`, layer by layer, on a model of its family.
Written by `tests/recipe/test_documented_recipes.py`, whose failure names a file with the new text.
"""


def section(name: str, family: str, imported: Imported, bound: BoundModel) -> str:
    """Table of a recipe, what is done besides, and what is not as it is there."""
    recipe = imported.recipe
    groups: dict[tuple[str, ...], list[str]] = {}
    for site in bound.sites:
        at = {"modality": str(site.modality), "role": site.role, "name": site.name}
        config = resolve(recipe, **at).config
        roles = groups.setdefault((at["modality"], *cells(config)), [])
        if site.role not in roles:
            roles.append(site.role)
    lines = [f"## {name}\n", f"On {family}.\n"]
    lines += ["| part | layers | weights | inputs | outputs | method | ranges |", f"|{'---|' * 7}"]
    for (part, *rest), roles in groups.items():
        lines.append(f"| {part} | {', '.join(roles)} | {' | '.join(rest)} |")
    body = recipe.to_dict()
    besides = [f"calibration: {words(body.get('calibration', {})) or 'by default'}"]
    besides += [
        f"transform {one['name']}: {words({k: v for k, v in one.items() if k != 'name'})}"
        for one in body.get("transforms", [])
    ]
    besides += [f"cache: {words(body['kv_cache'])}"] if "kv_cache" in body else []
    besides += [f"changed {one.place}: {one.why}" for one in imported.changed]
    besides += [f"dropped {one.place}: {one.why}" for one in imported.dropped]
    return "\n".join([*lines, "", *(f"- {one}" for one in besides), ""])


def cells(config: LayerConfig) -> list[str]:
    """Formats, method and ranges of a layer."""
    if config.weights is None:
        return ["-"] * 5
    sides = [one.name if one else "-" for one in (config.weights, *config.sides)]
    ranges = str(config.weight_range.kind)
    if config.static_input:
        ranges += f", inputs {config.activation_range.kind}"
    method = f"{config.solver} {words(config.options)}".strip()
    return [*sides, method + (f", {config.tuner}" if config.tuner else ""), ranges]


def words(given: Any) -> str:
    """Keys and values in a line."""
    if isinstance(given, list | tuple):
        return " ".join(map(words, given))
    if not isinstance(given, Mapping):
        return str(given)
    parts = (f"{key} {words(value)}" for key, value in given.items() if value is not None)
    return ", ".join(parts)


def test_documented_recipes_come_to_what_their_authors_meant(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    sections = []
    for name, (family, content) in EXAMPLES.items():
        imported = import_recipe(content)
        assert imported.dialect == name.partition(":")[0]
        sections.append(section(name, family, imported, bind(tiny(family))))
    text = "\n".join([HEAD, *sections])
    (tmp_path / GOLDEN.name).write_text(text)
    assert text == GOLDEN.read_text(), f"it is now {tmp_path / GOLDEN.name}"
