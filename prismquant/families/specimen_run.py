"""A small model of a family at work: its logits, and how far other logits are from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prismquant.data.batches import Batch
from prismquant.models.bound import BoundModel

__all__ = ["TOLERANCE", "SpecimenRun", "largest_difference"]

# Of logits, relative to the largest. The arithmetic is float32; mistakes are larger by far.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class SpecimenRun:
    """The whole float model, and batches that it has seen.

    Attributes:
        bound: The model.
        model: With all its weights, float32.
        batches: By the kind of their samples.
        logits: Outputs of the head in the model's own forward, for the same batches.
    """

    bound: BoundModel
    model: nn.Module
    batches: Mapping[str, Batch]
    logits: Mapping[str, Tensor]

    @classmethod
    def of(cls, bound: BoundModel, model: nn.Module, batches: Mapping[str, Batch]) -> SpecimenRun:
        """Run the model on batches."""
        logits = {
            kind: head_outputs(model, bound.arch.head, batch) for kind, batch in batches.items()
        }
        return cls(bound, model, batches, logits)

    def difference(self, model: nn.Module | None = None) -> float:
        """Largest difference of a model's logits from those of before, over all kinds.

        Args:
            model: None: the model itself, as it is by now.
        """
        model, head = self.model if model is None else model, self.bound.arch.head
        return max(
            largest_difference(head_outputs(model, head, batch), self.logits[kind])
            for kind, batch in self.batches.items()
        )

    @contextlib.contextmanager
    def restored(self, names: Sequence[str]) -> Iterator[None]:
        """Afterwards, the modules with these names have the parameters that they have now."""
        modules = [self.model.get_submodule(name) for name in names]
        before = [dict(module.named_parameters(recurse=False)) for module in modules]
        try:
            yield
        finally:
            for module, parameters in zip(modules, before, strict=True):
                for leaf, parameter in parameters.items():
                    setattr(module, leaf, parameter)


@torch.no_grad()
def head_outputs(model: nn.Module, head: str, batch: Batch) -> Tensor:
    """Outputs of the head in the model's own forward, where tokens count.

    Some models bound what their head puts out before it is a logit; that is no unit's business.

    Returns:
        ``[places, vocabulary]``.
    """
    seen: list[Tensor] = []
    with model.get_submodule(head).register_forward_hook(lambda *call: seen.append(call[-1])):
        model(**batch.inputs, use_cache=False)
    [outputs] = seen
    return outputs[batch.attended]


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest number of the second."""
    if one.shape != other.shape or not bool(one.isfinite().all()):
        return float("inf")
    return float((one - other).abs().max() / other.abs().max())
