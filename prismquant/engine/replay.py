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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prismquant.data.batches import Batch
from prismquant.engine.activation_store import ActivationStore, InMemory
from prismquant.engine.calls import StepCall, TowerPass, tokens_by_kind
from prismquant.engine.stand_ins import (
    Captured,
    capture_here,
    chain_link,
    first_tensor,
    no_embedding,
    replaced_forwards,
)
from prismquant.errors import ModelError, NumericsError, PrismQuantError, brief
from prismquant.memory import memory_error
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
        self._device, self._dtype = device, dtype
        self._batches = [self._without_pixels(batch) for batch in batches]
        self._vision_tokens = [batch.vision_mask.reshape(-1).to(device) for batch in batches]
        self._vision = [
            self._vision_passes(inputs, batch, number)
            for number, (inputs, batch) in enumerate(zip(self._batches, batches, strict=True))
        ]
        self._llm: list[TowerPass] = []
        self._ids = [batch.ids for batch in batches]
        self._keep_all = keep_all
        self._steps = {step.name: step for step in bound.steps}

    def vision_steps(self) -> list[BoundStep]:
        """Steps of the vision tower and the projectors in the order in which the model runs them.

        Empty without any image or video among the batches. The entry step and the modules between
        the steps must be real.
        """
        first = next((p for passes in self._vision for p in passes), None)
        if first is None:
            return []
        steps = [s for s in self.bound.steps if s.modality is not Modality.LLM]
        order: list[BoundStep] = []

        def visit(step: BoundStep) -> Callable[..., Any]:
            module = self.model.get_submodule(step.name)
            forward = module.forward

            def stand_in(*args: Any, **kwargs: Any) -> Any:
                order.append(step)
                if len(order) == len(steps):
                    raise Captured(args, kwargs)
                return forward(*args, **kwargs) if step.kind == "entry" else args[0]

            return stand_in

        self._capture(first.whole_inputs(), {s.name: visit(s) for s in steps})
        return order

    def token_ids(self) -> Tensor:
        """All token ids among the batches, sorted, int64 [n]."""
        ids = [inputs["input_ids"].flatten() for inputs in self._batches]
        unique: Tensor = torch.cat(ids).unique() if ids else torch.empty(0, dtype=torch.int64)
        return unique.to(self._device)

    def begin_llm(self, embed: Callable[[Tensor], Tensor]) -> None:
        """Compute what the language model is given, and forget the vision tower's states.

        All vision steps must be finished. Where all outputs are kept, nothing is forgotten.

        Args:
            embed: In place of the model's embeddings, from ids [B, T] to [B, T, hidden].
        """
        root = self._llm_root()
        known = {self.bound.arch.embeddings: embed, root: capture_here}
        for inputs, passes, vision, ids in zip(
            self._batches, self._vision, self._vision_tokens, self._ids, strict=True
        ):
            captured = self._capture(inputs, self._vision_stand_ins(passes) | known)
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
            root = self.model.get_submodule(self._llm_root())
            for state in self._llm:
                stand_ins = self._chain_stand_ins(state) | {step.name: capture_here}
                captured = self._capture(state.inputs(), stand_ins, root)
                yield self._step_call(step, state, captured)
        else:
            for passes in self._vision:
                for state in passes:
                    stand_ins = self._vision_stand_ins([state]) | {step.name: capture_here}
                    whole = step.kind == "entry"
                    inputs = state.whole_inputs() if whole else state.inputs()
                    captured = self._capture(inputs, stand_ins)
                    # Its pixels must be gone before the next ones are made.
                    del inputs
                    yield self._step_call(step, state, captured)
                    del captured

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

    def last_hidden(self, batch: int, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Input of the head for a batch, by the model's own forward from where it is.

        All units that are not finished, and the modules between units, must be real.

        Args:
            batch: Number of the batch.
            embed: As that of :meth:`begin_llm`.

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
                output = self.model.get_submodule(self._llm_root())(**passes[0].inputs())
            hidden: Tensor = output.last_hidden_state
            return hidden
        inputs = dict(self._batches[batch])
        for state in passes:
            inputs |= state.pixels() if state.pixels else {}
        known |= {self.bound.arch.embeddings: embed, self.bound.arch.head: capture_here}
        captured = self._capture(inputs, known)
        return first_tensor((*captured.args_of_step, *captured.kwargs_of_step.values()))

    def _without_pixels(self, batch: Batch) -> dict[str, Any]:
        """A batch's inputs on the device; of pixels only the shape, which takes no memory."""
        pixels = {group[0] for group in self.bound.arch.input_groups}
        return {
            key: _moved(value.new_zeros(1), self._device, self._dtype).expand(value.shape)
            if key in pixels
            else _moved(value, self._device, self._dtype)
            for key, value in batch.inputs.items()
        }

    def _vision_passes(self, inputs: dict[str, Any], batch: Batch, number: int) -> list[TowerPass]:
        """One pass for each group of vision inputs that the batch has, e.g. images, then videos."""
        groups = self.bound.arch.input_groups
        vision_keys = {key for group in groups for key in group} | {*self.bound.arch.audio_inputs}
        device, dtype = self._device, self._dtype

        def of_group(group: Sequence[str]) -> dict[str, Any]:
            return {k: v for k, v in inputs.items() if k not in vision_keys or k in group}

        def pixels(key: str) -> dict[str, Tensor]:
            return {key: _moved(batch.whole().inputs[key], device, dtype)}

        return [
            TowerPass(
                partial(of_group, group),
                None,
                kind="video" if "video" in group[0] else "image",
                batch=number,
                pixels=partial(pixels, group[0]),
            )
            for group in groups
            if inputs.get(group[0]) is not None
        ]

    def _head_call(self, state: TowerPass) -> StepCall:
        root = self.model.get_submodule(self._llm_root())
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

    def _step_call(self, step: BoundStep, state: TowerPass, captured: Captured) -> StepCall:
        def keep(output: Any) -> None:
            values = output if isinstance(output, Tensor) else output[0]
            if not all_finite(values):
                raise NumericsError(
                    f"the output holds {finiteness(values)}",
                    where=step.name,
                    remedy="check the source weights and the calibration samples; "
                    "float16 overflow is cured by running in float32",
                )
            if self._keep_all:
                state.before[step.name] = state.latest
            if step.kind == "projector":
                state.features[step.name] = self._states.keep(output)
                return
            if step.kind == "entry":
                state.entry_shape = values.shape
                state.pixels = state.pixels if self._keep_all else None
            if step.modality is Modality.LLM and not state.latest and not self._keep_all:
                # From now on only its shape is looked at.
                inputs = state.inputs()
                hollow = {"inputs_embeds": _hollow(inputs["inputs_embeds"])}
                state.inputs = self._states.keep(inputs | hollow)
            state.latest, state.hidden = step.name, self._states.keep(output)
            if self._keep_all:
                state.finished[step.name] = state.hidden

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

    def _vision_stand_ins(self, passes: Sequence[TowerPass]) -> dict[str, Callable[..., Any]]:
        """Stand-ins for finished vision steps; the passes follow each other within one forward."""
        queue = list(passes)
        current: list[TowerPass] = queue[:1]

        def entry(*args: Any, **_: Any) -> Any:
            state = queue.pop(0)
            current[:] = [state]
            if state.latest in self._steps and self._steps[state.latest].kind == "entry":
                return state.hidden()
            return first_tensor(args).new_zeros(1).expand(state.entry_shape)

        stand_ins: dict[str, Callable[..., Any]] = {}
        for step in self.bound.steps:
            if step.modality is Modality.LLM or not queue:
                continue
            if step.kind == "projector":
                if all(step.name in state.features for state in passes):
                    stand_ins[step.name] = lambda *_, _n=step.name, **__: current[0].features[_n]()
            elif step.kind == "entry":
                if all(state.latest for state in passes):
                    stand_ins[step.name] = entry
            else:
                stand_ins[step.name] = chain_link(step.name, lambda: current[0])
        return stand_ins

    def _chain_stand_ins(self, state: TowerPass) -> dict[str, Callable[..., Any]]:
        return {
            step.name: chain_link(step.name, lambda: state)
            for step in self.bound.steps
            if step.modality is Modality.LLM and step.kind == "block"
        }

    def _capture(
        self,
        inputs: dict[str, Any],
        stand_ins: dict[str, Callable[..., Any]],
        root: nn.Module | None = None,
    ) -> Captured:
        name = self.bound.arch.embeddings
        table = self.model.get_parameter(f"{name}.weight")
        if table.is_meta:
            # In the vision tower's turn, text embeddings are computed first and then not used.
            stand_ins = {name: no_embedding(table)} | stand_ins
        try:
            with replaced_forwards(self.model, stand_ins):
                if root is None:
                    self.model(**inputs, use_cache=False)
                else:
                    root(**inputs)
        except Captured as captured:
            # Its frames would hold this pass, and what waits for it, until the next collection.
            return captured.with_traceback(None)
        except Exception as error:
            if isinstance(error, PrismQuantError | OSError) or memory_error(error) is not None:
                raise
            raise ModelError(
                f"the model's own code fails between its steps: {brief(error)}",
                where=self.bound.arch.name,
                remedy="restore config.json and the processor's files from the original checkpoint",
            ) from error
        raise ModelError(
            "the model's forward pass ended without running the expected step",
            where=self.bound.arch.name,
            remedy="the architecture file names a module that this model does not call",
        )

    def _llm_root(self) -> str:
        return next(t.root for t in self.bound.arch.towers if t.modality is Modality.LLM)


def _hollow(x: Tensor) -> Tensor:
    """Zeros of the same shape that take no memory."""
    return x.new_zeros(1).expand(x.shape)


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)
