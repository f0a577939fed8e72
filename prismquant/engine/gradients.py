"""Weights of vision tokens in each layer of the language model, told by gradients.

Statistics of a layer sum squared errors over tokens, and a picture has many more tokens than the
question about it. How much an error at a token matters is told by the answer: MBQ (Li et al., CVPR
2025, arXiv 2412.19509) weighs absolute errors at vision tokens by the ratio of mean absolute
gradients of the answer's cross-entropy, vision over text. Here errors are squared, and so are
gradients: an error ``d`` of a layer's output changes the loss by ``g . d`` in first order. For
errors without a preferred direction, independent from token to token, the expected square of that
change is the sum over tokens of ``mean(g^2) |d|^2``. One number for each class of tokens is the
mean over its tokens.

Squared gradients differ from sample to sample by orders of magnitude, as the model is sure of one
answer and not of another, so that a plain mean would be that of its one or two worst samples. Each
sample is therefore scaled, at each layer, to a mean squared gradient of one over its tokens: all
have the same say, as they have in the statistics.

All layers that read the same input share one Hessian, so they share one weight, from the gradients
of all their outputs. It describes the model and the data: the model as it is in the checkpoint, and
all its layers, whatever the recipe does to them.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prismquant.data import Sample, balanced_subset, media_of
from prismquant.data.batches import Batch
from prismquant.engine.activation_store import ActivationStore
from prismquant.engine.calls import Gradients
from prismquant.engine.graph_replay import GraphCall
from prismquant.engine.placement import Placement
from prismquant.engine.visit import Visit
from prismquant.engine.walk import ModelWalk, Unit
from prismquant.errors import DataError, NumericsError, PrismQuantError
from prismquant.memory import keep_heap_compact
from prismquant.models.arch import Modality
from prismquant.models.bound import BoundModel, BoundSite
from prismquant.plan.plan import Plan
from prismquant.runtime.mixed import Precision
from prismquant.shards import ShardReader

# Enough for a standard error of about a quarter of a ratio, as measured on the demo model.
GRADIENT_SAMPLES = 32


def wants_gradients(plan: Plan) -> bool:
    """Whether some statistics of the plan weigh vision tokens by gradients."""
    moved = {edge.edge.consumers[0] for edge in plan.edges}
    hungry = {
        row.site.name
        for row in plan.quantized
        if row.config.needs_hessian or row.config.correction is not None
    }
    return bool(_asking(plan) & (moved | hungry))


def gradient_samples(
    samples: Sequence[Sample], seed: int = 0, limit: int = GRADIENT_SAMPLES
) -> tuple[Sample, ...]:
    """The samples whose gradients are taken: with a picture or a clip and an answer.

    Args:
        samples: The calibration samples.
        seed: Chooses among them.
        limit: At most so many, images and videos as even as they can be.

    Returns:
        Nothing where no sample shows a picture or a clip: there is nothing to weigh.

    Raises:
        DataError: No sample with a picture or a clip has an answer.
    """
    seeing = [sample for sample in samples if any(media_of(sample))]
    answered = [sample for sample in seeing if sample.answer is not None]
    if seeing and not answered:
        raise _no_answers()
    return balanced_subset(answered, limit, seed)


def vision_weights(
    plan: Plan,
    bound: BoundModel,
    batches: Sequence[Batch],
    placement: Placement | None = None,
    store: ActivationStore | None = None,
) -> dict[str, float]:
    """Weight of a vision token at each layer whose plan says ``gradient``.

    The floating-point model is walked through forth and back, one unit in memory at a time. Each
    weight is at least the median over the blocks, as in MBQ: where vision tokens have little or no
    influence of their own, as in the last block, they still keep the statistics from resting on a
    few text tokens.

    Args:
        plan: Says which layers ask.
        bound: The model.
        batches: Samples with answers; those of one row each need the least memory.
        placement: Where units run, and in which dtype. float16, in which gradients vanish, is
            replaced by bfloat16; products are not narrowed.
        store: Keeps the outputs of all units of the language model until their turn comes back.

    Returns:
        Weight by the layer's name; empty without batches.

    Raises:
        DataError: No vision token stands in a row with an answer.
        NumericsError: The loss or a gradient is not finite.
        PrismQuantError: A unit does not fit on the device.
    """
    if not batches:
        return {}
    keep_heap_compact()
    placement = placement or Placement()
    dtype = placement.precision.dtype
    precision = Precision(torch.bfloat16 if dtype is torch.float16 else dtype)
    try:
        reader, where = bound.shards(), replace(placement, precision=precision)
        ratios = gradient_ratios(bound, reader, batches, where, store)
    except torch.OutOfMemoryError as error:
        raise PrismQuantError(
            f"a backward pass through one block does not fit on {placement.device}",
            where=str(bound.folder),
            remedy="give `vision_weight` a number, or run with --device cpu",
        ) from error
    weights = floored(ratios, bound)
    asking = _asking(plan)
    return {s.name: weights[s.input_key] for s in _sites(bound) if s.name in asking}


def gradient_ratios(
    bound: BoundModel,
    reader: ShardReader,
    batches: Sequence[Batch],
    placement: Placement | None = None,
    store: ActivationStore | None = None,
) -> dict[str, float]:
    """Mean squared gradient at vision tokens over that at text tokens, of all LLM layers.

    The loss is the cross-entropy summed over all answer tokens, so that the rows of a batch do not
    touch one another. Padding is left out, and so are rows without an answer or without vision
    tokens. A row's mean is one over all its tokens of a class and all outputs of the layers that
    read the same input; rows are scaled to one another before the ratio is taken.

    Args:
        bound: The model.
        reader: Gives its weights.
        batches: Samples with answers.
        placement: Where units run.
        store: Keeps the outputs of all units of the language model until their turn comes back.

    Returns:
        Ratio by the input's key; 1 where text tokens have no gradient to compare with.

    Raises:
        DataError: No vision token stands in a row with an answer.
        NumericsError: The loss or a gradient is not finite; names the samples and the layer.
    """
    counted = [(batch, places) for batch in batches if (places := _places(batch)) is not None]
    if not counted:
        raise _no_answers()
    sites = _sites(bound)
    visit = Visit(layers=[site.name for site in sites], backward=True)
    walk = ModelWalk(
        bound, reader, [batch for batch, _ in counted], placement, visit=visit, store=store
    )
    sums = {site.input_key: torch.zeros(2, dtype=torch.float64) for site in sites}
    with contextlib.closing(walk.units()) as units:
        for unit in units:
            with unit.loaded(), unit.as_served():
                if not unit.backward:
                    _forward(unit)
                    continue
                with torch.enable_grad():
                    for call in unit.graph_calls():
                        batch, places = counted[call.call.batch]
                        for key, rows in _squared_gradients(unit, call, batch, places).items():
                            sums[key] += _scaled_means(rows, places.tokens)
    means = {key: total.tolist() for key, total in sums.items()}
    return {key: vision / text if text else 1.0 for key, (text, vision) in means.items()}


@torch.no_grad()
def _forward(unit: Unit) -> None:
    """Hand a unit's outputs on; an error of numbers names the samples."""
    if not unit.carries:
        return
    for call in unit.calls():
        output = unit.module(*call.args, **call.kwargs)
        try:
            call.keep(output)
        except NumericsError as error:
            samples = f", samples {', '.join(call.ids)}" if call.ids else ""
            raise NumericsError(
                error.what,
                where=f"{error.where}{samples}",
                remedy="give `vision_weight` a number, or look for NaN in the checkpoint",
            ) from error
        del call, output


def floored(ratios: Mapping[str, float], bound: BoundModel) -> dict[str, float]:
    """Each ratio, but no less than the median over the blocks of those at the same place.

    Args:
        ratios: By the input's key.
        bound: The model.
    """
    # Where several layers read an input, any of their roles tells the place.
    places = {site.input_key: site.role for site in _sites(bound)}
    found: defaultdict[str, list[float]] = defaultdict(list)
    for key, ratio in ratios.items():
        found[places[key]].append(ratio)
    return {key: max(ratio, median(found[places[key]])) for key, ratio in ratios.items()}


@dataclass(frozen=True, eq=False)
class _Places:
    """Tokens of a batch by their class.

    Attributes:
        classes: Float64 [2, B, T] on the CPU: ones at text and at vision tokens of rows that count.
        predicting: Bool [B, T - 1]: places of these rows whose next token is of the answer.
        columns: Places at which any row has one, [C].
    """

    classes: Tensor
    predicting: Tensor
    columns: Tensor

    @property
    def tokens(self) -> Tensor:
        """Tokens of either class in each row, [2, B]."""
        return self.classes.sum(dim=2)


def _places(batch: Batch) -> _Places | None:
    """None where no row has both vision tokens and an answer."""
    attended = batch.attended
    vision = batch.vision_mask & attended
    predicting = batch.answer_mask[:, 1:] & attended[:, :-1] & attended[:, 1:]
    counts = vision.any(dim=1, keepdim=True) & predicting.any(dim=1, keepdim=True)
    if not counts.any():
        return None
    classes = torch.stack([attended & ~vision, vision]) & counts
    predicting = predicting & counts
    columns = predicting.any(dim=0).nonzero().flatten()
    return _Places(classes.double().cpu(), predicting.cpu(), columns.cpu())


def _squared_gradients(
    unit: Unit, call: GraphCall, batch: Batch, places: _Places
) -> dict[str, Tensor]:
    """Sums of squared gradients of the outputs of a unit's layers, by the input's key.

    Args:
        unit: The unit; loaded.
        call: One of its calls, which hands the gradients on.
        batch: The batch of that call.
        places: Which of its tokens are what.

    Returns:
        Float64 [2, B] on the CPU: text and vision tokens of each row, over all output channels.
    """
    outputs: dict[str, Tensor] = {}

    def watch(site: BoundSite) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            # The first layers' outputs are where the graph begins: no parameter asks for gradients.
            outputs[site.name] = output.requires_grad_(True)

        return hook

    with contextlib.ExitStack() as stack:
        for site in unit.layers:
            handle = unit.main.module(site.name).register_forward_hook(watch(site))
            stack.callback(handle.remove)
        if unit.step.kind == "head":
            value = _loss(unit.module, call.call.args[0], batch, places)
            arriving: Gradients = [torch.ones_like(value)]
        else:
            output = unit.module(*call.call.args, **call.call.kwargs)
            value, arriving = output if isinstance(output, Tensor) else output[0], call.arriving
        found = call.backward(value, arriving, list(outputs.values()))
    sums: dict[str, Tensor] = {}
    for name, gradients in zip(outputs, found, strict=True):
        site = unit.walk.bound.site(name)
        if gradients and gradients[0] is not None:
            rows = _row_sums(site, gradients[0], batch, places)
            sums[site.input_key] = sums.get(site.input_key, torch.zeros_like(rows)) + rows
    return sums


def _row_sums(site: BoundSite, gradient: Tensor, batch: Batch, places: _Places) -> Tensor:
    """Sums of a layer's squared gradients over text and over vision tokens of each row, [2, B]."""
    exact = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    squares = exact.square().sum(dim=-1).cpu().double()
    if not torch.isfinite(squares).all():
        raise NumericsError(
            "a gradient is NaN or infinite",
            where=f"output of {site.name}, samples {', '.join(batch.ids)}",
            remedy="give `vision_weight` a number, or run in float32",
        )
    classes = places.classes
    if squares.shape[1] < classes.shape[2]:
        # The head ran only where an answer is predicted; elsewhere its gradient is zero.
        classes = classes[:, :, places.columns]
    return (classes * squares).sum(dim=2)


def _loss(head: nn.Module, hidden: Tensor, batch: Batch, places: _Places) -> Tensor:
    """Cross-entropy summed over the answers of all rows that count, from the head's input."""
    here = hidden.device
    rows, slots = places.predicting[:, places.columns].nonzero(as_tuple=True)
    targets = batch.inputs["input_ids"].cpu()[rows, places.columns[slots] + 1]
    logits = head(hidden[:, places.columns.to(here)])
    picked = logits[rows.to(here), slots.to(here)]
    picked = picked.to(torch.promote_types(picked.dtype, torch.float32))
    loss = functional.cross_entropy(picked, targets.to(here), reduction="sum")
    if not math.isfinite(float(loss.detach())):
        raise NumericsError(
            "the model's cross-entropy is not finite",
            where=f"samples {', '.join(batch.ids)}",
            remedy="look for NaN in the checkpoint, or run in float32",
        )
    return loss


def _scaled_means(squares: Tensor, tokens: Tensor) -> Tensor:
    """Means over a row's tokens, the row scaled to a mean of one over both classes; summed, [2].

    Args:
        squares: Sums of squared gradients, [2, B].
        tokens: How many tokens of either class, [2, B]; both or none in each row.
    """
    whole = squares.sum(dim=0) / tokens.sum(dim=0)
    counts = whole > 0
    return (squares / tokens / whole)[:, counts].sum(dim=1)


def _sites(bound: BoundModel) -> list[BoundSite]:
    return [site for site in bound.sites if site.modality is Modality.LLM]


def _asking(plan: Plan) -> set[str]:
    """Names of the language model's layers that ask for a weight from gradients."""
    return {
        row.site.name
        for row in plan.rows
        if row.site.modality is Modality.LLM and row.config.vision_weight == "gradient"
    }


def _no_answers() -> DataError:
    return DataError(
        "`vision_weight: gradient` needs answers, and no sample with a picture or a clip has one",
        remedy="use samples that end with an assistant message, or give `vision_weight` a number",
    )
