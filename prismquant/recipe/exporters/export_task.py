"""One recipe on its way into another tool's words, and what is alike for all tools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prismquant.errors import FormatError
from prismquant.formats.spec import NumberSpec
from prismquant.recipe.exporters.export_ledger import ExportLedger, WorkNotes
from prismquant.recipe.exporters.layer_work import LayerWork, in_effect
from prismquant.recipe.exporters.written_scope import WrittenEdge, WrittenLayer, WrittenScope
from prismquant.recipe.match import Match
from prismquant.recipe.rule import LayerRule
from prismquant.recipe.schema import Recipe

Fields = dict[str, Any]


@dataclass(frozen=True)
class ExportTask:
    """A recipe, and the layers that it is written for.

    Attributes:
        recipe: An ordinary one.
        scope: The layers.
        work: What is done to each of them.
        ledger: Where it is noted what becomes of each setting.
    """

    recipe: Recipe
    scope: WrittenScope
    work: Mapping[WrittenLayer, LayerWork]
    ledger: ExportLedger

    def notes(self, work: LayerWork) -> WorkNotes:
        """Notes on the fields of layers."""
        return WorkNotes(self.ledger, work)

    def counted(self, layers: Callable[[WrittenLayer], bool]) -> list[tuple[LayerWork, int]]:
        """Kinds of work on those quantized layers that are meant, the most frequent first."""
        counts = Counter(
            work for layer, work in self.work.items() if work.quantized and layers(layer)
        )
        return counts.most_common()

    def edges(self, match: Match) -> list[WrittenEdge]:
        """Smooth edges that end in a quantized layer which is meant."""
        quantized = {layer.path: layer for layer, work in self.work.items() if work.quantized}
        return [
            edge
            for edge in self.scope.edges
            if any(match.means(quantized[one]) for one in edge.consumers if one in quantized)
        ]

    @property
    def calibrated(self) -> bool:
        """Whether anything is learned from samples."""
        return bool(self.recipe.transforms) or any(
            work.quantized
            and (
                work.config.needs_hessian
                or work.config.static_input
                or work.config.static_output
                or work.config.needs_float_chain
            )
            for work in set(self.work.values())
        )


def note_alike(task: ExportTask, tuners: tuple[str, ...] = ()) -> None:
    """Note fields that no other tool has.

    Args:
        task: The recipe.
        tuners: Tuners that the tool has after all.
    """
    for work in dict.fromkeys(work for work in task.work.values() if work.quantized):
        notes, config = task.notes(work), work.config
        if config.correction is not None:
            why = "each layer aims at its own output there, not at the float model's"
            notes.dropped("correction", vars(config.correction), why)
        elif notes.said("correction"):
            notes.written("correction", "none", "no correction")
        if config.tuner is not None and config.tuner not in tuners:
            nearest = "AutoRoundModifier" if tuners else ""
            notes.dropped("tuner", config.tuner, "no such tuner is there", nearest)
            if notes.said("tuner_options"):
                why = "no such tuner is there"
                notes.dropped("tuner_options", dict(config.tuner_options), why, nearest)
        elif config.tuner is None and notes.said("tuner"):
            notes.written("tuner", "none", "no tuner")
        if config.vision_weight != 1:
            notes.dropped("vision_weight", config.vision_weight, "there every token counts one")
        elif notes.said("vision_weight"):
            notes.written("vision_weight", 1, "every token counts one")
        if notes.said("on_failure"):
            why = "there it is not asked what a failed layer becomes"
            notes.dropped("on_failure", config.on_failure, why)
        for field in ("min_tokens", "few_tokens"):
            if notes.said(field):
                notes.dropped(field, getattr(config, field), "there experts are not told apart")
    _note_recipe(task)


def _note_recipe(task: ExportTask) -> None:
    recipe = task.recipe
    if recipe.tensor_parallel > 1:
        why = "nothing there checks formats against the parts of a layer"
        task.ledger.dropped("tensor_parallel", recipe.tensor_parallel, why)
    for field in ("predicted", "sensitivity"):
        value = getattr(recipe, field)
        if value is not None:
            shown = value if isinstance(value, dict) else value.model_dump(mode="json")
            task.ledger.dropped(field, shown, "it says how the recipe was found")


def note_rest(task: ExportTask) -> None:
    """Note what no exporter spoke of: names of layers, and what has no effect here either."""
    for index, rule in enumerate(task.recipe.rules):
        place = task.ledger.places.of_rule(index)
        body = rule.model_dump(mode="json", exclude_unset=True)
        words = {field: _shown(field, value) for field, value in body.items()}
        if any(index in work.rules for work in task.work.values()):
            _note_names(task, place, rule)
            _note_words(task, index, place, words)
        else:
            _note_unmeant(task, place, rule, words)
        if "optional" in body:
            why = "names that mean no layer are passed over there"
            task.ledger.written(f"{place}.optional", rule.optional, "", why)


def _note_unmeant(task: ExportTask, place: str, rule: LayerRule, words: Fields) -> None:
    """Note a rule that means no layer: of a model nothing is lost with it, nor is what it skips."""
    why = f"it means no layer of {task.scope.told}"
    for field, value in words.items():
        if field == "optional":
            continue
        if task.scope.exact or rule.skip:
            task.ledger.written(f"{place}.{field}", value, "", why)
        else:
            task.ledger.dropped(f"{place}.{field}", value, why, "--model")


def _note_names(task: ExportTask, place: str, rule: LayerRule) -> None:
    """Note entries of a rule's lists that mean no layer, beside others that do."""
    if task.scope.exact or rule.skip:
        return
    for entry in rule.match.idle_entries(task.scope.layers):
        why = f"it means no layer of {task.scope.told}"
        task.ledger.dropped(f"{place}.match", entry, why, "--model")


def _note_words(task: ExportTask, index: int, place: str, words: Fields) -> None:
    """Note fields of a rule, and keys of its options, that no exporter spoke of."""
    named = {"match", "skip", "optional"}
    if "match" in words:
        task.ledger.written(f"{place}.match", words["match"], "names of layers")
    if "skip" in words:
        told = "these layers are left out" if words["skip"] else ""
        task.ledger.written(f"{place}.skip", words["skip"], told)
    for field, value in words.items():
        keys = [f"{field}.{key}" for key in value] if field.endswith("options") else [field]
        for name in keys if field not in named else ():
            where = f"{place}.{name}"
            said = value[name.partition(".")[2]] if "." in name else value
            if task.ledger.mentions(where) or f"{place}.{field}" in task.ledger.noted_places:
                continue
            if in_effect(task.recipe, index, name, task.work):
                task.ledger.dropped(where, said, "nothing there is like it, for these layers")
            else:
                task.ledger.written(where, said, "", "it has no effect here either")


def _shown(field: str, value: Any) -> Any:
    """A number format by its name, where it is whole."""
    if field not in ("weights", "activations", "outputs") or not isinstance(value, dict):
        return value
    try:
        return NumberSpec.from_dict(value).name
    except FormatError:
        return value


def note_calibration(task: ExportTask, theirs: Mapping[str, Any], told: Mapping[str, str]) -> None:
    """Note the settings of the calibration.

    Args:
        task: The recipe.
        theirs: Values that the tool goes by, by our names; what is missing it does not know.
        told: Words for those, by our names.
    """
    said = task.recipe.calibration.model_fields_set
    # Where nothing is learned from samples, no setting of the calibration has an effect.
    calibrated = task.calibrated
    for name in type(task.recipe.calibration).model_fields:
        value = getattr(task.recipe.calibration, name)
        place = f"calibration.{name}" if name in said else f"calibration.{name} (default)"
        if not calibrated:
            if name in said:
                why = "it has no effect here either: nothing is learned from samples"
                task.ledger.written(place, value, "", why)
        elif name in theirs and theirs[name] == value:
            task.ledger.written(place, value, told.get(name, ""))
        elif name in theirs:
            task.ledger.changed(place, value, told.get(name, ""), _OTHERWISE[name])
        elif name in said:
            task.ledger.dropped(place, value, "no recipe there says it", told.get(name, ""))


_OTHERWISE = {
    "samples": "the number there is another",
    "batch_size": "the number there is another",
    "seed": "the number there is another",
    "layer_sequential": "layers of a block see the same inputs there",
    "block_sequential": "blocks do not see the rounded weights of those before them there",
    "quantized_inputs": "rounded inputs are not simulated there while it calibrates",
}
