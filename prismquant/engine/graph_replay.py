"""A replay that also goes back: units as functions of the units before them, for gradients.

Going forth, the output of every unit is kept. Going back, from the last unit to the first, the
model's own ``forward`` runs again with stand-ins for the units before the one in question, whose
outputs are leaves that take gradients. So a unit's call hangs on these leaves through the model's
own code in between: windows, deepstack features, the merging of features into embeddings. One
backward pass through a unit gives the gradients at all leaves, and these are what arrives at the
units that put them out, summed over all that read them.

Several losses share one graph: each has gradients of its own at every unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prismquant.engine.activation_store import ActivationStore
from prismquant.engine.calls import Gradients, Source, StepCall, TowerPass
from prismquant.engine.captured_call import llm_root
from prismquant.engine.replay import Replay, with_glances
from prismquant.engine.stand_ins import capture_here
from prismquant.engine.token_tables import Lookups
from prismquant.models.arch import Modality
from prismquant.models.bound import BoundStep

# In place of a unit's name: what the language model as a whole is given.
_INPUTS = ""


@dataclass(frozen=True, eq=False)
class GraphCall:
    """A call of a unit whose arguments hang on the outputs of units before it.

    Attributes:
        call: The call.
        arriving: Gradients at its output, one for each loss; empty for the head, and where nothing
            that was gone through depends on it.
    """

    call: StepCall
    arriving: Gradients
    _leaves: Mapping[Source, Tensor]
    _keep: Callable[[Source, Gradients], None]

    def backward(
        self,
        output: Tensor,
        gradients: Gradients,
        watched: Sequence[Tensor] = (),
        *,
        again: bool = False,
    ) -> list[Gradients]:
        """Go back through the call, loss by loss, and hand gradients on to the units before it.

        Args:
            output: Hangs on the call's arguments.
            gradients: Gradient of each loss at it.
            watched: Tensors on the way whose gradients are wanted.
            again: Whether other losses go back through the same call later.

        Returns:
            The gradients at each watched tensor, one for each loss.
        """
        wanted = [*watched, *self._leaves.values()]
        found = _gradients([output], [gradients], wanted, again=again)
        for source, own in zip(self._leaves, found[len(watched) :], strict=True):
            self._keep(source, own)
        return found[: len(watched)]


class GraphReplay(Replay):
    """Feeds the steps of a model forth and back; see :class:`Replay` for its arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, keep_all=True)
        self._tables: Lookups | None = None
        self._to_vision = False

    def begin_llm(self, tables: Lookups) -> None:
        """See :class:`Replay`."""
        self._tables = tables
        super().begin_llm(tables)

    def turn_round(self, *, to_vision: bool) -> None:
        """Go back from now on; all units must be finished.

        Args:
            to_vision: Whether gradients are wanted before the language model, too.
        """
        self._to_vision = to_vision

    def rewind(self, step: BoundStep) -> None:
        """Let the step be the next to be called, and forget its output.

        Steps are rewound from the last to the first.
        """
        for state in self._states_of(step):
            state.finished.pop(step.name, None)
            state.features.pop(step.name, None)
            if step.kind != "head":
                state.latest = state.before[step.name]
            if state.latest:
                state.hidden = state.finished[state.latest]

    def graph_calls(self, step: BoundStep) -> Iterator[GraphCall]:
        """Calls of a unit, as functions of the units before it; gradients must be enabled.

        The unit must be rewound, and all after it gone through.
        """
        for state in self._states_of(step):
            leaves: dict[Source, Tensor] = {}
            given = self._on_leaves(state, leaves)
            call = self._call(step, given)
            arriving = _taken(state, (step.name, 0))
            yield GraphCall(call, arriving, leaves, _keeper(state, self._states))
            # Its pixels must be gone before the next ones are made.
            del call, given

    @torch.enable_grad()
    def leave_llm(self) -> None:
        """Bring gradients from what the language model is given back to the projectors' outputs.

        All units of the language model must be gone through.
        """
        if self._tables is None:
            raise RuntimeError("the language model has not begun")
        known = {**self._tables, llm_root(self.bound.arch): capture_here}
        for inputs, passes, llm in zip(self._batches, self._vision, self._llm, strict=True):
            if not passes:
                continue
            leaves: list[dict[Source, Tensor]] = [{} for _ in passes]
            given = [self._on_leaves(s, own) for s, own in zip(passes, leaves, strict=True)]
            seen = with_glances(inputs, passes)
            captured = self._capture(seen, self._vision_stand_ins(given) | known)
            outputs = _floats(captured.kwargs_of_step)
            arriving = [_taken(llm, (_INPUTS, number)) for number in range(len(outputs))]
            wanted = [leaf for own in leaves for leaf in own.values()]
            found = iter(_gradients(outputs, arriving, wanted))
            for state, own in zip(passes, leaves, strict=True):
                keep = _keeper(state, self._states)
                for source in own:
                    keep(source, next(found))

    def _call(self, step: BoundStep, state: TowerPass) -> StepCall:
        """The call of a step; what its state gives are leaves."""
        if step.kind == "head":
            return self._head_call(state)
        here = {step.name: capture_here}
        if step.modality is Modality.LLM:
            root = self.model.get_submodule(llm_root(self.bound.arch))
            stand_ins = self._chain_stand_ins(state) | here
            return self._step_call(step, state, self._capture(state.inputs(), stand_ins, root), [])
        inputs = state.whole_inputs() if step.kind == "entry" else state.later_inputs()
        stand_ins = self._vision_stand_ins([state]) | here
        return self._step_call(step, state, self._capture(inputs, stand_ins), [])

    def _states_of(self, step: BoundStep) -> list[TowerPass]:
        if step.modality is Modality.LLM:
            return self._llm
        return [state for passes in self._vision for state in passes]

    def _on_leaves(self, state: TowerPass, leaves: dict[Source, Tensor]) -> TowerPass:
        """The state, whose finished outputs become leaves as soon as they are asked for."""

        def leaf(name: str, give: Callable[[], Any], *, every: bool) -> Callable[[], Any]:
            made: list[Any] = []

            def once() -> Any:
                if not made:
                    value = give()
                    found = _floats(value) if every else _floats(value)[:1]
                    own = {id(x): x.detach().requires_grad_(True) for x in found}
                    leaves.update({(name, n): own[id(x)] for n, x in enumerate(found)})
                    made.append(_with(value, own))
                return made[0]

            return once

        features = {n: leaf(n, give, every=False) for n, give in state.features.items()}
        hidden = leaf(state.latest, state.hidden, every=False) if state.latest else state.hidden
        finished = {
            name: hidden if name == state.latest else leaf(name, give, every=False)
            for name, give in state.finished.items()
            if name in self._shortcuts.taps
        }
        whole = state.tokens is not None and self._to_vision
        inputs = leaf(_INPUTS, state.inputs, every=True) if whole else state.inputs
        return replace(state, hidden=hidden, features=features, finished=finished, inputs=inputs)


def _gradients(
    outputs: Sequence[Tensor],
    arriving: Sequence[Gradients],
    wanted: Sequence[Tensor],
    *,
    again: bool = False,
) -> list[Gradients]:
    """Gradients at tensors, loss by loss, from those at the outputs that hang on them."""
    losses = max((len(own) for own in arriving), default=0)
    found: list[Gradients] = [[None] * losses for _ in wanted]
    work: list[tuple[int, list[Tensor], list[Tensor]]] = []
    for number in range(losses):
        given = [
            (output, gradient.to(output.device, output.dtype).reshape(output.shape))
            for output, own in zip(outputs, arriving, strict=True)
            if own and output.requires_grad and (gradient := own[number]) is not None
        ]
        if given:
            work.append((number, [o for o, _ in given], [g for _, g in given]))
    for left, (number, ends, slopes) in zip(range(len(work) - 1, -1, -1), work, strict=True):
        own_found = torch.autograd.grad(
            ends, wanted, slopes, retain_graph=again or left > 0, allow_unused=True
        )
        for gathered, gradient in zip(found, own_found, strict=True):
            gathered[number] = gradient
    return found


def _taken(state: TowerPass, source: Source) -> Gradients:
    """Gradients that have arrived at an output; they are not kept any longer."""
    give = state.gradients.pop(source, None)
    return [] if give is None else give()


def _keeper(state: TowerPass, store: ActivationStore) -> Callable[[Source, Gradients], None]:
    """Adds gradients to those that have arrived at the same output."""

    def keep(source: Source, gradients: Gradients) -> None:
        if all(gradient is None for gradient in gradients):
            return
        if earlier := _taken(state, source):
            gradients = [_sum(a, b) for a, b in zip(earlier, gradients, strict=True)]
        state.gradients[source] = store.keep(gradients)

    return keep


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _floats(value: Any) -> list[Tensor]:
    """Floating-point tensors nested in tuples, lists and dictionaries, in their order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _floats(item)]
    return []


def _with(value: Any, others: Mapping[int, Tensor]) -> Any:
    """The same value with other tensors in the place of some, found by their identity."""
    if isinstance(value, Tensor):
        return others.get(id(value), value)
    if isinstance(value, dict):
        return {key: _with(item, others) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_with(item, others) for item in value)
    return value
