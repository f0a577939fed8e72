"""A model of which one step at a time is there, and the states that wait between its steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from prismquant.data.batches import Batch
from prismquant.engine.job import Run
from prismquant.engine.memory_forecast import narrow_modules
from prismquant.engine.passes import Passes, PausedPasses, ReplayedPasses, StepRun
from prismquant.engine.replay import Replay, StepCall
from prismquant.errors import NumericsError
from prismquant.models.arch import Modality
from prismquant.models.attention import unhook_attention
from prismquant.models.bound import BoundModel, BoundStep
from prismquant.models.empty import empty_model
from prismquant.models.load import materialize, release
from prismquant.models.rotation import RotatedReader
from prismquant.plan.plan import Plan
from prismquant.runtime.kv_cache import cache_in_float
from prismquant.runtime.quant_linear import QuantLinear, activations_in_float, rotate_inputs
from prismquant.storage import ShardReader


def source_reader(plan: Plan, bound: BoundModel) -> ShardReader:
    """The checkpoint as the run sees it: rotated, where the plan says so."""
    if not plan.rotations:
        return ShardReader(bound.folder)
    exact = {f"{row.site.name}.weight" for row in plan.quantized}
    return RotatedReader(bound.folder, bound, plan.rotations, exact)


class Chain:
    """A model's skeleton, of which single steps are loaded, and the states between its steps."""

    def __init__(self, job: Run, reader: ShardReader, batches: Sequence[Batch]) -> None:
        self.job = job
        self.reader = reader
        self.model = empty_model(job.bound.config, job.bound.arch)
        self.replay = (
            Replay(
                self.model,
                job.bound,
                batches,
                device=job.device,
                dtype=job.precision.dtype,
                states=job.states,
            )
            if job.plan.needs_data
            else None
        )
        self._narrow = {step.name: narrow_modules(job.bound, step) for step in job.bound.steps}
        self._online = {row.site.name: row.online for row in job.plan.rows if row.online}

    def module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def calls(self, step: BoundStep) -> Iterator[StepCall]:
        if self.replay is None:
            raise NumericsError(
                "a layer needs calibration data but none passes it", where=step.name
            )
        return self.replay.calls(step)

    def passes(self, step: BoundStep, *, paused: bool = False) -> Passes:
        """Forward passes of the step over all calls."""
        run = StepRun(
            self.model,
            step.name,
            lambda: self.calls(step),
            lambda: self.as_asked(step),
        )
        return PausedPasses(run) if paused else ReplayedPasses(run)

    @contextlib.contextmanager
    def as_asked(self, step: BoundStep) -> Iterator[None]:
        """The step in the precision of the run; inputs of solved layers, keys and values as they
        will be served, or in float where the plan says so."""
        module = self.module(step.name)
        with contextlib.ExitStack() as stack:
            narrow = [self.module(name) for name in self._narrow[step.name]]
            stack.enter_context(self.job.precision.in_force(narrow))
            if not self.job.plan.calibration.quantized_inputs:
                stack.enter_context(activations_in_float(module))
                stack.enter_context(cache_in_float(module))
            yield

    @contextlib.contextmanager
    def loaded(self, names: Sequence[str]) -> Iterator[None]:
        """Within the block, these modules have their weights, and rotate what they must."""
        job = self.job
        for name in names:
            materialize(
                self.model, name, self.reader, job.bound.names, job.device, job.precision.dtype
            )
            for layer, online in self._online.items():
                if layer == name or layer.startswith(f"{name}."):
                    rotate_inputs(self.model, layer, online.block, online.signs)
        try:
            yield
        finally:
            for name in names:
                release(self.model, name)
                unhook_attention(self.model.get_submodule(name))
                _make_plain(self.model, name)

    def embedding(self) -> Callable[[Tensor], Tensor]:
        """The token embeddings, of the tokens in the batches: the whole table is far larger."""
        if self.replay is None:
            raise NumericsError("there is no calibration data to embed")
        ids = self.replay.token_ids()
        job, name = self.job, f"{self.job.bound.arch.embeddings}.weight"
        rows = self.reader.read_rows(job.bound.names.to_disk(name), ids.cpu())
        rows = rows.to(job.device, job.precision.dtype)
        return lambda tokens: functional.embedding(torch.searchsorted(ids, tokens), rows)

    def between_steps(self, *, vision: bool) -> list[str]:
        """Modules that hold parameters outside all steps, such as norms between towers."""
        steps = [step.name for step in self.job.bound.steps]
        roots = [
            t.root for t in self.job.bound.arch.towers if t.modality is not Modality.LLM and t.root
        ]
        names = []
        for name, _ in self.model.named_parameters():
            owner = name.rpartition(".")[0]
            inside = any(owner == s or owner.startswith(f"{s}.") for s in steps)
            inside |= owner == self.job.bound.arch.embeddings
            of_vision = any(owner.startswith(f"{root}.") for root in roots)
            if not inside and of_vision == vision and owner not in names:
                names.append(owner)
        return names


def _make_plain(model: nn.Module, name: str) -> None:
    """Turn a released step's quantized layers back into plain ones: their work is done."""
    for path, module in list(model.get_submodule(name).named_modules(prefix=name)):
        if isinstance(module, QuantLinear):
            parent, _, child = path.rpartition(".")
            with torch.device("meta"):
                plain = nn.Linear(
                    module.in_features,
                    module.out_features,
                    module.bias is not None,
                    dtype=module.weight.dtype,
                )
            setattr(model.get_submodule(parent), child, plain.requires_grad_(False))
