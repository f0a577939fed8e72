"""Fidelity: how well a model answers, and how far it has moved from a reference.

One teacher-forced pass over a sample gives every number: the model reads question and right
answer, and its distribution before each token is looked at.

Exact match. The answer counts as right if the most probable token is the right one at every place
of the answer, its end-of-turn token included. That is what greedy decoding would yield: as long as
it agrees with the answer, it has read just what the teacher-forced pass reads. No tolerance for
wording: for data whose answers may be put in several ways there is ``generated=True``, which
decodes and compares normalized text.

KL divergence. KL(reference || model) is the mean over tokens of sum p log(p / q), in nats. It sees
changes long before an answer flips. Logits are widened to float64 before the logarithm: in float32
the rounding of the normalizer alone is 1e-7 to 1e-6, as much as the divergence of a good 8-bit
model.

Perplexity. Of running text every token but a window's first is predicted, and counts as the answer;
perplexity is the exponential of the mean negative log-likelihood over these tokens. A window is
never right or wrong.

Three classes of tokens are kept apart. *answer*: places that predict a token of the answer.
*vision*: the other places that read a placeholder of a picture or a clip. *text*: the rest.
Padding is in none of them, nor is the last token of a row, which predicts nothing.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from prismquant.errors import DataError, ModelError, NumericsError
from prismquant.evaluate.figures import (
    TOKEN_CLASSES,
    Deviation,
    Fidelity,
    Outcome,
    summarize,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn

    from prismquant.data.batches import Batch

_ANSWER, _TEXT, _VISION = range(3)
# Room for answers that are longer than the right one before generation is broken off.
_EXTRA_TOKENS = 16


def evaluate_model(
    model: nn.Module,
    batches: Iterable[Batch],
    reference: nn.Module | None = None,
    *,
    generated: bool = False,
    processor: Any = None,
    chunk: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Fidelity:
    """Measure a model's answers and, beside a reference, its divergence.

    Both models see each batch in turn; no logits outlive their batch. With ``V`` words in the
    vocabulary, memory beyond the models' own is about ``chunk * V * 40`` bytes.

    Args:
        model: Takes a batch's inputs and returns ``.logits`` [B, T, V], as models of transformers
            do.
        batches: From :func:`prismquant.data.make_batches`.
        reference: The model to compare with, over the same vocabulary.
        generated: Also decode greedily with ``model.generate`` and compare the text with the
            answer, both stripped, case-folded and without a final period.
        processor: Decodes tokens; needed for ``generated``.
        chunk: Places whose distributions are looked at together.
        progress: Called with the number of samples done after each batch.

    Raises:
        DataError: There are no samples, or nothing in them can be measured.
        ModelError: The vocabularies differ.
        NumericsError: Logits are not finite; names the sample.
    """
    if generated and processor is None:
        raise DataError("decoding answers needs a processor", remedy="pass processor=")
    outcomes: list[Outcome] = []
    with _inference(model), _inference(reference), torch.inference_mode():
        for batch in batches:
            texts = (
                _generated_matches(model, batch, processor) if generated else None,
                _generated_matches(reference, batch, processor)
                if generated and reference
                else None,
            )
            outcomes += _batch_outcomes(model, reference, batch, texts, chunk)
            if progress:
                progress(len(outcomes))
    if not outcomes:
        raise DataError("there are no samples to evaluate")
    if reference is None and not any(outcome.answer_tokens for outcome in outcomes):
        raise DataError(
            "no sample has an answer, and there is no reference: nothing can be measured",
            remedy="use samples that end with an assistant message, or give a reference model",
        )
    return summarize(outcomes)


def normalize_answer(text: str) -> str:
    """Text without what does not make an answer wrong: case, outer space, a final period."""
    return text.strip().casefold().removesuffix(".").rstrip()


# One batch


def _batch_outcomes(
    model: nn.Module,
    reference: nn.Module | None,
    batch: Batch,
    texts: tuple[list[bool | None] | None, list[bool | None] | None],
    chunk: int,
) -> list[Outcome]:
    places = _places(batch, everything=reference is not None)
    sums = _Sums(len(batch))
    if len(places.rows):
        own = _logits(model, batch, places)
        other = None if reference is None else _logits(reference, batch, places)
        for start in range(0, len(places.rows), chunk):
            _measure(own, other, places, slice(start, start + chunk), batch.ids, sums)
    return [_outcome(batch, row, sums, texts, reference is not None) for row in range(len(batch))]


@dataclass(frozen=True)
class _TokenPlaces:
    """The tokens of a batch whose prediction is looked at.

    Attributes:
        columns: Positions at which any row has one, [C].
        rows, slots: Row of each place and its index into ``columns``, [N].
        targets: Id of the token that comes next, [N].
        classes: Index into :data:`TOKEN_CLASSES`, [N].
    """

    columns: Tensor
    rows: Tensor
    slots: Tensor
    targets: Tensor
    classes: Tensor


def _places(batch: Batch, *, everything: bool) -> _TokenPlaces:
    attended = batch.attended
    predicts = attended[:, :-1] & attended[:, 1:]
    answer = batch.answer_mask[:, 1:] & predicts
    wanted = predicts if everything else answer
    columns = wanted.any(dim=0).nonzero().flatten()
    rows, slots = wanted[:, columns].nonzero(as_tuple=True)
    positions = columns[slots]
    vision = batch.vision_mask[:, :-1]
    classes = torch.where(answer, _ANSWER, torch.where(vision, _VISION, _TEXT))
    return _TokenPlaces(
        columns=columns,
        rows=rows,
        slots=slots,
        targets=batch.inputs["input_ids"][rows, positions + 1],
        classes=classes[rows, positions],
    )


def _logits(model: nn.Module, batch: Batch, places: _TokenPlaces) -> Tensor:
    """Logits [B, C, V] at the columns of ``places``, on the model's device."""
    device = next(model.parameters()).device
    inputs: dict[str, Any] = dict(batch.to(device).inputs)
    accepted = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    if "use_cache" in accepted or open_ended:
        inputs["use_cache"] = False
    columns = places.columns.to(device)
    if "logits_to_keep" in accepted:
        logits: Tensor = model(**inputs, logits_to_keep=columns).logits
        return logits
    return torch.index_select(model(**inputs).logits, 1, columns)


class _Sums:
    """Running sums for each row of a batch, in float64 on the CPU, so that their order is fixed."""

    def __init__(self, rows: int) -> None:
        self.nll = torch.zeros(2, rows, dtype=torch.float64)
        self.right = torch.zeros(2, rows, dtype=torch.float64)
        self.tokens = torch.zeros(rows, len(TOKEN_CLASSES), dtype=torch.float64)
        self.kl = torch.zeros_like(self.tokens)
        self.agreed = torch.zeros_like(self.tokens)


def _measure(
    own: Tensor,
    other: Tensor | None,
    places: _TokenPlaces,
    part: slice,
    ids: Sequence[str],
    sums: _Sums,
) -> None:
    rows, slots = places.rows[part].cpu(), places.slots[part].cpu()
    targets, classes = places.targets[part].cpu(), places.classes[part].cpu()
    answer = classes == _ANSWER
    pair = (rows, classes)
    sums.tokens.index_put_(pair, torch.ones(len(rows), dtype=torch.float64), accumulate=True)
    seen = [_log_probabilities(own, rows, slots, ids, "model")]
    if other is not None:
        if other.shape[-1] != own.shape[-1]:
            raise ModelError(
                f"the model has {own.shape[-1]} tokens and its reference {other.shape[-1]}",
                remedy="compare with the model that was quantized",
            )
        log_p = _log_probabilities(other, rows, slots, ids, "reference").to(seen[0].device)
        seen.append(log_p)
        p = log_p.exp()
        # 0 log 0 is 0, also where both models rule a token out and the difference is no number.
        terms = torch.where(p > 0, p * (log_p - seen[0]), torch.zeros_like(p))
        sums.kl.index_put_(pair, terms.sum(dim=-1).cpu(), accumulate=True)
        agreed = log_p.argmax(dim=-1) == seen[0].argmax(dim=-1)
        sums.agreed.index_put_(pair, agreed.double().cpu(), accumulate=True)
    for which, log_q in enumerate(seen):
        gold = targets.to(log_q.device)
        nll = -log_q.gather(1, gold[:, None])[:, 0].cpu()
        right = (log_q.argmax(dim=-1) == gold).double().cpu()
        sums.nll[which].index_put_((rows[answer],), nll[answer], accumulate=True)
        sums.right[which].index_put_((rows[answer],), right[answer], accumulate=True)


def _log_probabilities(
    logits: Tensor, rows: Tensor, slots: Tensor, ids: Sequence[str], whose: str
) -> Tensor:
    """Log-probabilities [n, V] in float64 at some places.

    Raises:
        NumericsError: A logit is NaN or plus infinity, or all are minus infinity.
    """
    picked = logits[rows.to(logits.device), slots.to(logits.device)]
    if picked.device.type == "mps":  # Apple's GPUs have no float64
        picked = picked.cpu()
    result = torch.log_softmax(picked.double(), dim=-1)
    broken = result.isnan().any(dim=-1)
    if bool(broken.any()):
        row = int(rows[broken.cpu().nonzero()[0, 0]])
        raise NumericsError(
            f"the {whose}'s logits are not finite",
            where=f"sample {ids[row]}",
            remedy="look for NaN in the checkpoint, or run in float32 or bfloat16, not float16",
        )
    return result


def _outcome(
    batch: Batch,
    row: int,
    sums: _Sums,
    texts: tuple[list[bool | None] | None, list[bool | None] | None],
    compared: bool,
) -> Outcome:
    count = int(sums.tokens[row, _ANSWER])
    running = bool(batch.running) and batch.running[row]
    told = count and not running
    exact = [bool(int(sums.right[which, row]) == count) if told else None for which in range(2)]
    deviations = {
        name: Deviation(
            int(sums.tokens[row, index]), float(sums.kl[row, index]), int(sums.agreed[row, index])
        )
        for index, name in enumerate(TOKEN_CLASSES)
        if compared and sums.tokens[row, index]
    }
    return Outcome(
        id=batch.ids[row],
        kind=batch.kinds[row],
        type=batch.types[row] if batch.types else "",
        answer_tokens=count,
        nll=float(sums.nll[0, row]),
        exact=exact[0],
        generated=texts[0][row] if texts[0] else None,
        reference_nll=float(sums.nll[1, row]) if compared else None,
        reference_exact=exact[1] if compared else None,
        reference_generated=texts[1][row] if texts[1] else None,
        deviations=deviations,
        running=running,
    )


# Decoding


def _generated_matches(model: nn.Module, batch: Batch, processor: Any) -> list[bool | None]:
    """True if the decoded text of each row is its answer; None for rows without one."""
    answers = [batch.inputs["input_ids"][row][mask] for row, mask in enumerate(batch.answer_mask)]
    if not any(len(answer) for answer in answers):
        return [None] * len(answers)
    device = next(model.parameters()).device
    prompts = {name: value.to(device) for name, value in prompt_inputs(batch).items()}
    width = prompts["input_ids"].shape[1]
    ends = sorted({int(answer[-1]) for answer in answers if len(answer)})
    generator: Any = model
    produced = generator.generate(
        **prompts,
        do_sample=False,
        num_beams=1,
        # A checkpoint's own generation settings (Qwen2-VL: a penalty of 1.05) are no part of the
        # model.
        repetition_penalty=1.0,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=ends,
        pad_token_id=ends[0],
        max_new_tokens=max(len(answer) for answer in answers) + _EXTRA_TOKENS,
    )
    tokenizer = getattr(processor, "tokenizer", processor)

    def text(tokens: list[int]) -> str:
        stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        decoded: str = tokenizer.decode(tokens[:stop], skip_special_tokens=True)
        return normalize_answer(decoded)

    return [
        text(row[width:].tolist()) == text(answer.tolist()) if len(answer) else None
        for row, answer in zip(produced, answers, strict=True)
    ]


def prompt_inputs(batch: Batch) -> dict[str, Tensor]:
    """The batch without its answers, padded on the left as decoding needs it.

    Tensors with one entry for each token ([B, T]) are shifted; pictures and clips stay as they
    are, since all of them belong to prompts. A row without an answer is a prompt as a whole.
    """
    ids = batch.inputs["input_ids"]
    shape = ids.shape
    attended = batch.attended.sum(dim=1)
    has_answer = batch.answer_mask.any(dim=1)
    lengths = torch.where(has_answer, batch.answer_mask.int().argmax(dim=1), attended)
    width = int(lengths.max())
    # Source of place j in row b; negative where padding goes.
    source = torch.arange(width, device=ids.device)[None, :] - (width - lengths)[:, None]
    padding = source < 0
    source = source.clamp(min=0)
    result = {}
    for name, value in batch.inputs.items():
        if value.shape == shape:
            moved = value.gather(1, source)
            # What stands at padding does not matter where nothing attends, but must be a text
            # token.
            fill = ids[0, 0] if name == "input_ids" else torch.zeros((), dtype=value.dtype)
            result[name] = torch.where(padding, fill.to(value.device), moved)
        else:
            result[name] = value
    return result


@contextlib.contextmanager
def _inference(model: nn.Module | None) -> Iterator[None]:
    """Switch dropout and the like off, and back as it was."""
    if model is None:
        yield
        return
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# Figures
