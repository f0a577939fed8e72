"""What a vision token counts for in each layer of the language model, told by gradients.

Statistics of a layer sum squared errors over tokens, and a picture has many more tokens than the
question about it. How much an error at a token matters is told by the answer: MBQ (Li et al., CVPR
2025) weighs absolute errors at vision tokens by the ratio of mean absolute gradients of the
answer's cross-entropy, vision over text. Here errors are squared, and so are gradients: an error
``d`` of a layer's output changes the loss by ``g . d`` in first order. For errors without a
preferred direction, independent from token to token, the expected square of that change is the sum
over tokens of ``mean(g^2) |d|^2``; to second order the Gauss-Newton matrix, whose diagonal is the
mean of ``g^2``, says the same. One number for each class of tokens is the mean over its tokens.

All layers that read the same input share one Hessian, so they share one weight, from the gradients
of all their outputs. It describes the model and the data: the model as it is in the checkpoint, and
all its layers, whatever the recipe does to them.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prismquant.errors import DataError, NumericsError, PrismQuantError
from prismquant.memory import keep_heap_compact
from prismquant.models.arch import Modality
from prismquant.models.bind import BoundModel, BoundSite
from prismquant.models.load import load_float
from prismquant.pipeline.batches import Batch
from prismquant.pipeline.data import Sample, balanced_subset, media_of
from prismquant.pipeline.plan import Plan

# A backward pass costs about three forward ones, and a mean over tokens settles early.
GRADIENT_SAMPLES = 16

_TEXT, _VISION = range(2)


def wants_gradients(plan: Plan) -> bool:
    """Whether some statistics of the plan weigh vision tokens by gradients."""
    moved = {edge.edge.consumers[0] for edge in plan.edges}
    hungry = {
        row.site.name for row in plan.quantized if row.needs_hessian or row.correction is not None
    }
    return bool(_asking(plan) & (moved | hungry))


def gradient_samples(
    samples: Sequence[Sample], seed: int = 0, limit: int = GRADIENT_SAMPLES
) -> tuple[Sample, ...]:
    """The samples whose gradients are taken: with an answer, spread over the kinds.

    Args:
        samples: The calibration samples.
        seed: Chooses among them.
        limit: At most so many.

    Returns:
        Nothing where no sample shows a picture or a clip: there is nothing to weigh.

    Raises:
        DataError: No sample with a picture or a clip has an answer.
    """
    seeing = [sample for sample in samples if any(media_of(sample))]
    if not seeing:
        return ()
    if all(sample.answer is None for sample in seeing):
        raise _no_answers()
    return balanced_subset([s for s in samples if s.answer is not None], limit, seed)


def vision_weights(
    plan: Plan,
    bound: BoundModel,
    batches: Sequence[Batch],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, float]:
    """What a vision token counts for at the layers whose plan says ``gradient``.

    The whole floating-point model is loaded, and freed on return. Each weight is at least the
    median over the blocks, as in MBQ: where vision tokens have little or no influence of their own,
    as in the last block, they still keep the statistics from resting on a few text tokens.

    Args:
        plan: Says which layers ask.
        bound: The model.
        batches: Samples with answers; those of one row each need the least memory.
        device: Where the model runs.
        dtype: In which it runs. float16, in which gradients vanish, is replaced by bfloat16.

    Returns:
        Weight by the layer's name; empty without batches.

    Raises:
        DataError: No vision token stands in a row with an answer.
        NumericsError: The loss or a gradient is not finite.
        PrismQuantError: The model does not fit on the device.
    """
    if not batches:
        return {}
    keep_heap_compact()
    arithmetic = torch.bfloat16 if dtype is torch.float16 else dtype
    try:
        model = load_float(bound.folder, arithmetic, device=device)
        ratios = gradient_ratios(model, bound, batches)
    except torch.OutOfMemoryError as error:
        raise PrismQuantError(
            f"a backward pass through the whole model does not fit on {device}",
            where=str(bound.folder),
            remedy="give `vision_weight` a number, or run with --device cpu",
        ) from error
    weights = floored(ratios, bound)
    asking = _asking(plan)
    return {s.name: weights[s.input_key] for s in _sites(bound) if s.name in asking}


def gradient_ratios(
    model: nn.Module, bound: BoundModel, batches: Sequence[Batch]
) -> dict[str, float]:
    """Mean squared gradient at vision tokens over that at text tokens, of all LLM layers.

    The loss is the cross-entropy summed over all answer tokens, so that the rows of a batch do not
    touch one another. Rows without an answer, and padding, are left out. The mean is one over all
    tokens of a class and all outputs of the layers that read the same input.

    Args:
        model: The whole model, with parameters that take no gradients.
        bound: Its description.
        batches: Samples with answers.

    Returns:
        Ratio by the input's key; 1 where text tokens have no gradient to compare with.

    Raises:
        DataError: No vision token stands in a row with an answer.
        NumericsError: The loss or a gradient is not finite; names the samples or the layer.
    """
    energy = _Energy()
    with _watching(model, _sites(bound), energy):
        for batch in batches:
            _differentiate(model, batch, energy)
    if not energy.tokens[_VISION]:
        raise _no_answers()
    return {key: energy.ratio(key) for key in dict.fromkeys(s.input_key for s in _sites(bound))}


def floored(ratios: Mapping[str, float], bound: BoundModel) -> dict[str, float]:
    """Each ratio, but no less than the median over the blocks of those at the same place.

    Args:
        ratios: By the input's key.
        bound: The model.
    """
    places = {site.input_key: site.role for site in reversed(_sites(bound))}
    floors: defaultdict[str, list[float]] = defaultdict(list)
    for key, ratio in ratios.items():
        floors[places[key]].append(ratio)
    return {key: max(ratio, median(floors[places[key]])) for key, ratio in ratios.items()}


@dataclass
class _Energy:
    """Sums of squared gradients, text and vision apart, in float64 on the CPU.

    Attributes:
        sums: [2], by the input's key.
        tokens: [2], tokens that were counted.
        classes: Float64 [2, B, T], ones at the tokens of either class in the batch at hand.
        columns: Positions of that batch that reach the head.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    classes: Tensor = field(default_factory=lambda: torch.zeros(2, 0, 0, dtype=torch.float64))
    columns: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def begin(self, batch: Batch, columns: Tensor) -> None:
        """Count the tokens of a batch, and remember which are which."""
        answered = batch.answer_mask.any(dim=1, keepdim=True)
        counted = batch.attended & answered
        text, vision = counted & ~batch.vision_mask, counted & batch.vision_mask
        self.classes = torch.stack([text, vision]).cpu().double()
        self.tokens += self.classes.sum(dim=(1, 2))
        self.columns = columns.cpu()

    def add(self, site: BoundSite, gradient: Tensor) -> None:
        """Take in the gradient of a layer's output, [B, T, out]."""
        exact = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        squares = exact.square().sum(dim=-1).cpu().double()
        # The head runs at the places that predict an answer; elsewhere its gradient is zero.
        classes = self.classes[:, :, self.columns] if site.role == "lm_head" else self.classes
        sums = (classes * squares.reshape(classes.shape[1:])).sum(dim=(1, 2))
        if not torch.isfinite(sums).all():
            raise NumericsError(
                "a gradient is NaN or infinite",
                where=f"output of {site.name}",
                remedy="give `vision_weight` a number, or run in float32",
            )
        self.sums[site.input_key] = self.sums.get(site.input_key, torch.zeros(2)) + sums

    def ratio(self, key: str) -> float:
        """Vision over text, of the means over tokens."""
        text, vision = (self.sums.get(key, torch.zeros(2)) / self.tokens).tolist()
        return vision / text if text else 1.0


@contextlib.contextmanager
def _watching(model: nn.Module, sites: Sequence[BoundSite], energy: _Energy) -> Iterator[None]:
    """Within the block, gradients of the layers' outputs are taken in and not kept."""

    def watch(site: BoundSite) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            # The first layers' outputs are where the graph begins: no parameter asks for gradients.
            output.requires_grad_(True)
            output.register_hook(lambda gradient: energy.add(site, gradient))

        return hook

    handles = [model.get_submodule(site.name).register_forward_hook(watch(site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _differentiate(model: nn.Module, batch: Batch, energy: _Energy) -> None:
    """One forward and backward pass of a batch's answers, with the hooks in place."""
    attended = batch.attended
    predicting = batch.answer_mask[:, 1:] & attended[:, :-1] & attended[:, 1:]
    columns = predicting.any(dim=0).nonzero().flatten()
    if not len(columns):
        return
    energy.begin(batch, columns)
    rows, slots = predicting[:, columns].nonzero(as_tuple=True)
    targets = batch.inputs["input_ids"][rows, columns[slots] + 1]
    here = next(model.parameters()).device
    inputs: dict[str, Any] = dict(batch.to(here).inputs)
    with torch.enable_grad():
        output = model(**inputs, use_cache=False, logits_to_keep=columns.to(here))
        picked = output.logits[rows.to(here), slots.to(here)]
        picked = picked.to(torch.promote_types(picked.dtype, torch.float32))
        loss = functional.cross_entropy(picked, targets.to(here), reduction="sum")
    if not math.isfinite(float(loss.detach())):
        raise NumericsError(
            "the model's cross-entropy is not finite",
            where=f"samples {', '.join(batch.ids)}",
            remedy="look for NaN in the checkpoint, or run in float32",
        )
    loss.backward()


def _sites(bound: BoundModel) -> list[BoundSite]:
    return [site for site in bound.sites if site.modality is Modality.LLM]


def _asking(plan: Plan) -> set[str]:
    """Names of the language model's layers that ask for a weight from gradients."""
    return {
        row.site.name
        for row in plan.rows
        if row.site.modality is Modality.LLM and row.vision_weight == "gradient"
    }


def _no_answers() -> DataError:
    return DataError(
        "`vision_weight: gradient` needs answers, and no sample with a picture or a clip has one",
        remedy="use samples that end with an assistant message, or give `vision_weight` a number",
    )
