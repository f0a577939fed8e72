"""An analysis: what each of its methods is given, and what it gives back.

A method looks at a model once and gives the scores of one unit of choice after the other, each as
soon as it is known for all formats. Whoever asks keeps them, so that an analysis that is cut off
goes on where it was: units that are scored already are named, and a method passes them over, but
carries through them all that the others depend on. What it gives for a unit must not depend on
which units were passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from prismquant.arguments import EXACT
from prismquant.data.batches import Batch
from prismquant.distributed import Alone, Ranks
from prismquant.engine.activation_store import ActivationStore, InMemory
from prismquant.engine.placement import Placement
from prismquant.engine.visit import Visit
from prismquant.engine.walk import ModelWalk
from prismquant.models.bound import BoundModel
from prismquant.search.choices import Choices, UnitRows
from prismquant.search.sensitivity import Score, TokenClass


@dataclass(frozen=True)
class SampleLosses:
    """Losses of one class of tokens, sample by sample.

    Attributes:
        losses: The loss of each sample: the sum over its tokens; none is negative.
        tokens: Its tokens of the class.
    """

    __pydantic_config__ = EXACT

    losses: tuple[float, ...]
    tokens: tuple[float, ...]


@dataclass(frozen=True)
class UnitScores:
    """Scores of a unit of choice.

    Attributes:
        unit: Name of the unit.
        scores: Loss by class of token for each of its formats; to leave it alone has none.
        layer_losses: Loss that the solver gave, by format and layer.
        samples: Of what these are means over the tokens, where samples may be weighted by what all
            units lose on them (:mod:`prismquant.search.sample_weights`).
    """

    unit: str
    scores: Mapping[str, Mapping[TokenClass, Score]]
    layer_losses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    samples: Mapping[str, Mapping[TokenClass, SampleLosses]] = field(default_factory=dict)


def _silent(unit: str, what: str) -> None:
    """Tell nobody."""


def _unheard(unit: str, option: str, layer: str, loss: float) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Analysis:
    """Everything that a method is given.

    Attributes:
        bound: The model.
        choices: Its units of choice, with the rows of the plan that each format means: number
            formats, solver, its options, ranges.
        batches: Calibration batches, made anew whenever they are asked for.
        placement: Where units run, in which precision, and where states wait.
        store: Keeps hidden states between units.
        kept: Keeps what a method comes back to: outputs of all units, gradients.
        seed: Of everything that is drawn.
        done: Names of units that need no scores: an earlier run has them.
        room: Bytes that the process may take; None: not known.
        stage: Is told a name and what is done to it next.
        solved: Is told a unit, a format, one of the unit's layers, and the loss that the solver
            gave of it.
        ranks: Processes that share the batches.
    """

    bound: BoundModel
    choices: Choices
    batches: Sequence[Batch]
    placement: Placement = field(default_factory=Placement)
    store: ActivationStore = field(default_factory=InMemory)
    kept: ActivationStore = field(default_factory=InMemory)
    seed: int = 0
    done: frozenset[str] = frozenset()
    room: int | None = None
    stage: Callable[[str, str], None] = _silent
    solved: Callable[[str, str, str, float], None] = _unheard
    ranks: Ranks = field(default_factory=Alone)

    @property
    def wanted(self) -> tuple[UnitRows, ...]:
        """Units that are to be scored: something can be chosen, and no earlier run has done it."""
        units = self.choices.units
        return tuple(
            one for one in units if len(one.unit.options) > 1 and one.unit.name not in self.done
        )

    @property
    def cached_steps(self) -> set[int]:
        """Numbers of the steps whose keys and values are to be scored."""
        caches = (plan for one in self.wanted for plan in one.caches.values())
        return {layer.step for plan in caches for layer in plan.layers}

    def walk(self, *, backward: bool = False, caches: bool = True) -> ModelWalk:
        """A walk of the float model through the units that are to be scored.

        Args:
            backward: Go back again, for gradients; outputs then wait where a method comes back to.
            caches: Whether keys and values are looked at.
        """
        visit = Visit(
            layers=[site.name for one in self.wanted if one.rows for site in one.sites],
            attentions=sorted(self.cached_steps) if caches else (),
            stagewise=False,
            backward=backward,
        )
        return ModelWalk(
            self.bound,
            self.bound.shards(),
            self.batches,
            self.placement,
            visit=visit,
            store=self.kept if backward else self.store,
            ranks=self.ranks,
        )


class AnalysisMethod(Protocol):
    """A way to score units: a frozen dataclass whose fields are its options."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def needs_samples(self) -> bool:
        """Whether it looks at calibration samples at all."""

    @property
    def one_by_one(self) -> bool:
        """Whether every batch must be of one sample."""

    @property
    def losses_back(self) -> int:
        """Number of losses whose gradients wait at every unit on the way back; 0: it never goes."""

    def scores(self, analysis: Analysis) -> Iterator[UnitScores]:
        """Score every wanted unit, in an order of the method's own.

        Raises:
            NumericsError: A weight, an activation or a loss is not finite.
            PrismQuantError: The samples lack what the method cannot do without.
        """
