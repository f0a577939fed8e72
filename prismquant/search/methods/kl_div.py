"""Method ``kl_div``: the model's own KL divergence with one unit of choice quantized at a time.

The float model is walked through once. At each step, every option of every unit in it is put in
place in turn, and the model runs from that step on to the logits; what comes before is not run
again. The divergence from the float model is summed over every place, by class of token. Samples
without pictures are not run for units before the language model, where they cannot differ. Keys and
values are rounded in all blocks at once, in states that move along beside those of the float model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from prismquant.engine.replay import Replay
from prismquant.engine.streamed_model import StreamedModel
from prismquant.engine.walk import Unit
from prismquant.errors import NumericsError
from prismquant.formats.quantized_layer import QuantizedLayer
from prismquant.models.attention import attention_hooked
from prismquant.plan.plan import PlanRow
from prismquant.runtime.kv_cache import KVQuantizer
from prismquant.search.analysis import Analysis, UnitScores
from prismquant.search.divergence import ClassSums, UnchangedLogits, scores_of
from prismquant.search.option_errors import Option, StepErrors, solve_step
from prismquant.search.sensitivity import Score, TokenClass
from prismquant.search.suffix_runs import Layers, SuffixRuns
from prismquant.search.token_places import NOWHERE, token_places

# Numbers of logits that are formed together; the head's weight is read once for all of them.
_LOGITS = 1 << 24


@dataclass(frozen=True)
class KLDivergence:
    """Analysis by the divergence that each format of each unit makes by itself."""

    needs_samples: ClassVar[bool] = True
    one_by_one: ClassVar[bool] = False
    losses_back: ClassVar[int] = 0

    def scores(self, analysis: Analysis) -> Iterator[UnitScores]:
        """Scores of every unit; see :class:`prismquant.search.analysis.AnalysisMethod`."""
        walk = analysis.walk()
        if walk.main is None:
            raise RuntimeError("divergences need samples")
        measured = _Divergences(analysis, walk.main)
        with measured.runs.model_at_hand(), contextlib.closing(walk.units()) as units:
            for unit in units:
                if not unit.flows:
                    continue
                with unit.loaded():
                    yield from measured.visit(unit)
                    with torch.no_grad():
                        unit.advance()


@dataclass
class _Variant:
    """An option of a unit, and what comes of it.

    Attributes:
        option: The unit and the format.
        sums: Its divergences.
        layers: Its quantized layers.
        fork: States with keys and values rounded, for a format of these.
    """

    option: Option
    sums: ClassSums
    layers: Layers = ()
    fork: Replay | None = field(default=None)


class _Divergences:
    """Divergences of all options, step by step.

    Args:
        analysis: The analysis.
        main: The float model, of which the walk loads one step at a time.
    """

    def __init__(self, analysis: Analysis, main: StreamedModel) -> None:
        self.analysis, self.main = analysis, main
        self.runs = SuffixRuns(analysis, main)
        self.places = [token_places(batch, analysis.bound) for batch in analysis.batches]
        sizes = [len(places) for places in self.places]
        self.first = [sum(sizes[:number]) for number in range(len(sizes))]
        self.samples = sum(sizes)
        self.counts = ClassSums(self.samples)
        for number, places in enumerate(self.places):
            rows, columns = (places != NOWHERE).nonzero(as_tuple=True)
            ones = torch.ones(len(rows), dtype=torch.float64)
            self.counts.add(ones, rows + self.first[number], places[rows, columns])
        self.caches: list[_Variant] = []
        # What the head is given by the float model, batch by batch.
        self.unchanged: list[Callable[[], Tensor]] = []

    def visit(self, unit: Unit) -> Iterator[UnitScores]:
        """Scores of the units that are known once a step has been run."""
        if not self.unchanged:
            for _, (hidden,) in self.runs.hidden(unit, [()], everywhere=True):
                self.unchanged.append(self.analysis.kept.keep(hidden))
        here = [one for one in self.analysis.wanted if one.unit.step == unit.name and one.rows]
        if here or unit.step.index in unit.walk.visit.attentions:
            errors = solve_step(unit, self.analysis)
            variants = _variants(errors, self.samples)
            if variants:
                self._measure(unit, variants)
            scores = self._scores(variants)
            yield from (UnitScores(one.unit.name, scores[one.unit.name]) for one in here)
            yield from self._move_caches(unit, errors.caches)

    def _measure(self, unit: Unit, variants: Sequence[_Variant]) -> None:
        stage = ", ".join(dict.fromkeys(variant.option[1] for variant in variants))
        self.analysis.stage(unit.name, f"divergences of {stage}")
        if unit.step.kind == "head":
            for batch in range(len(self.places)):
                self._compare(batch, variants, [self.unchanged[batch]()] * len(variants))
            return
        for batch, hidden in self.runs.hidden(unit, [variant.layers for variant in variants]):
            self._compare(batch, variants, hidden)

    @torch.no_grad()
    def _compare(self, batch: int, variants: Sequence[_Variant], hidden: Sequence[Tensor]) -> None:
        """Add up divergences at all places of a batch."""
        name = self.analysis.bound.arch.head
        places, unchanged = self.places[batch], self.unchanged[batch]()
        rows, columns = (places != NOWHERE).nonzero(as_tuple=True)
        chunk = max(1, _LOGITS // self.analysis.bound.site(name).out_features)
        at_hand = self.main.module(name).get_parameter("weight").is_meta
        with (
            self.main.loaded([name] if at_hand else []),
            self.analysis.placement.precision.in_force(),
        ):
            for start in range(0, len(rows), chunk):
                row, column = rows[start : start + chunk], columns[start : start + chunk]
                own = UnchangedLogits(self.main.module(name)(unchanged[row, column]))
                for variant, states in zip(variants, hidden, strict=True):
                    of_head = [pair for pair in variant.layers if pair[0].site.name == name]
                    with self.runs.quantized(of_head):
                        changed = self.main.module(name)(states[row, column])
                    found = own.divergence(changed)
                    self._require_finite(found, variant, batch, row)
                    classes = places[row, column]
                    variant.sums.add(found, row + self.first[batch], classes)

    def _require_finite(self, found: Tensor, variant: _Variant, batch: int, rows: Tensor) -> None:
        broken = (~torch.isfinite(found)).nonzero().flatten().tolist()
        if broken:
            sample = self.analysis.batches[batch].ids[int(rows[broken[0]])]
            raise NumericsError(
                f"the logits are not finite with {variant.option[1]}",
                where=f"{variant.option[0]}, sample {sample}",
                remedy="leave the unit alone with --disable, or look for NaN in the checkpoint",
            )

    def _move_caches(
        self, unit: Unit, quantizers: Mapping[Option, KVQuantizer]
    ) -> Iterator[UnitScores]:
        """Let states with rounded keys and values pass a block; scores after the last one."""
        wanted = [one for one in self.analysis.wanted if one.caches]
        if not wanted or unit.step.index not in unit.walk.visit.attentions:
            return
        if not self.caches:
            self.caches = [
                _Variant(option, ClassSums(self.samples), fork=self.main.replay.fork())
                for option in quantizers
            ]
        layers = {
            (one.unit.name, name): plan.layer(unit.step.index)
            for one in wanted
            for name, plan in one.caches.items()
        }
        for variant in self.caches:
            layer = layers[variant.option]
            if layer is not None and variant.fork is not None:
                attention = self.main.module(layer.attention)
                with attention_hooked(attention, quantizers[variant.option]):
                    self.runs.advance(variant.fork, unit.step)
        if unit.step.index == max(unit.walk.visit.attentions):
            forks = [variant.fork for variant in self.caches if variant.fork is not None]
            for batch in range(len(self.places)):
                hidden = [self.runs.last_hidden(fork, batch) for fork in forks]
                self._compare(batch, self.caches, hidden)
            scores = self._scores(self.caches)
            yield from (UnitScores(one.unit.name, scores[one.unit.name]) for one in wanted)

    def _scores(
        self, variants: Sequence[_Variant]
    ) -> dict[str, dict[str, Mapping[TokenClass, Score]]]:
        """Scores by unit and format, from the sums of all ranks."""
        own = [variant.sums.sums.tolist() for variant in variants]
        gathered = self.analysis.ranks.gather_json([own, self.counts.sums.tolist()])
        counts = [row for _, rows in gathered for row in rows]
        found: dict[str, dict[str, Mapping[TokenClass, Score]]] = {}
        for number, variant in enumerate(variants):
            sums = [row for sums, _ in gathered for row in sums[number]]
            unit, name = variant.option
            found.setdefault(unit, {})[name] = scores_of(sums, counts)
        return found


def _variants(errors: StepErrors, samples: int) -> list[_Variant]:
    """Options of a step, each with all of its layers."""
    layers: dict[Option, list[tuple[PlanRow, QuantizedLayer]]] = {}
    for own in errors.by_layer.values():
        for error in own:
            layers.setdefault(error.option, []).append((error.row, error.layer))
    return [_Variant(option, ClassSums(samples), rows) for option, rows in layers.items()]
