"""Quantizing the experts of a unit, one after the other, each from its first layer to its last.

An expert is calibrated on the tokens that the router has sent to it, of all batches at once, and
sees nothing of the others. So its Hessians are gone before those of the next are summed, and its
output is added to the block's as soon as its last layer is solved. Where fewer tokens than the
plan's ``min_tokens`` were sent to it, its layers are rounded to nearest, or take all tokens of the
block for its input, as the plan's ``few_tokens`` says; the record tells which, and how many tokens
were sent to each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

from prismquant.diagnostics.step_record import LayerRecord
from prismquant.engine.expert_calls import ExpertInput, RoutedCalls, middle
from prismquant.engine.group import LayerGroup, What
from prismquant.engine.group_moments import Gathered
from prismquant.engine.unit_plan import Quantizing
from prismquant.engine.walk import Unit
from prismquant.engine.weight_rounding import is_rounded, round_layers
from prismquant.formats.quantized_layer import QuantizedLayer
from prismquant.models.experts import LAST
from prismquant.plan.plan import PlanRow, problem_groups
from prismquant.statistics.tokens import Tokens, summed

if TYPE_CHECKING:
    from prismquant.models.experts import Expert

Show = Callable[[Sequence[LayerGroup], What], None]
Found = Iterable[tuple[QuantizedLayer, LayerRecord]]


class ExpertsWork:
    """The work on the experts of one unit.

    Args:
        unit: The unit.
        rows: Of the plan, of all layers of all experts that are quantized.
        how: What holds for all units.
        unsolved: Layers of the unit that are no experts', and whose weights are going to change.
        group_of: Makes a group of layers that are solved together.
        solve: Solves groups, once it has let them be shown what they want; and hands on what is
            found.
        keep: Takes each layer as soon as it is solved.
    """

    def __init__(
        self,
        unit: Unit,
        rows: Sequence[PlanRow],
        how: Quantizing,
        unsolved: Sequence[str],
        group_of: Callable[[Sequence[PlanRow]], LayerGroup],
        solve: Callable[[Sequence[LayerGroup], Show, Callable[[Found], None]], None],
        keep: Callable[[QuantizedLayer, LayerRecord], None],
    ) -> None:
        self.unit, self.rows, self.how, self._unsolved = unit, rows, how, unsolved
        self._group_of, self._solve, self._keep = group_of, solve, keep
        # Of all tokens, by how layers take them in: all experts that lack tokens share it.
        self._of_all: dict[object, Gathered] = {}

    def run(self) -> None:
        """Solve the experts, and let the unit hand on what they put out."""
        for module in dict.fromkeys(_module_of(row) for row in self.rows):
            routed = self.unit.experts.calls(module, self._unsolved)
            own: dict[int, list[PlanRow]] = {number: [] for number in range(len(routed.experts))}
            for row in self.rows:
                if row.site.expert is not None and row.site.expert.module == module:
                    own[row.site.expert.number].append(row)
            for number, rows in own.items():
                self._expert(routed, number, rows)
            self._of_all.clear()
            if self._stagewise:
                self.unit.experts.give(module, routed.outputs)
            else:
                self.unit.restart()

    @property
    def _stagewise(self) -> bool:
        return self.unit.walk.visit.stagewise

    def _expert(self, routed: RoutedCalls, number: int, rows: Sequence[PlanRow]) -> None:
        """Solve an expert's layers, and add its output to the block's."""
        expert, given = cast("Expert", routed.experts[number]), routed.input(number)
        sent = summed({"": given.call.seen(len(given.hidden))}, self.how.ranks)[""]
        few = any(row.needs_data and sent.total < row.config.min_tokens for row in rows)
        shown = routed.all_tokens() if few else given
        first = [row for row in rows if not _is_last(row.site.name)]
        last = [row for row in rows if _is_last(row.site.name)]
        if not self._stagewise:
            between = self._middle(expert, shown)
        self._layers(first, shown, sent, of_all=few)
        if self._stagewise:
            between = self._middle(expert, shown)
        self._layers(last, between, sent)
        if self._stagewise and len(given.hidden):
            with self.unit.as_served():
                inner = middle(expert, given.hidden) if few else between.hidden
                routed.add(number, expert.down_proj(inner))

    def _middle(self, expert: Expert, shown: ExpertInput) -> ExpertInput:
        """Input of an expert's last layer, as its first ones are by now."""
        with self.unit.as_served():
            return ExpertInput(shown.call, middle(expert, shown.hidden))

    def _layers(
        self, rows: Sequence[PlanRow], shown: ExpertInput, sent: Tokens, *, of_all: bool = False
    ) -> None:
        """Solve layers of an expert that share an input; ``of_all``: it is that of the block."""

        def keep(found: Found) -> None:
            for layer, record in found:
                self._keep(layer, replace(record, routed=sent))

        for members in problem_groups(rows):
            if is_rounded(members[0]):
                keep(round_layers(self.unit, members, self.how))
                continue
            group = self._group(members, sent)
            how = self._taken_in(members[0]) if of_all else None
            if how in self._of_all:
                group.take(self._of_all[how])
            group.keeps = how is not None
            self._solve([group], partial(self._show, shown), keep)
            if group.gathered is not None:
                self._of_all[how] = group.gathered

    def _group(self, rows: Sequence[PlanRow], sent: Tokens) -> LayerGroup:
        """A group; without moments, where its expert was sent few tokens and the plan says so."""
        config = rows[0].config
        if sent.total >= config.min_tokens or config.few_tokens == "all":
            return self._group_of(rows)
        group = self._group_of([_guarded(row) for row in rows])
        least = config.min_tokens
        group.forgo(f"{sent.total} tokens were sent to its expert, and min_tokens is {least}")
        return group

    def _taken_in(self, row: PlanRow) -> object:
        """All that the Hessian of a given input depends on; None where it can't be shared."""
        config = row.config
        if row.observed or config.correction is not None or config.few_tokens != "all":
            return None
        return config.activations, row.online, self.how.vision_weight(row)

    def _show(self, shown: ExpertInput, groups: Sequence[LayerGroup], what: What) -> None:
        """Let groups take in an input."""
        for group in groups if len(shown.hidden) else ():
            group.observe(shown.hidden, shown.call, what)
            if what == "ranges":
                with self.unit.walk.placement.precision.in_force():
                    group.observe_outputs(shown.hidden, shown.call)


def _guarded(row: PlanRow) -> PlanRow:
    return replace(row, config=replace(row.config, on_failure="rtn"))


def _module_of(row: PlanRow) -> str:
    """Path of the experts that a layer is part of."""
    return "" if row.site.expert is None else row.site.expert.module


def _is_last(layer: str) -> bool:
    """Whether a layer reads what the first layers of its expert put out."""
    return layer.endswith(f".{LAST}")
