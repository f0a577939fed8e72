"""Figures of an evaluation: sums over the tokens of each sample, and what is derived from them.

Everything is summed per sample first; all figures derive from these sums, so that standard errors
are over samples, which are independent, and not over tokens, which are not.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from prismquant.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

TOKEN_CLASSES = ("answer", "text", "vision")


@dataclass(frozen=True)
class Deviation:
    """Sums over the tokens of one class in one sample.

    Attributes:
        tokens: Number of tokens.
        kl: Sum of KL(reference || model), in nats.
        agreed: Tokens at which both find the same token most probable.
    """

    tokens: int
    kl: float
    agreed: int


@dataclass(frozen=True)
class Outcome:
    """The measures of one sample.

    Attributes:
        id: The sample.
        kind: ``text``, ``image`` or ``video``.
        type: Type of task, or empty.
        answer_tokens: Tokens of the answer with its end; 0 for a sample without an answer.
        nll: Sum of the answer tokens' negative log-likelihoods, in nats.
        exact: Whether the answer is right token by token; None without an answer.
        generated: Whether the decoded text is right; None if nothing was decoded.
        reference_nll: As ``nll``, of the reference; None without one.
        reference_exact: As ``exact``, of the reference.
        reference_generated: As ``generated``, of the reference.
        deviations: For each class of tokens that the sample has; empty without a reference.
        running: Whether it is running text, all of which counts as the answer.
    """

    id: str
    kind: str
    type: str
    answer_tokens: int
    nll: float
    exact: bool | None
    generated: bool | None
    reference_nll: float | None
    reference_exact: bool | None
    reference_generated: bool | None
    deviations: Mapping[str, Deviation]
    running: bool = False


@dataclass(frozen=True)
class Divergence:
    """Distance from the reference on one class of tokens.

    Attributes:
        tokens: Number of tokens.
        kl: Mean KL(reference || model) of a token, in nats.
        kl_error: Its standard error over samples; None for fewer than two samples.
        top1: Share of tokens at which both find the same token most probable.
    """

    tokens: int
    kl: float
    kl_error: float | None
    top1: float


@dataclass(frozen=True)
class Metrics:
    """Figures over a set of samples; None where there is nothing to measure.

    Attributes:
        samples: Number of samples.
        answers: Those of them that have an answer.
        answer_tokens: Tokens of all answers.
        exact_match: Share of answers that are right token by token.
        generated_match: Share of answers whose decoded text is right.
        nll_token: Mean negative log-likelihood of an answer token, in nats.
        nll_answer: Mean negative log-likelihood of an answer, in nats.
        reference_exact_match: As ``exact_match``, of the reference.
        reference_generated_match: As ``generated_match``, of the reference.
        reference_nll_token: As ``nll_token``, of the reference.
        divergence: Distance from the reference, for each class of tokens that occurs.
        perplexity: Exponential of the mean negative log-likelihood of a token of running text.
        reference_perplexity: As ``perplexity``, of the reference.
    """

    samples: int
    answers: int
    answer_tokens: int
    exact_match: float | None
    generated_match: float | None
    nll_token: float | None
    nll_answer: float | None
    reference_exact_match: float | None
    reference_generated_match: float | None
    reference_nll_token: float | None
    divergence: Mapping[str, Divergence]
    perplexity: float | None = None
    reference_perplexity: float | None = None


@dataclass(frozen=True)
class Fidelity:
    """The result of :func:`evaluate_model`.

    Attributes:
        overall: Figures over all samples.
        by_kind: Figures over the samples of each kind.
        by_type: Figures over the samples of each type of task, as far as the data name types.
        right_to_wrong: Ids of samples that the reference answers and the model does not.
        wrong_to_right: Ids of samples that the model answers and the reference does not. Both go by
            decoded text if there is any, else by tokens.
        outcomes: What the figures derive from, one entry for each sample.
        notes: What of the data was cut or left out.
        predicted: Divergence in nats a token by class (``answer``, ``text``, ``image``, ``video``)
            that a search had predicted of the model's recipe; empty where it had not.
    """

    overall: Metrics
    by_kind: Mapping[str, Metrics]
    by_type: Mapping[str, Metrics]
    right_to_wrong: tuple[str, ...]
    wrong_to_right: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    notes: tuple[str, ...] = ()
    predicted: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self) | {
            "right_to_wrong": list(self.right_to_wrong),
            "wrong_to_right": list(self.wrong_to_right),
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "notes": list(self.notes),
        }

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Fidelity:
        """The result that :meth:`to_dict` wrote. All figures are computed anew from its outcomes.

        Raises:
            DataError: The outcomes are missing or malformed.
        """
        try:
            outcomes = [
                Outcome(
                    **{key: entry[key] for key in entry if key != "deviations"},
                    deviations={k: Deviation(**v) for k, v in entry["deviations"].items()},
                )
                for entry in value["outcomes"]
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"this is no result of an evaluation: {error}", remedy="run `prismquant eval` again"
            ) from error
        return replace(
            summarize(outcomes),
            notes=tuple(value.get("notes", ())),
            predicted=dict(value.get("predicted", {})),
        )


def summarize(outcomes: Sequence[Outcome]) -> Fidelity:
    """Derive all figures from what was measured on each sample."""
    kinds = sorted({outcome.kind for outcome in outcomes})
    types = sorted({outcome.type for outcome in outcomes if outcome.type})
    verdicts = [(o.id, _verdict(o, "reference_"), _verdict(o, "")) for o in outcomes]
    return Fidelity(
        overall=_metrics(outcomes),
        by_kind={kind: _metrics([o for o in outcomes if o.kind == kind]) for kind in kinds},
        by_type={name: _metrics([o for o in outcomes if o.type == name]) for name in types},
        right_to_wrong=tuple(i for i, before, after in verdicts if before and after is False),
        wrong_to_right=tuple(i for i, before, after in verdicts if before is False and after),
        outcomes=tuple(outcomes),
    )


def _verdict(outcome: Outcome, prefix: str) -> bool | None:
    decoded: bool | None = getattr(outcome, f"{prefix}generated")
    exact: bool | None = getattr(outcome, f"{prefix}exact")
    return exact if decoded is None else decoded


def _metrics(outcomes: Sequence[Outcome]) -> Metrics:
    answered = [outcome for outcome in outcomes if outcome.answer_tokens]
    tokens = sum(outcome.answer_tokens for outcome in answered)
    nll = math.fsum(outcome.nll for outcome in answered)
    compared = [o for o in answered if o.reference_nll is not None]
    reference_nll = math.fsum(o.reference_nll or 0.0 for o in compared)
    reference_tokens = sum(outcome.answer_tokens for outcome in compared)
    divergence = {
        name: _divergence([o.deviations[name] for o in outcomes if name in o.deviations])
        for name in TOKEN_CLASSES
        if any(name in outcome.deviations for outcome in outcomes)
    }
    return Metrics(
        samples=len(outcomes),
        answers=len(answered),
        answer_tokens=tokens,
        exact_match=_share(outcome.exact for outcome in outcomes),
        generated_match=_share(outcome.generated for outcome in outcomes),
        nll_token=nll / tokens if tokens else None,
        nll_answer=nll / len(answered) if answered else None,
        reference_exact_match=_share(outcome.reference_exact for outcome in outcomes),
        reference_generated_match=_share(outcome.reference_generated for outcome in outcomes),
        reference_nll_token=reference_nll / reference_tokens if reference_tokens else None,
        divergence=divergence,
        perplexity=_perplexity([(o.nll, o.answer_tokens) for o in answered if o.running]),
        reference_perplexity=_perplexity(
            [(o.reference_nll or 0.0, o.answer_tokens) for o in compared if o.running]
        ),
    )


def _perplexity(windows: Sequence[tuple[float, int]]) -> float | None:
    """Perplexity of windows of running text, each given by its likelihood and its tokens."""
    tokens = sum(count for _, count in windows)
    if not tokens:
        return None
    try:
        return math.exp(math.fsum(nll for nll, _ in windows) / tokens)
    except OverflowError:  # a model that rules out what stands there
        return None


def _share(verdicts: Iterable[bool | None]) -> float | None:
    known = [verdict for verdict in verdicts if verdict is not None]
    return sum(known) / len(known) if known else None


def _divergence(deviations: Sequence[Deviation]) -> Divergence:
    """Mean of a token and its standard error over samples.

    The mean is a ratio of two sums over samples, so its error is that of a ratio estimator
    (Cochran, Sampling Techniques, section 6.4): the samples' residuals ``kl - mean * tokens``,
    over the mean number of tokens.
    """
    tokens = sum(deviation.tokens for deviation in deviations)
    mean = math.fsum(deviation.kl for deviation in deviations) / tokens
    count = len(deviations)
    error = None
    if count > 1:
        residuals = math.fsum((d.kl - mean * d.tokens) ** 2 for d in deviations)
        error = math.sqrt(residuals / (count * (count - 1))) / (tokens / count)
    agreed = sum(deviation.agreed for deviation in deviations)
    return Divergence(tokens, mean, error, agreed / tokens)
