"""Forward passes of one step over all calls, and the inputs of its layers on the way.

A step is solved stage by stage, and each stage must see its inputs as the stages before it leave
them. Running the step anew for every stage costs two to three forward passes where one would do.
:class:`PausedPasses` runs all calls side by side: each call's pass is a greenlet of its own, halts
where the layers of the stage in question begin, and goes on with their new weights once they are
solved. Every layer then runs once for every call. What a halted pass holds (the residual stream,
queries and keys, the input in question) stays in memory meanwhile; :class:`ReplayedPasses` holds
nothing and runs the step from its beginning each time.

Both give the same numbers: the same operations on the same tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from prismquant.engine.calls import StepCall
from prismquant.engine.expert_calls import ExpertCall
from prismquant.engine.stand_ins import Enough, replaced_forwards

if TYPE_CHECKING:
    from prismquant.models.experts import ExpertLayers, Routing

Output = tuple[Callable[[Any], None], Any]
# Calls, each with the inputs of the layers that it reaches, by name.
Inputs = Iterator[tuple[StepCall, Mapping[str, Tensor]]]
Around = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class StepRun:
    """Everything that passes of a unit need.

    Attributes:
        model: Holds the step; its weights are real while passes run.
        name: Module path of the step.
        calls: How the model calls it; asked anew for every round of passes.
        around: Is entered around every piece of a pass.
    """

    model: nn.Module
    name: str
    calls: Callable[[], Iterable[StepCall]]
    around: Around

    @property
    def module(self) -> nn.Module:
        """The step."""
        return self.model.get_submodule(self.name)

    def experts(self, name: str) -> ExpertLayers:
        """The step's experts at this path."""
        return cast("ExpertLayers", self.model.get_submodule(name))


class Passes(Protocol):
    """Passes of one step over all calls."""

    def inputs(
        self, layers: Sequence[str], stage: Sequence[str] = (), unsolved: Sequence[str] = ()
    ) -> Inputs:
        """Inputs of the layers, call by call.

        Args:
            layers: Module paths.
            stage: All layers that are solved together with them.
            unsolved: Layers whose weights are going to change after that.

        Yields:
            The call, and the input of each of the layers that it reaches.
        """

    def experts(self, name: str, unsolved: Sequence[str] = ()) -> list[ExpertCall]:
        """Calls of the step's experts.

        Args:
            name: Module path of the experts.
            unsolved: As for :meth:`inputs`.
        """

    def give(self, name: str, outputs: Sequence[Tensor]) -> None:
        """Let the experts put out these tensors from now on, one a call, in place of running."""

    def outputs(self) -> Iterator[Output]:
        """The step's outputs, each with what keeps it; keeping one ends that call."""

    def restart(self) -> None:
        """Forget what was computed: something that passes have gone through has changed."""


class ReplayedPasses:
    """Passes that start at the step's beginning each time and hold nothing between.

    Args:
        run: The step.
    """

    def __init__(self, run: StepRun) -> None:
        self._run = run
        self._given: dict[str, Sequence[Tensor]] = {}

    def inputs(
        self, layers: Sequence[str], stage: Sequence[str] = (), unsolved: Sequence[str] = ()
    ) -> Inputs:
        """See :class:`Passes`. A pass ends as soon as all of the layers were seen."""
        for number, call in enumerate(self._run.calls()):
            with self._run.around(), self._giving(number):
                seen = _seen(self._run, call, layers)
            yield call, seen

    def experts(self, name: str, unsolved: Sequence[str] = ()) -> list[ExpertCall]:
        """See :class:`Passes`. A pass ends at the experts."""
        found = []
        for number, call in enumerate(self._run.calls()):
            with self._run.around(), self._giving(number):
                found.append(ExpertCall(call, _given_to(self._run, call, name)))
        return found

    def give(self, name: str, outputs: Sequence[Tensor]) -> None:
        """See :class:`Passes`."""
        self._given[name] = outputs

    def _giving(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Within the block, experts put out what they were made to."""
        given = {
            name: _returning(self._run.experts(name), outputs[number])
            for name, outputs in self._given.items()
        }
        return replaced_forwards(self._run.model, given)

    def outputs(self) -> Iterator[Output]:
        """See :class:`Passes`."""
        for number, call in enumerate(self._run.calls()):
            with self._run.around(), self._giving(number):
                output = self._run.module(*call.args, **call.kwargs)
            keep = call.keep
            # What it was given, pixels perhaps, must be gone before the next call is made.
            del call
            yield keep, output
            del keep, output

    def restart(self) -> None:
        """See :class:`Passes`."""
        self._given.clear()


class _Pass:
    """One call's pass.

    Attributes:
        call: The call.
        task: Runs the step; None before and after.
        input: Of the layer at which the pass halts; all that experts are given.
        given: What the experts at which it halted shall put out; None: let them run.
        output: Of the step, once the pass has ended.
        ended: Whether it has.
        stale: Whether it has gone through a layer whose weights were going to change.
    """

    def __init__(self, call: StepCall) -> None:
        self.call = call
        self.task: greenlet | None = None
        self.input: Any = None
        self.given: Tensor | None = None
        self.output: Any = None
        self.ended = False
        self.stale = False

    def reset(self) -> None:
        if self.task is not None and not self.task.dead:
            self.task.throw(GreenletExit)
        self.task, self.input, self.given, self.output = None, None, None, None
        self.ended, self.stale = False, False

    def advance(self, module: nn.Module) -> None:
        """Run until the pass halts or ends; from the beginning where it is stale."""
        if self.stale:
            self.reset()
        self.input = None
        if self.ended:
            return
        if self.task is None:
            self.task = greenlet(lambda _: module(*self.call.args, **self.call.kwargs))
        given, self.given = self.given, None
        value = self.task.switch(given)
        if self.task.dead:
            self.task, self.output, self.ended = None, value, True
        else:
            self.input = value


class PausedPasses:
    """Passes that halt where a stage's layers begin and go on from there.

    Args:
        run: The step.
    """

    def __init__(self, run: StepRun) -> None:
        self._run = run
        self._passes: list[_Pass] | None = None
        self._halted: tuple[str, ...] = ()

    def inputs(
        self, layers: Sequence[str], stage: Sequence[str] = (), unsolved: Sequence[str] = ()
    ) -> Inputs:
        """See :class:`Passes`; the layers of a stage must share one input."""
        if self._halted != tuple(stage):
            self._advance({name: self._halt(name) for name in stage}, unsolved)
        for one in self._all():
            if one.input is not None:
                yield one.call, dict.fromkeys(layers, one.input)
            else:
                yield one.call, {}

    def experts(self, name: str, unsolved: Sequence[str] = ()) -> list[ExpertCall]:
        """See :class:`Passes`."""
        if self._halted != (name,):
            self._advance({name: self._halt_experts(name)}, unsolved)
        return [ExpertCall(one.call, one.input) for one in self._all()]

    def give(self, name: str, outputs: Sequence[Tensor]) -> None:
        """See :class:`Passes`; the passes must halt at these experts."""
        for one, output in zip(self._all(), outputs, strict=True):
            one.given = output

    def outputs(self) -> Iterator[Output]:
        """See :class:`Passes`; the passes are done with."""
        passes, self._passes, self._halted = self._all()[::-1], None, ()
        while passes:
            one = passes.pop()
            with self._run.around():
                one.advance(self._run.module)
            yield one.call.keep, one.output

    def restart(self) -> None:
        """See :class:`Passes`."""
        self._halted = ()
        for one in self._passes or ():
            one.reset()

    def _all(self) -> list[_Pass]:
        if self._passes is None:
            self._passes = [_Pass(call) for call in self._run.calls()]
        return self._passes

    def _advance(self, halts: dict[str, Callable[..., Any]], unsolved: Sequence[str]) -> None:
        """Let every pass run until it halts at the first of these modules, or ends."""
        self._halted = tuple(halts)
        forwards = halts | {name: self._mark(name) for name in unsolved}
        with self._run.around(), replaced_forwards(self._run.model, forwards):
            for one in self._all():
                one.advance(self._run.module)

    def _halt(self, name: str) -> Callable[..., Any]:
        """In place of a layer's forward: hand over its input; later, run what is there by then."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            current = getcurrent()
            if current.parent is None:  # never: passes run in greenlets of their own
                raise RuntimeError(f"{name} runs outside of a pass")
            current.parent.switch((*args, *kwargs.values())[0])
            return self._run.model.get_submodule(name)(*args, **kwargs)

        return forward

    def _halt_experts(self, name: str) -> Callable[..., Any]:
        """In place of experts' forward: hand over what they are given; later, give or run."""

        def forward(*args: Tensor) -> Any:
            current, experts = getcurrent(), self._run.experts(name)
            if current.parent is None:  # never: passes run in greenlets of their own
                raise RuntimeError(f"{name} runs outside of a pass")
            routing = experts.routing(*args)
            given = current.parent.switch(routing)
            return experts(*args) if given is None else routing.as_called(given)

        return forward

    def _mark(self, name: str) -> Callable[..., Any]:
        """In place of the forward of a layer that is not yet solved: run it, and remember that."""
        module: Any = self._run.model.get_submodule(name)

        def forward(*args: Any, **kwargs: Any) -> Any:
            for one in self._all():
                one.stale |= one.task is getcurrent()
            return type(module).forward(module, *args, **kwargs)

        return forward


def _returning(experts: ExpertLayers, output: Tensor) -> Callable[..., Tensor]:
    """In place of experts' forward: put out what was made for the rows that they are given."""
    return lambda *given: experts.routing(*given).as_called(output)


def _given_to(run: StepRun, call: StepCall, name: str) -> Routing:
    """Rows that a step's experts are given in one pass, which ends there."""
    seen: list[Routing] = []

    def forward(*given: Tensor) -> None:
        seen.append(run.experts(name).routing(*given))
        raise Enough

    with contextlib.suppress(Enough), replaced_forwards(run.model, {name: forward}):
        run.module(*call.args, **call.kwargs)
    [routing] = seen
    return routing


def _seen(run: StepRun, call: StepCall, layers: Sequence[str]) -> dict[str, Tensor]:
    """The inputs of these layers in one pass, which ends when all were seen."""
    seen: dict[str, Tensor] = {}

    def look_at(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]
            if len(seen) == len(layers):
                raise Enough

        return hook

    handles = [
        run.model.get_submodule(name).register_forward_pre_hook(look_at(name)) for name in layers
    ]
    try:
        run.module(*call.args, **call.kwargs)
    except Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen
