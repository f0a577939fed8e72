"""Recipes written out in other tools' words: one table of dialects, and one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prismquant.errors import RecipeError, suggest
from prismquant.recipe.exporters import to_llm_compressor, to_mi_optimize, to_modelopt, to_mquant
from prismquant.recipe.exporters.export_ledger import ExportLedger
from prismquant.recipe.exporters.export_task import ExportTask, note_rest
from prismquant.recipe.exporters.foreign_recipe import ForeignRecipe
from prismquant.recipe.exporters.layer_work import RulePlaces, work_of
from prismquant.recipe.exporters.written_scope import (
    ANY_DEPTH,
    family_scope,
    model_scope,
)
from prismquant.recipe.importers import llm_compressor, mi_optimize, modelopt, mquant
from prismquant.recipe.importers.import_recipe import RecipeSource, import_recipe
from prismquant.recipe.schema import Recipe


@dataclass(frozen=True)
class RecipeWriter:
    """A dialect in which recipes are written.

    Attributes:
        write: The text of a recipe, without a comment.
        use: Where the text goes, in words of the tool.
        first_words: Of a text that can have no comment above it; else empty.
        numbered: Whether it may need names of single blocks where others have an expression.
    """

    write: Callable[[ExportTask], str]
    use: str
    first_words: str = ""
    numbered: bool = False


WRITERS: Mapping[str, RecipeWriter] = {
    llm_compressor.NAME: RecipeWriter(
        to_llm_compressor.write, 'oneshot(model=.., recipe="recipe.yaml", ..)'
    ),
    modelopt.NAME: RecipeWriter(to_modelopt.write, "mtq.quantize(model, QUANT_CFG, forward_loop)"),
    mi_optimize.NAME: RecipeWriter(to_mi_optimize.write, "quantize.py --quant-config recipe.yaml"),
    mquant.NAME: RecipeWriter(to_mquant.write, "arguments of the model's script", "--quant", True),
}
"""All dialects in which recipes are written."""


def export_recipe(
    recipe: RecipeSource, dialect: str, model: str | Path | None = None
) -> ForeignRecipe:
    """A recipe in another tool's words, with what became of each of its settings.

    Args:
        recipe: Whatever stands for a recipe, of this or another tool.
        dialect: A key of :data:`WRITERS`.
        model: Folder of the checkpoint whose layers are named; None: names of all known families
            are written, each as short as it can be told from the others.

    Raises:
        RecipeError: There is no such dialect, or nothing is left to write.
        ModelError: The model is none of a known family.
    """
    if dialect not in WRITERS:
        raise RecipeError(
            f"no recipe is written for {dialect!r}", remedy=suggest(str(dialect), WRITERS)
        )
    whole = import_recipe(recipe).recipe
    own = whole.chosen(whole.choose[0].name) if whole.choose else whole
    scope = family_scope(_depth(own, dialect)) if model is None else model_scope(Path(model))
    ledger = ExportLedger(RulePlaces(own, whole))
    if whole.choose:
        others = [one.name for one in whole.choose[1:]]
        why = f"which is best must be measured: this is the first, {whole.choose[0].name}"
        ledger.dropped("choose", others, why, "the recipe.yaml of a finished run")
    task = ExportTask(own, scope, work_of(own, scope), ledger)
    if own.kv_cache is None and not any(work.quantized for work in task.work.values()):
        raise RecipeError(
            f"the recipe quantizes no layer of {scope.told}",
            where=whole.name,
            remedy="look at the plan: prismquant inspect MODEL --recipe RECIPE",
        )
    text = WRITERS[dialect].write(task)
    note_rest(task)
    if not scope.exact:
        ledger.guessed("names of layers are those of all known families; --model takes a model's")
    parts = {name: tuple(noted) for name, noted in ledger.noted.items()}
    return ForeignRecipe(dialect, whole.name, text, **parts, guessed=tuple(ledger.guesses))


def _depth(recipe: Recipe, dialect: str) -> int:
    """Number of blocks that must be looked at: one, where all are alike."""
    single = WRITERS[dialect].numbered or any(rule.match.name for rule in recipe.rules)
    return ANY_DEPTH if single else 1
