"""Running a model one step at a time, with the model's own code in between.

The engine holds one step (patch embedding, block, projector, head) in memory at a time, yet every
step must see exactly what the whole model would pass it: rotary embeddings, attention masks,
cu_seqlens, windows, deepstack features. Instead of knowing how each family computes those,
:class:`Replay` lets the model's own ``forward`` run with its finished steps replaced by stand-ins:
the last finished step returns its stored output, earlier blocks hand their input through, finished
projectors return their stored features, and the step in question records how it was called and
stops the run. What is stored per batch is one hidden state and the projectors' outputs, whatever
the number of blocks.

A *call* is one pass of one batch through a tower. A batch passes the vision tower once for its
images and once for its videos, and the language model once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prismquant.data.batches import Batch
from prismquant.engine.activation_store import ActivationStore, InMemory
from prismquant.engine.calls import StepCall, TowerPass, tokens_by_kind
from prismquant.engine.captured_call import captured_call, llm_blocks, llm_root
from prismquant.engine.shortcuts import Shortcuts
from prismquant.engine.stand_ins import (
    Captured,
    capture_here,
    chain_link,
    first_tensor,
    replaced_forwards,
)
from prismquant.engine.token_tables import Lookups
from prismquant.engine.vision_passes import vision_passes, without_pixels, zeros_like
from prismquant.errors import ModelError, NumericsError
from prismquant.models.arch import Modality
from prismquant.models.bound import BoundModel, BoundStep
from prismquant.numerics.finite import all_finite, finiteness


class Replay:
    """Feeds the steps of a model, in the order in which the model runs them.

    Args:
        model: Parameters may be on the meta device; those of the step that is run, and of the
            modules between the steps, must be real by then.
        bound: Its description.
        batches: Calibration batches. Pixels of each are asked for when it passes the entry step,
            and let go as soon as it has.
        device: Where steps run.
        dtype: Floating-point inputs are cast to it.
        states: Where states wait between steps; on the device by default.
        keep_all: Keep the outputs of all units, to go back through them.
    """

    def __init__(
        self,
        model: nn.Module,
        bound: BoundModel,
        batches: Sequence[Batch],
        *,
        device: torch.device,
        dtype: torch.dtype,
        states: ActivationStore | None = None,
        keep_all: bool = False,
    ) -> None:
        self.model = model
        self.bound = bound
        self._states = states or InMemory()
        self._zero = torch.zeros(1, device=device, dtype=dtype)
        arch = bound.arch
        self._batches = [without_pixels(batch, arch, device, dtype) for batch in batches]
        self._vision_tokens = [batch.vision_mask.reshape(-1).to(device) for batch in batches]
        self._vision = [
            vision_passes(inputs, batch, number, arch, dtype)
            for number, (inputs, batch) in enumerate(zip(self._batches, batches, strict=True))
        ]
        self._llm: list[TowerPass] = []
        self._ids = [batch.ids for batch in batches]
        self._keep_all = keep_all
        self._shortcuts = Shortcuts(bound, self._zero)
        self._steps = {step.name: step for step in bound.steps}

    def vision_steps(self) -> list[BoundStep]:
        """Steps of the vision tower and the projectors in the order in which the model runs them.

        Empty without any image or video among the batches. The entry step and the modules between
        the steps must be real.
        """
        first = next((p for passes in self._vision for p in passes), None)
        if first is None:
            return []
        return self._shortcuts.vision_steps(self.model, first.whole_inputs())

    def token_ids(self) -> Tensor:
        """All token ids among the batches, sorted, int64 [n]."""
        ids = [inputs["input_ids"].flatten() for inputs in self._batches]
        unique: Tensor = torch.cat(ids).unique() if ids else torch.empty(0, dtype=torch.int64)
        return unique.to(self._zero.device)

    def begin_llm(self, tables: Lookups) -> None:
        """Compute what the language model is given, and forget the vision tower's states.

        All vision steps must be finished. Where all outputs are kept, nothing is forgotten.

        Args:
            tables: In place of the model's embeddings, and of other tables of tokens, by their
                paths: from ids [B, T] to [B, T, features].
        """
        root = llm_root(self.bound.arch)
        known = {**tables, root: capture_here}
        for inputs, passes, vision, ids in zip(
            self._batches, self._vision, self._vision_tokens, self._ids, strict=True
        ):
            seen = with_glances(inputs, passes)
            captured = self._capture(seen, self._vision_stand_ins(passes) | known)
            mask = inputs.get("attention_mask")
            weights = None if mask is None else mask.reshape(-1).to(torch.float32)
            video = self._of_videos(inputs["input_ids"].reshape(-1)) & vision
            tokens = tokens_by_kind(vision, video, weights)
            if captured.args_of_step:
                raise ModelError(
                    "the language model is called with positional arguments",
                    where=self.bound.arch.name,
                )
            given = captured.kwargs_of_step
            if given.get("inputs_embeds") is None:
                # Of a model of text alone, this tower itself looks up the embeddings.
                embed = tables[self.bound.arch.embeddings]
                given |= {"input_ids": None, "inputs_embeds": embed(inputs["input_ids"])}
            kept, number = self._states.keep(given), len(self._llm)
            self._llm.append(TowerPass(kept, weights, vision, video, tokens, batch=number, ids=ids))
        if not self._keep_all:
            self._vision.clear()
            self._batches.clear()

    def _of_videos(self, ids: Tensor) -> Tensor:
        """Marks of tokens that stand for a video by their ids, bool ``[tokens]``."""
        keys = zip(self.bound.arch.vision_token_ids, self.bound.vision_token_ids, strict=True)
        return torch.isin(ids, ids.new_tensor([i for key, i in keys if "video" in key]))

    def calls(self, step: BoundStep) -> Iterator[StepCall]:
        """Calls of ``step`` by the model, pass by pass; all steps before it must be finished."""
        if step.kind == "head":
            yield from map(self._head_call, self._llm)
        elif step.modality is Modality.LLM:
            root = self.model.get_submodule(llm_root(self.bound.arch))
            for state in self._llm:
                stand_ins = self._chain_stand_ins(state) | {step.name: capture_here}
                captured = self._capture(state.inputs(), stand_ins, root)
                yield self._step_call(step, state, captured, [])
        else:
            for passes in self._vision:
                for state in passes:
                    stand_ins = self._vision_stand_ins([state]) | {step.name: capture_here}
                    whole = step.kind == "entry"
                    inputs = state.whole_inputs() if whole else state.later_inputs()
                    captured = self._capture(inputs, stand_ins)
                    given = [inputs] * whole
                    # Its pixels must be gone before the next ones are made.
                    del inputs
                    yield self._step_call(step, state, captured, given)
                    del captured, given

    def fork(self, batches: Sequence[int] | None = None) -> Replay:
        """Another replay that goes on from here by itself.

        Args:
            batches: Numbers of the batches that it is of; None: all.
        """
        own = range(len(self._ids)) if batches is None else batches
        other = copy.copy(self)
        other._batches = [self._batches[number] for number in own if self._batches]
        vision = [self._vision[number] for number in own if self._vision]
        other._vision = [[state.copied() for state in passes] for passes in vision]
        other._llm = [self._llm[number].copied() for number in own if self._llm]
        other._vision_tokens = [self._vision_tokens[number] for number in own]
        other._ids = [self._ids[number] for number in own]
        return other

    def seen_by_vision(self) -> list[int]:
        """Numbers of the batches with pictures or clips; the language model must not have begun."""
        return [number for number, passes in enumerate(self._vision) if passes]

    def last_hidden(self, batch: int, tables: Lookups) -> Tensor:
        """Input of the head for a batch, by the model's own forward from where it is.

        All units that are not finished, and the modules between units, must be real.

        Args:
            batch: Number of the batch.
            tables: As those of :meth:`begin_llm`.

        Returns:
            ``[B, T, hidden]``.
        """
        passes = [self._llm[batch]] if self._llm else self._vision[batch]
        latest = self._steps.get(passes[0].latest) if passes else None
        done = -1 if latest is None or latest.kind == "entry" else latest.index
        later = {s.name for s in self.bound.steps if s.kind == "block" and s.index > done}
        known = self._chain_stand_ins(passes[0]) if self._llm else self._vision_stand_ins(passes)
        known = {name: forward for name, forward in known.items() if name not in later}
        if self._llm:
            with replaced_forwards(self.model, known):
                output = self.model.get_submodule(llm_root(self.bound.arch))(**passes[0].inputs())
            hidden: Tensor = output.last_hidden_state
            return hidden
        inputs = dict(self._batches[batch])
        for state in passes:
            inputs |= state.pixels() if state.pixels else {}
        known |= {**tables, self.bound.arch.head: capture_here}
        captured = self._capture(inputs, known)
        return first_tensor((*captured.args_of_step, *captured.kwargs_of_step.values()))

    def _head_call(self, state: TowerPass) -> StepCall:
        root = self.model.get_submodule(llm_root(self.bound.arch))
        with replaced_forwards(self.model, self._chain_stand_ins(state)):
            output = root(**state.inputs())
        return StepCall(
            (output.last_hidden_state,),
            {},
            state.row_weights,
            state.vision,
            lambda _: None,
            state.tokens,
            ids=state.ids,
            batch=state.batch,
            video=state.video,
        )

    def _step_call(
        self,
        step: BoundStep,
        state: TowerPass,
        captured: Captured,
        whole: list[dict[str, Any]],
    ) -> StepCall:
        """A call, as the model makes it.

        Args:
            step: The unit.
            state: The pass.
            captured: How it is called.
            whole: The model's inputs with pixels, at the entry unit; they are taken out.
        """

        dictionaries = {
            key: value
            for key, value in captured.kwargs_of_step.items()
            if isinstance(value, MutableMapping)
        }

        def keep(output: Any) -> None:
            values = output if isinstance(output, Tensor) else output[0]
            if not all_finite(values):
                raise NumericsError(
                    f"the output holds {finiteness(values)}",
                    where=step.name,
                    remedy="check the source weights and the calibration samples; "
                    "float16 overflow is cured by running in float32",
                )
            self._keep_written(step, state, dictionaries)
            if self._keep_all:
                state.before[step.name] = state.latest
            kept = self._states.keep(output)
            if step.kind == "projector":
                state.features[step.name] = kept
            else:
                self._shortcuts.note_output(step, output)
                if step.kind == "entry":
                    state.entry_zeros = zeros_like(output)
                    state.glance = self._shortcuts.glance(self.model, step, state, whole.pop())
                    state.pixels = state.pixels if self._keep_all else None
                elif step.modality is Modality.LLM and not state.latest and not self._keep_all:
                    lighter = self._shortcuts.without_embeddings(self.model, state.inputs())
                    state.inputs = self._states.keep(lighter)
                state.latest, state.hidden = step.name, kept
            self._keep_tapped(step, state, kept)

        return StepCall(
            captured.args_of_step,
            captured.kwargs_of_step,
            state.row_weights,
            state.vision,
            keep,
            state.tokens,
            state.kind,
            state.ids,
            state.batch,
            state.video,
        )

    def _keep_written(
        self, step: BoundStep, state: TowerPass, given: Mapping[str, MutableMapping[Any, Any]]
    ) -> None:
        """Keep what a step has written into dictionaries for later ones."""
        for key, entries in given.items():
            known = state.written.get(key, {})
            new = {entry: value for entry, value in entries.items() if entry not in known}
            if new and self._keep_all:
                raise ModelError(
                    f"{step.name} hands {key} on to later blocks beside its output, and no "
                    "gradient is brought back that way",
                    where=self.bound.arch.name,
                    remedy="choose a score that needs no gradients, such as kl_div",
                )
            for entry, value in new.items():
                state.written.setdefault(key, {})[entry] = self._states.keep(value)

    def _keep_tapped(self, step: BoundStep, state: TowerPass, kept: Callable[[], Any]) -> None:
        """Keep the output of a unit that later ones look back at, and no longer than for these."""
        taps = self._shortcuts.taps
        if step.kind != "projector" and (self._keep_all or step.name in taps):
            state.finished[step.name] = kept
        if not self._keep_all:
            for name in [name for name, reader in taps.items() if reader == step.name]:
                state.finished.pop(name, None)

    def _vision_stand_ins(self, passes: Sequence[TowerPass]) -> dict[str, Callable[..., Any]]:
        """Stand-ins for finished vision steps; the passes follow each other within one forward."""
        queue = list(passes)
        current: list[TowerPass] = queue[:1]

        def entry(name: str) -> Callable[..., Any]:
            def stand_in(*_: Any, **__: Any) -> Any:
                state = queue.pop(0)
                current[:] = [state]
                if state.latest == name:
                    return state.hidden()
                kept = state.finished.get(name) if name in self._shortcuts.taps else None
                return state.entry_zeros if kept is None else kept()

            return stand_in

        stand_ins: dict[str, Callable[..., Any]] = {}
        for step in self.bound.steps:
            if step.modality is Modality.LLM or not queue:
                continue
            if step.kind == "projector":
                if all(step.name in state.features for state in passes):
                    stand_ins[step.name] = lambda *_, _n=step.name, **__: current[0].features[_n]()
            elif step.kind == "entry":
                if all(state.latest for state in passes):
                    stand_ins[step.name] = entry(step.name)
            else:
                stand_ins[step.name] = self._link(step.name, lambda: current[0])
        return stand_ins

    def _chain_stand_ins(self, state: TowerPass) -> dict[str, Callable[..., Any]]:
        return {name: self._link(name, lambda: state) for name in llm_blocks(self.bound)}

    def _link(self, name: str, state: Callable[[], TowerPass]) -> Callable[..., Any]:
        """Stand-in for a step of a chain."""
        tapped, length = name in self._shortcuts.taps, self._shortcuts.lengths.get(name)
        return chain_link(name, state, tapped=tapped, length=length)

    def _capture(
        self,
        inputs: dict[str, Any],
        stand_ins: dict[str, Callable[..., Any]],
        root: nn.Module | None = None,
    ) -> Captured:
        return captured_call(self.model, self.bound.arch, inputs, stand_ins, root)


def with_glances(inputs: dict[str, Any], passes: Sequence[TowerPass]) -> dict[str, Any]:
    """A batch's inputs, with what of its pixels the code between units looks at."""
    for state in passes:
        inputs = inputs | (state.glance() if state.glance else {})
    return inputs
